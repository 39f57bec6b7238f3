"""Sources of raw records: files, saved folders, stored rounds, the hub."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.data.rounds.store import find_rounds, read_rounds

if TYPE_CHECKING:
    from datasets import Dataset
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, first_line, listing
from lit_align.errors import shown

# --- sources ---


def read_records(source: str, split: str | None, skipped: Counter[str]) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        return _round_records(path, split) if find_rounds(path) else _saved_records(path, split)
    reader = _READERS.get(path.suffix)
    is_path = len(path.parts) == 2 and path.parent.is_dir()  # it looks like a hub name, but its folder is here
    if reader is None and not is_path and not path.exists() and _HUB_NAME.fullmatch(source):
        return _hub_records(source, split)
    if not path.is_file():
        raise DataError(f"{source}: there is no such file. Give {_SOURCES}.")
    if reader is None:
        raise DataError(f"{source}: a {path.suffix or 'nameless'} file cannot be read. Give {_SOURCES}.")
    if split is not None:
        raise DataError(f"{source}: split={split!r} has no effect, for a file has no splits. Leave it out.")
    return reader(path, skipped)


def _read_json(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """One object per line, or a list of objects."""
    with path.open("rb") as file:
        is_list = path.suffix == ".json" and file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        file.seek(0)
        if is_list:
            numbered = enumerate(_loads(file.read(), path.name, 1, skipped), 1)
        else:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            numbered = ((number, _loads(line, path.name, number, skipped)) for number, line in lines)
        for number, values in numbered:
            if not isinstance(values, dict):
                raise DataError(
                    f"{path.name}:{number}: the row is {shown(values)}, but needs to be an object such as "
                    '{"prompt": "…"}.'
                )
            yield Record(values, f"{path.name}:{number}")


def _loads(data: bytes, name: str, line: int, skipped: Counter[str]) -> Any:
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{name}:{line}: this line is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line + error.lineno - 1}: this line is no JSON ({error.msg}, column {error.colno}): "
            f"{shown(error.doc[error.doc.rfind(chr(10), 0, error.pos) + 1 :])}. A file holds one object per "
            "line, or (.json) one list of objects."
        ) from error
    return _without_surrogates(value, skipped) if _SURROGATE.search(data) else value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def _without_surrogates(value: Any, skipped: Counter[str]) -> Any:
    """Half a surrogate pair is no character: no tokenizer takes it, no file can hold it. It becomes �."""
    if isinstance(value, dict):
        return {key: _without_surrogates(each, skipped) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(each, skipped) for each in value]
    if not isinstance(value, str):
        return value
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole != value:
        skipped["texts with half a surrogate pair, now �"] += 1
    return whole


def _read_parquet(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: this is no Parquet file ({first_line(error)}). Write it anew.") from error
    rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
    return (Record(row, f"{path.name}:{number}") for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}
_SOURCES = "a .jsonl, .json or .parquet file, a folder saved by `datasets`, a run's rounds, or a hub name"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def _round_records(path: Path, scorer: str | None) -> Iterator[Record]:
    """Rounds that were sampled on-policy: prompts, responses as text, and the rewards of one scorer."""
    for stored in read_rounds(path, scorer):
        for sample, scored in stored.rows:
            values = {"prompt": sample.prompt, "responses": sample.responses, "rewards": scored.scores}
            yield Record(values, f"{stored.path.name}/{sample.source}")


def _saved_records(path: Path, split: str | None) -> Iterator[Record]:
    from datasets import Dataset, load_from_disk  # takes seconds to import

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:  # the last where there is no row
        raise DataError(
            f"{path}: this folder is empty, damaged, or was not saved by `save_to_disk` ({first_line(error)}). Give "
            f"{_SOURCES}."
        ) from error
    if isinstance(data, Dataset):
        if split is not None:
            raise DataError(f"{path}: split={split!r} has no effect, for the folder holds one data set. Leave it out.")
        return _dataset_records(data, path.name)
    name = split or (next(iter(data)) if len(data) == 1 else "train")
    if name not in data:
        raise DataError(f"{path}: there is no split {name!r}; set `split` to one of {listing(map(str, data))}.")
    return _dataset_records(data[name], f"{path.name}[{name}]")


def _hub_records(source: str, split: str | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    split = split or "train"
    try:
        data = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: there is no such file or folder, and the hub gives no data set of that name with "
            f"split={split!r} ({first_line(error)}). Give {_SOURCES}."
        ) from error
    return _dataset_records(data, f"{source}[{split}]")


def _dataset_records(data: "Dataset", name: str) -> Iterator[Record]:
    batches = data.with_format("arrow").iter(1024)
    rows = chain.from_iterable(cast(pa.Table, batch).to_pylist() for batch in batches)
    return (Record(row, f"{name}:{number}") for number, row in enumerate(rows, 1))
