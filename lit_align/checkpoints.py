"""Checkpoint files: each has a hash file beside it, and none of them runs code when it is loaded.

`NAME.ckpt.sha256` is written after the checkpoint, checked when the checkpoint is loaded, and deleted with it. A
checkpoint without one (of another tool, of a run that was killed between the two, or on a remote file system) loads
unchecked. The hash of a folder of shards covers the names and contents of all its files.

Which checkpoint of a run is the newest is decided by what each says: how often the run had been started, for a start
may go back to an earlier one, and then its position.
"""

import hashlib
import io
import pickle
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lit_align.console import relative
from lit_align.errors import UserError, first_line
from lit_align.files import write_text, write_whole, writing
from lit_align.position import Position

STARTS = "starts"
"""Entry of a checkpoint: how often its run had been started, itself counted."""
OF_SHARDS = "meta.pt"
"""File in a folder of shards for the entries that are not sharded."""

SHARD_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
"""The classes that torch.distributed.checkpoint writes into `.metadata`, by module."""


class HashedCheckpointIO(TorchCheckpointIO):
    """Checkpoints in one file, each with its hash file.

    A local file is written beside its place and renamed. Lightning would write it to the system's temporary folder, and
    copy it if that is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            with writing(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            return
        forget_hash(path)  # a kill in between must not leave the hash of the earlier file
        write_whole(Path(path), lambda beside: _save(checkpoint, beside))
        write_hash(path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint whose hash fits.

        Raises:
            UserError: it is damaged, not of a run, would run code, or cannot be read.
        """
        check_hash(path)
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"ckpt_path={relative(path)} holds more than weights and plain values, which could run code, or is "
                "damaged. Name a checkpoint that a run wrote."
            ) from error
        except (OSError, EOFError, ImportError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"ckpt_path={relative(path)} cannot be loaded: {first_line(error)}. Name another."
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise UserError(f"ckpt_path={relative(path)} is not a checkpoint of a run. Name one that a run wrote.")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        forget_hash(path)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's own, after the system's
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_hash(path: str | Path) -> None:
    """Write the hash file of a checkpoint, in the format of `sha256sum`."""
    write_text(_hash_file(path), f"{_digest(Path(path))}  {Path(path).name}\n")


def complete_hash(path: Path) -> None:
    """Write the hash file of a whole checkpoint whose run was killed before it wrote it."""
    if not _hash_file(path).exists():
        write_hash(path)


def forget_hash(path: str | Path) -> None:
    """Delete a checkpoint's hash file, if there is one."""
    _hash_file(path).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, and its hash file, if they are there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    forget_hash(path)


def check_hash(path: str | Path) -> None:
    """Check that a checkpoint is as it was written; one without a hash file passes.

    Raises:
        UserError: it is not. The message offers the newest checkpoint of the folder that is.
    """
    real = Path(path).resolve()  # last.ckpt is a link
    if _is_whole(real) is not False:
        return
    good = newest_whole([real.parent])
    fix = f"Use the one before it: {relative(good)}" if good else "No intact one is in its folder: start again."
    raise UserError(f"{relative(real)} is damaged: its content is not what {_hash_file(real).name} says. {fix}")


def newest_whole(folders: Iterable[Path], since: int = -1) -> Path | None:
    """The newest checkpoint in some folders that is as it was written; None if there is none.

    Args:
        since: The first start of the run whose checkpoints count.
    """
    found = (each for folder in folders for each in folder.glob("*.ckpt") if not each.is_symlink())
    return next((each for each in newest_first(found, since) if _loads(each)), None)


def newest_first(paths: Iterable[Path], since: int = -1) -> list[Path]:
    """Checkpoints of a run in the reverse order in which it wrote them.

    The order is in the checkpoints, since copies have the times at which they were copied. Those that do not say it,
    because they are damaged or of another tool, come last.
    """
    places = {each: _place(each) for each in paths if each.exists()}  # last.ckpt may be a link to none
    counted = [each for each, place in places.items() if place[0] >= since]
    return sorted(counted, key=lambda each: (places[each], each.stat().st_mtime_ns), reverse=True)


def _place(path: Path) -> tuple[int, ...]:
    """The place of a checkpoint among those of its run. Of its weights nothing is read."""
    try:
        saved = torch.load(
            path / OF_SHARDS if path.is_dir() else path, weights_only=True, map_location="cpu", mmap=True
        )
        at = Position.load(saved)
        return int(saved.get(STARTS, 0)), at.seen, at.epoch, at.validated
    except Exception:  # damaged files can raise anything
        return (-1,)


def check_shards(folder: Path) -> Metadata:
    """Read the `.metadata` of a folder of shards, and make sure that nothing in the folder runs code when it is loaded.

    Both are pickles, which torch.distributed.checkpoint loads as they are.

    Raises:
        UserError: the folder holds anything but what torch.distributed.checkpoint writes.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _ShardUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__}")
        for index, info in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                if info.transform_descriptors:  # what is read here would not be what is loaded
                    raise pickle.UnpicklingError("it is compressed")
                _check_value(folder / info.relative_path, info.offset, info.length)
    except Exception as error:  # damaged pickles can raise anything
        raise UserError(
            f"{relative(folder)} is not a valid folder of shards ({first_line(error)}). Name another checkpoint."
        ) from error
    return metadata


def _check_value(path: Path, offset: int, length: int) -> None:
    """Check that a value in a shard that is not a tensor, such as a learning rate, is plain."""
    with path.open("rb") as file:
        file.seek(offset)
        value = io.BytesIO(file.read(length))
    try:
        torch.load(value, weights_only=True)
    except Exception as error:
        raise pickle.UnpicklingError(f"{path.name} has a value that is not plain") from error


class CheckedShardReader(FileSystemReader):
    """Reads a folder of shards whose `.metadata` runs no code."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata = check_shards(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _ShardUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in SHARD_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _hash_file(path: str | Path) -> Path:
    return Path(f"{path}.sha256")


def _is_whole(path: Path) -> bool | None:
    """Whether a checkpoint is as its hash file says; None without one."""
    try:
        written = _hash_file(path).read_bytes()
    except FileNotFoundError:
        return None
    return path.exists() and written.startswith(_digest(path).encode())


def _loads(path: Path) -> bool:
    """Whether a checkpoint is as its hash file says; without one, whether it is complete by its form."""
    whole = _is_whole(path)
    if whole is None:
        return (path / ".metadata").exists() if path.is_dir() else zipfile.is_zipfile(path)
    return whole


def _digest(path: Path) -> str:
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        listed = "".join(f"{_digest(each)}  {each.relative_to(path)}\n" for each in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
