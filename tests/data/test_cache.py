"""Data are tokenized once: by one process, for all later starts with the same tokens."""

import errno
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import datasets
import pytest
import torch
from tiny import byte_tokenizer
from tiny_tokenizers import word_tokenizer

from lit_align.data import AllPairs, BestWorst, OfflinePairs
from lit_align.data import examples as code
from lit_align.data.cache import Entry, TokenCache, default_folder
from lit_align.data.examples import Source
from lit_align.errors import UserError
from lit_align.needs import DataNeeds

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _own_cache(in_tmp, monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(in_tmp / "cache"))


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The sources that are read, in order."""
    sources: list[str] = []
    original = Source.read
    monkeypatch.setattr(Source, "read", lambda self, kind: sources.append(self.path) or original(self, kind))
    return sources


def write(count: int = 6, name: str = "rows.jsonl", word: str = "yes") -> str:
    rows = [
        {"prompt": f"p{i}:", "responses": [f" {word} {i}", " no", " no!"], "rewards": [2, 1, 0]} for i in range(count)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def setup(
    train: Any = "rows.jsonl", tokenizer: Any = None, needs_mismatched: bool = False, **options: Any
) -> OfflinePairs:
    """A data module after its setup, without a model."""
    needs = DataNeeds(data_kind="preferences", takes_groups=True, needs_mismatched=needs_mismatched)
    module = SimpleNamespace(tokenizer=tokenizer or byte_tokenizer(), data_needs=lambda: needs)
    data = OfflinePairs(train, **{"batch_size": 2} | options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        limit_val_batches=1.0,
        lightning_module=module,
        current_epoch=0,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(fn=None),
    )
    data.setup("fit")
    return data


def entries() -> list[str]:
    """Names of the whole entries; remains of a killed process are listed as damaged."""
    return [entry.path.name for entry in TokenCache(default_folder()).entries() if not entry.is_damaged]


def test_a_second_start_reads_the_tokens_and_shows_the_same_header(read):
    write()
    first = setup()
    second = setup()
    assert read == ["rows.jsonl"]
    assert list(second.describe()) == list(first.describe())
    assert list(second.train_examples) == list(first.train_examples)
    assert second.identity() == first.identity()


def test_a_held_out_share_is_read_once_too(read):
    write(20)
    first = setup(validation=0.2)
    second = setup(validation=0.2)
    assert read == ["rows.jsonl"]
    assert list(second.describe()) == list(first.describe())
    assert list(second.share_of_training().examples) == list(first.share_of_training().examples)


@pytest.mark.parametrize(
    "options",
    [
        {"max_response_length": 4},
        {"max_prompt_length": 100},
        {"long_prompts": "drop"},
        {"pairing": AllPairs()},
        {"pairing": BestWorst(duplicates="normalised")},
        {"validation": 0.2},
        {"train": "rows.jsonl[:4]"},
        {"tokenizer": byte_tokenizer(chat=False)},
        {"template_args": {"mood": "!"}},
        {"columns": {"prompt": "prompt"}},
        {"needs_mismatched": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_that_decides_the_tokens_names_the_entry(read, options):
    write()
    setup()
    setup(**options)
    assert len(read) == 2
    assert len(entries()) >= 2


def test_what_decides_no_tokens_does_not(read):
    write()
    setup()
    setup([Source("rows.jsonl", weight=2.0)], batch_size=1, seed=5, group_by_length=True)
    assert len(read) == 1


def test_a_data_set_of_the_hub_goes_into_the_cache(read, monkeypatch):
    """Its fingerprint is that of real files, whose version stands for the hub's."""
    load, path = datasets.load_dataset, Path(write()).absolute()

    def load_rows(name: str, configuration: str | None, split: str) -> Any:
        return load("json", data_files=str(path), split=split, cache_dir="downloaded")

    monkeypatch.setattr("datasets.load_dataset", load_rows)
    expected = [(each.prompt_ids, each.response_ids) for each in setup().train_examples]
    for _ in range(2):
        train = setup("someone/rows").train_examples
        assert [(each.prompt_ids, each.response_ids) for each in train] == expected
    assert (read.count("someone/rows"), len(entries())) == (1, 2)
    write(word="yea")
    setup("someone/rows")
    assert (read.count("someone/rows"), len(entries())) == (2, 2)


def test_a_changed_file_replaces_its_entry(read):
    write()
    before = setup()
    write(word="yea")
    after = setup()
    assert len(read) == 2
    assert len(entries()) == 1
    assert [example.tokens for example in after.train_examples] == [example.tokens for example in before.train_examples]
    assert list(after.train_examples) != list(before.train_examples)  # which are still mapped


def test_another_version_of_the_code_makes_its_entry_again(read, monkeypatch):
    write()
    setup()
    monkeypatch.setattr(code, "code_version", lambda rule: "of tomorrow")
    setup()
    setup()
    assert len(read) == 2
    assert len(entries()) == 1


def test_a_template_that_reads_the_date_is_rendered_each_day(read, monkeypatch):
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    write()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    setup(tokenizer=tokenizer)
    monkeypatch.setattr("lit_align.data.template.datetime", Later)
    setup(tokenizer=tokenizer)
    assert len(read) == 2


class Later(datetime):
    """Another day than today."""

    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return cls(2001, 2, 3)


@pytest.mark.parametrize("damage", ["cut", "gone", "no description"])
def test_a_damaged_entry_is_made_again(read, damage):
    write()
    first = setup()
    (folder,) = [entry.path for entry in TokenCache(default_folder()).entries()]
    file = folder / ("entry.json" if damage == "no description" else "examples.arrow")
    file.write_bytes(file.read_bytes()[:-1]) if damage == "cut" else file.unlink()
    assert list(setup().train_examples) == list(first.train_examples)
    assert len(read) == 2


