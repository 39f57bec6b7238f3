"""The hash files of checkpoints, and folders of shards that hold code."""

import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in
from tiny import adamw, fit, write_pairs
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lit_align.callbacks import FSDP2Strategy, FSDPSharding
from lit_align.checkpoints import OF_SHARDS, HashedCheckpointIO, check_hash, newest_first
from lit_align.cli import main
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.export import export, find_checkpoint
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig

EMPTY: dict[str, Any] = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}


def train(model: str, *args: str) -> None:
    options = {
        "model": "DPO",
        "model.policy.path": model,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "data": "OfflinePairs",
        "data.train": "pairs.jsonl",
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": "run",
        "trainer.max_epochs": 2,
        "checkpoint.save_top_k": -1,
    }
    main(["fit", *(f"--{key}={value}" for key, value in options.items()), *args])


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_named_and_the_checkpoint_before_offered(tiny_model, in_tmp, capsys):
    write_pairs(in_tmp)
    train(tiny_model)
    last = Path("run/checkpoints/last.ckpt")
    assert sorted(path.name for path in last.parent.glob("*.sha256")) == ["step=2.ckpt.sha256", "step=4.ckpt.sha256"]
    flip_a_bit(last.resolve(), 3000)  # in the weights
    expected = (
        "run/checkpoints/step=4.ckpt is damaged: its content is not what step=4.ckpt.sha256 says. "
        "Use the one before it: run/checkpoints/step=2.ckpt"
    )
    for command in (
        lambda: train(tiny_model, "--trainer.max_epochs=3", f"--ckpt_path={last}"),
        lambda: main(["export", "run", "--out=exported"]),
    ):
        with pytest.raises(SystemExit):
            command()
        assert capsys.readouterr().err == f"error: {expected}\n"
    last.resolve().write_bytes(b"smashed")
    with pytest.raises(SystemExit):
        train(tiny_model, f"--ckpt_path={last}")
    assert capsys.readouterr().err == f"error: {expected}\n"
    train(tiny_model, "--trainer.max_epochs=3", "--ckpt_path=run/checkpoints/step=2.ckpt")
    check_hash(last)

    Path("run/config.yaml").write_text("model: [cut off")
    with pytest.raises(SystemExit):
        main(["export", "run", "--out=exported"])
    assert capsys.readouterr().err.startswith("error: run/config.yaml is damaged (")


def test_the_hash_goes_with_its_checkpoint(in_tmp):
    files = HashedCheckpointIO()
    files.save_checkpoint(EMPTY | {"weight": torch.ones(3)}, "kept/a.ckpt")
    assert sorted(os.listdir("kept")) == ["a.ckpt", "a.ckpt.sha256"]
    files.save_checkpoint(EMPTY | {"weight": torch.zeros(3)}, "kept/a.ckpt")
    assert files.load_checkpoint("kept/a.ckpt")["weight"].sum() == 0
    files.remove_checkpoint("kept/a.ckpt")
    assert os.listdir("kept") == []


def test_a_checkpoint_without_a_hash_loads(in_tmp):
    torch.save(EMPTY | {"weight": torch.ones(3)}, "other.ckpt")
    assert HashedCheckpointIO().load_checkpoint("other.ckpt")["weight"].sum() == 3


def test_a_kill_between_checkpoint_and_hash_leaves_no_wrong_hash(in_tmp, monkeypatch):
    files = HashedCheckpointIO()
    files.save_checkpoint(EMPTY | {"step": 1}, "a.ckpt")
    monkeypatch.setattr("lit_align.checkpoints.write_hash", lambda path: None)
    files.save_checkpoint(EMPTY | {"step": 2}, "a.ckpt")
    assert files.load_checkpoint("a.ckpt")["step"] == 2