def test_an_error_of_the_data_leaves_nothing(read):
    write()
    with open("rows.jsonl", "a") as file:
        file.write('{"prompt": "p", "responses": ["a", "b"], "rewards": [1]}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows.jsonl:7: 2 responses, but 1 number"):
            setup()
    assert [path.name[:5] for path in default_folder().iterdir()] == [".rows"]  # the lock


def slow_start(seconds: float, made: Any) -> None:
    """A start that tokenizes for a while, in a process of its own."""
    original = code.ExampleMaker.make

    def make(self: Any, *args: Any) -> Any:
        with made.get_lock():
            made.value += 1
        args[-1](1, 9)  # reports
        found = original(self, *args)
        time.sleep(seconds)
        return found

    code.ExampleMaker.make = make  # type: ignore[method-assign]
    assert len(setup().train_examples) == 6


def started(count: int, seconds: float) -> tuple[list[Any], Any]:
    made = FORK.Value("i", 0)
    processes = [FORK.Process(target=slow_start, args=(seconds, made)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, made


def test_two_processes_tokenize_once():
    write()
    processes, made = started(2, 0.5)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert made.value == 1


def test_a_process_killed_while_it_tokenizes_leaves_nothing_half(read):
    write()
    (process,), made = started(1, 60)
    while not made.value:
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert entries() == []
    assert len(setup().train_examples) == 6
    assert len(entries()) == 1
    assert not list(default_folder().glob(".*.part"))


def test_one_that_waits_takes_over_from_a_killed_process():
    write()
    (first,), made = started(1, 60)
    while not made.value:
        time.sleep(0.01)
    (second,), again = started(1, 0)
    time.sleep(0.3)
    assert again.value == 0
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join()
    assert (second.exitcode, again.value) == (0, 1)


def test_nothing_is_written_beside_the_data():
    write()
    before = sorted(Path().rglob("*.jsonl"))
    setup(cache_dir="elsewhere")
    assert sorted(path.name for path in Path().iterdir()) == ["elsewhere", "rows.jsonl"]
    assert sorted(Path().rglob("*.jsonl")) == before


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may write only where all may: nothing keeps root from writing."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_data_in_a_folder_that_cannot_be_written_to_are_read():
    Path("data").mkdir()
    Path("cache").mkdir()
    expected = list(setup(write(name="data/rows.jsonl"), cache_dir="other").train_examples)
    for folder, mode in ((".", 0o555), ("data", 0o555), ("cache", 0o777)):
        Path(folder).chmod(mode)
    try:
        with without_rights():
            with pytest.raises(PermissionError):
                Path("data/new").touch()
            for _ in range(2):
                assert list(setup("data/rows.jsonl", cache_dir="cache").train_examples) == expected
    finally:
        Path().chmod(0o755)
    assert [path.name for path in Path("data").iterdir()] == ["rows.jsonl"]


def test_a_file_system_without_locks_is_named(monkeypatch):
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    write()
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"data.cache_dir: its file system has no locks \(.*not implemented\)"):
        setup(cache_dir="cache")


def test_a_folder_that_cannot_be_written_to_is_named():
    write()
    Path("taken").write_text("a file")
    with pytest.raises(UserError, match=r"taken cannot be written: .* or name another folder \(data.cache_dir\)"):
        setup(cache_dir="taken")


def test_cleared_entries_stay_with_those_who_read_them():
    write()
    data = setup()
    expected = list(data.train_examples)
    cache = TokenCache(default_folder())
    (entry,) = cache.entries()
    assert entry.size > 100
    cache.clear(entry)
    assert cache.entries() == []
    assert Entry.read(entry.path) is None
    assert list(data.train_examples) == expected


def test_memory_does_not_grow_with_the_number_of_rows():
    """Python objects of a data module that has read its rows and served some batches."""

    def objects(count: int) -> int:
        rows = ({"prompt": f"p{i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(count))
        Path(f"{count}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        gc.collect()
        before = sys.getallocatedblocks(), len(gc.get_objects())
        data = setup(f"{count}.jsonl")
        for _, batch in zip(range(3), data.train_dataloader(), strict=False):
            del batch
        gc.collect()
        after = sys.getallocatedblocks(), len(gc.get_objects())
        assert len(data.train_examples) == count
        return max(b - a for a, b in zip(before, after, strict=True))

    objects(10)  # imports and caches
    few = objects(100)
    assert objects(1900) < few + 500  # a list of the examples would take 20 objects for each


@pytest.mark.slow
def test_data_larger_than_the_memory_that_is_left_are_trained_on():
    """A file of 90 MB, in a process that may take 64 MB more."""
    words = " ".join(f"word{number}" for number in range(600))
    with Path("large.jsonl").open("w") as file:
        for number in range(10_000):
            row = {"prompt": f"{words} word{number % 600}", "chosen": f" {words}", "rejected": " word1"}
            file.write(json.dumps(row) + "\n")
    tokenizer = word_tokenizer(words.split())
    setup(write(), tokenizer)  # imports
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve_within, args=(64 << 20, tokenizer, writer))
    process.start()
    writer.close()
    assert reader.recv() == 10_000
    process.join()
    assert process.exitcode == 0
    assert Path("large.jsonl").stat().st_size > 80 << 20


def _serve_within(limit: int, tokenizer: Any, writer: Any) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
    data = setup("large.jsonl", tokenizer, max_prompt_length=1000, max_response_length=1000)
    writer.send(sum(len(batch.index) for batch in data.train_dataloader()))