def test_a_full_disk_is_one_message_with_the_path(in_tmp):
    """A limit of the size of files fails like a full disk, in the middle of writing."""
    HashedCheckpointIO().save_checkpoint(EMPTY | {"step": 1}, "a/b.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^a/b\.ckpt cannot be written: File too large\. Make room"):
            HashedCheckpointIO().save_checkpoint(EMPTY | {"weights": torch.zeros(100_000)}, "a/b.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert HashedCheckpointIO().load_checkpoint("a/b.ckpt")["step"] == 1
    assert [path.name for path in Path("a").iterdir()] == ["b.ckpt"]


# --- folders of shards ---


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def train_in_shards(model: str, ckpt_path: str | None = None) -> None:
    """One epoch, or a second one from a checkpoint."""
    module = DPO(PolicyConfig(model, dtype="float32"), optimizer=adamw(0.03))
    saving = ModelCheckpoint("run/checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"strategy": FSDP2Strategy(save_distributed_checkpoint=True), "devices": 2}
    options |= {"ckpt_path": ckpt_path, "max_epochs": 2 if ckpt_path else 1, "enable_checkpointing": not ckpt_path}
    data = OfflinePairs("pairs.jsonl", batch_size=2)
    fit(module, data, *([] if ckpt_path else [saving]), FSDPSharding(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: [1, 2], "is not a checkpoint of a run"),
        (lambda whole: whole["state_dict"], "is not a checkpoint of a run"),
        (lambda whole: {"code": Hostile()}, "holds more than weights and plain values, which could run code"),
        (lambda whole: without(whole, "optimizer_states"), "holds weights, but not the state of the optimizer"),
        (lambda whole: without(whole, "loops"), "holds weights, but not the state of the optimizer"),
        (lambda whole: without(whole, "reference"), "is not of an objective with a reference"),
    ],
    ids=["list", "weights", "code", "no optimizer", "no loops", "no reference"],
)
def test_a_foreign_or_incomplete_checkpoint_is_one_message(tiny_model, in_tmp, change, message):
    pairs = write_pairs(in_tmp)

    def resume(ckpt_path: str | None = None) -> Any:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        options: dict[str, Any] = {"plugins": [HashedCheckpointIO()], "max_epochs": 2 if ckpt_path else 1}
        return fit(module, OfflinePairs(pairs, batch_size=4), ckpt_path=ckpt_path, **options)

    resume().save_checkpoint("whole.ckpt")
    torch.save(change(torch.load("whole.ckpt", weights_only=True)), "changed.ckpt")
    with pytest.raises(UserError, match=message):
        resume("changed.ckpt")
    assert not Path("executed").exists()


def without(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != name}


def test_the_newest_folder_of_shards_is_known_by_its_position(tiny_model, in_tmp):
    """The older one has the later time, as in a copy."""
    write_pairs(in_tmp)
    run_in(2, train_in_shards, tiny_model)
    older, newer = (Path(f"run/checkpoints/step={step}.ckpt") for step in (1, 2))
    assert older.is_dir()
    os.utime(newer, (0, 0))
    assert newest_first([older, newer]) == newest_first([newer, older]) == [newer, older]
    assert find_checkpoint("run") == newer
    flip_a_bit(newer / OF_SHARDS, 3000)
    with pytest.raises(
        UserError, match=r"step=2\.ckpt is damaged.* Use the one before it: run/checkpoints/step=1\.ckpt"
    ):
        check_hash(newer)
    (newer / OF_SHARDS).unlink()
    assert newest_first([newer, older]) == [older, newer], "one that does not say its position comes last"


def test_shards_with_code_are_refused_and_others_resume(tiny_model, in_tmp):
    def resume() -> None:
        run_in(2, train_in_shards, tiny_model, str(shards))

    write_pairs(in_tmp)
    run_in(2, train_in_shards, tiny_model)
    shards = Path("run/checkpoints/step=2.ckpt")
    assert Path(f"{shards}.sha256").exists()
    resume()
    metadata = FileSystemReader(shards).read_metadata()
    (shards / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"step=2\.ckpt is damaged: its content is not what step=2\.ckpt\.sha256 says"):
        export(shards, "exported")
    Path(f"{shards}.sha256").unlink()  # of another tool
    with pytest.raises(UserError, match=r"step=2\.ckpt is not a valid folder of shards \(it names posix\.mkdir\)"):
        export(shards, "exported")
    with pytest.raises(RuntimeError, match=r"step=2\.ckpt is not a valid folder of shards \(it names posix\.mkdir\)"):
        resume()

    number = next(i for i in metadata.storage_data if "lr" in i.fqn)  # a number, which is pickled in a shard
    torch.save(Hostile(), shards / "hostile.distcp")
    metadata.storage_data[number].relative_path = "hostile.distcp"
    metadata.storage_data[number].offset = 0
    metadata.storage_data[number].length = (shards / "hostile.distcp").stat().st_size
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RuntimeError, match=r"folder of shards \(hostile\.distcp has a value that is not plain\)"):
        resume()
    assert not Path("executed").exists()
