"""Sharded and replicated runs in real process groups against the same run in one process."""

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import Weights, farthest, processes_of, run_in, train
from tiny import adamw, byte_tokenizer, fit, llama_config, sgd, write_pairs
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from lit_align import objectives
from lit_align.callbacks import FSDP2Strategy, FSDPSharding, ReferenceRefresh
from lit_align.cli import main
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig
from lit_align.sharding import fsdp_modules

REPOSITORY = Path(__file__).parents[2]
LORA = LoRAConfig(r=1, alpha=2)  # so small that a ring of past adapters is smaller than dense updates
RULES = {"soft": (0.7, 1), "small alpha": (0.05, 1), "hard": (1.0, 3), "by round": (1.0, 1, "round"), "none": None}


def run(
    folder: str,
    strategy: Any = "auto",
    objective: str = "DPO",
    lora: LoRAConfig | None = None,
    rule: tuple[Any, ...] | None = (0.6, 1),
    *callbacks: L.Callback,
    **options: Any,
) -> Weights:
    """Train on 16 pairs, 4 at a step whatever the number of processes; gives all weights in full."""
    options = {"optimizer": sgd(), "policy": PolicyConfig(folder, dtype="float32")} | options
    trainer = {key: options.pop(key) for key in ("max_epochs", "gradient_clip_val", "ckpt_path") if key in options}
    trainer["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    module = getattr(objectives, objective)(options.pop("policy"), lora=lora, **options)
    data = OfflinePairs(str(Path(folder, "pairs.jsonl")), batch_size=4 // processes_of(strategy), seed=1)
    refresh = [ReferenceRefresh(*rule)] if rule else []
    weights = train(module, data, *refresh, *callbacks, strategy=strategy, **trainer)
    if strategy not in ("auto", "ddp"):
        assert fsdp_modules(module.policy), "nothing was sharded"
        assert all(isinstance(weight, DTensor) for _, weight in module.policy.trainable_weights())
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untied and not evenly divisible model, so that shards are of different sizes; pairs beside it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    write_pairs(path, 16)
    return str(path)


def check(folder: str, strategy: str, *args: Any, bound: float = 1e-5, **options: Any) -> None:
    single = run(folder, "auto", *args, **options)
    first, second = run_in(2, lambda: run(folder, strategy, *args, **options))
    assert farthest(first, second) == 0, "the processes' weights have parted"
    assert farthest(single, first) < bound
    start = run(folder, "auto", *args, **options | {"optimizer": sgd(0.0)})
    assert farthest(single, start) > 30 * farthest(single, first), "nothing has moved, and so nothing was shown"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_and_refresh_as_one(folder, in_tmp, strategy, lora, rule):
    check(folder, strategy, "DPO", lora, RULES[rule])


@pytest.mark.parametrize("objective", ["IPO", "KTO", "SPPO", "EXO"])
def test_every_anchored_objective_is_refreshed_in_shards(folder, in_tmp, objective):
    options = {"hard_labels": True, "beta": 1.0} if objective == "SPPO" else {}
    check(folder, "fsdp2", objective, optimizer=sgd(0.002), bound=1e-4, **options)


@pytest.mark.parametrize("objective", ["MPO", "SimPO", "CPO", "ORPO", "RewardModel"])
def test_every_objective_without_an_anchor_is_sharded(folder, in_tmp, objective):
    options = {"beta": 0.0} if objective == "MPO" else {}
    check(folder, "fsdp2", objective, None, None, optimizer=sgd(0.01), **options)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("objective", ["DPO", "IPO", "KTO", "SPPO", "EXO"])
def test_the_whole_matrix(folder, in_tmp, objective, strategy, lora, rule):
    options = {"hard_labels": True, "beta": 1.0} if objective == "SPPO" else {}
    check(folder, strategy, objective, lora, RULES[rule], optimizer=sgd(0.002), bound=1e-4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": adamw(), "gradient_clip_val": 0.5, "bound": 1e-4},
        {"reference": ReferenceConfig(dtype="bfloat16"), "rule": (0.01, 1), "bound": 1e-2},
        {"lora": LORA, "reference": ReferenceConfig(form="copy")},
    ],
    ids=["AdamW and clipping", "bfloat16 reference with a float32 accumulator", "LoRA with a merged copy"],
)
def test_sharding_changes_nothing_else(folder, in_tmp, options):
    lora, rule = options.pop("lora", None), options.pop("rule", (0.6, 1))
    check(folder, "fsdp2", "DPO", lora, rule, **options)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_activation_checkpointing_changes_nothing(folder, in_tmp, lora):
    plan = FSDPSharding(activation_checkpointing=True)
    kept = run_in(2, lambda: run(folder, "fsdp2", "DPO", lora))[0]
    again = run_in(2, lambda: run(folder, "fsdp2", "DPO", lora, (0.6, 1), plan))[0]
    assert farthest(kept, again) < 1e-6


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_computing_in_bfloat16_keeps_float32_shards(folder, in_tmp, lora):
    plan = FSDPSharding(compute_dtype="bfloat16")
    single = run(folder, "auto", "DPO", lora)
    both = run_in(2, lambda: run(folder, "fsdp2", "DPO", lora, (0.6, 1), plan))[0]
    assert all(weight.dtype == torch.float32 for weight in both.values())
    assert 0 < farthest(single, both) < 0.05


# --- resume ---


# Full weights are mixed alike whatever alpha is; under LoRA a small one makes dense updates of the ring of adapters.
RESUMED = [(None, "soft"), (None, "hard"), (LORA, "soft"), (LORA, "small alpha"), (LORA, "hard")]


@pytest.mark.parametrize(
    ("lora", "rule"), RESUMED, ids=[f"{'LoRA' if lora else 'full'}-{rule}" for lora, rule in RESUMED]
)
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "fsdp2 in shards"])
def test_resumed_in_the_middle_the_run_ends_as_the_uninterrupted_one(folder, in_tmp, strategy, lora, rule):
    uninterrupted = in_processes(strategy, folder, lora, rule, keep=True)
    assert Path("ckpt/half.ckpt").is_dir() == ("in shards" in strategy)
    resumed = in_processes(strategy, folder, lora, rule, ckpt_path="ckpt/half.ckpt")
    assert farthest(uninterrupted, resumed) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2 in shards"])
def test_saving_a_checkpoint_leaves_the_run_alone(folder, in_tmp, strategy):
    saved = in_processes(strategy, folder, LORA, "soft", keep=True)
    assert farthest(saved, in_processes(strategy, folder, LORA, "soft")) == 0


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(("before", "after"), [("auto", "fsdp2"), ("fsdp2", "auto"), ("ddp", "fsdp2")])
def test_a_checkpoint_of_one_file_moves_between_one_process_and_shards(folder, in_tmp, before, after, lora):
    whole_run = in_processes("auto", folder, lora, "soft")
    in_processes(before, folder, lora, "soft", keep=True)
    resumed = in_processes(after, folder, lora, "soft", ckpt_path="ckpt/half.ckpt")
    assert farthest(whole_run, resumed) < 1e-4  # AdamW magnifies rounding


def test_a_checkpoint_in_shards_is_refused_where_there_are_none(folder, in_tmp, capsys):
    in_processes("fsdp2 in shards", folder, None, "soft", keep=True)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={REPOSITORY / 'configs/tr_dpo.yaml'}", "--ckpt_path=ckpt/half.ckpt"])
    assert "half.ckpt is a folder of shards" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["KTO", "IPO"])
def test_a_checkpoint_of_another_objective_is_refused(folder, in_tmp, objective):
    def go(objective: str, *callbacks: L.Callback, **options: Any) -> Any:
        return run(folder, "fsdp2", objective, LORA, (0.6, 1), *callbacks, **options)

    saving = ModelCheckpoint("ckpt", filename="last", every_n_train_steps=4, enable_version_counter=False)
    run_in(2, lambda: go("KTO", saving))
    if objective == "KTO":  # its z0 is a buffer of the module itself
        run_in(2, lambda: go("KTO", ckpt_path="ckpt/last.ckpt", max_epochs=2))
    else:
        with pytest.raises(RuntimeError, match="model: KTO → IPO"):
            run_in(2, lambda: go("IPO", ckpt_path="ckpt/last.ckpt", max_epochs=2))


def in_processes(
    strategy: str, folder: str, lora: LoRAConfig | None, rule: str, *, keep: bool = False, ckpt_path: str | None = None
) -> Weights:
    """Two epochs of four steps, with a checkpoint after the fifth step or resumed from it."""

    def go() -> Weights:
        kind: Any = FSDP2Strategy(save_distributed_checkpoint=True) if "in shards" in strategy else strategy
        saving = ModelCheckpoint("ckpt", filename="half", every_n_train_steps=5, enable_version_counter=False)
        callbacks = [*([FSDPSharding()] if "in shards" in strategy else []), *([saving] if keep else [])]
        options = {"optimizer": adamw(), "ckpt_path": ckpt_path, "max_epochs": 2}
        return run(folder, kind, "DPO", lora, RULES[rule], *callbacks, **options)

    return go() if strategy == "auto" else run_in(2, go)[0]


@pytest.mark.slow
def test_no_process_copies_the_whole_model_to_be_sharded(tmp_path, in_tmp):
    """Counts memory that the kernel cannot drop: unchanged weights are pages of their file until they are sharded."""
    shape: Any = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    LlamaForCausalLM(llama_config(**shape)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    write_pairs(tmp_path, 4)
    whole = (tmp_path / "model.safetensors").stat().st_size

    def measure() -> list[int]:
        measured = [anonymous_memory()]

        class Measured(FSDPSharding):
            def shard(self, pl_module: L.LightningModule) -> None:
                measured.append(anonymous_memory())
                super().shard(pl_module)
                measured.append(anonymous_memory())

        module = objectives.DPO(PolicyConfig(str(tmp_path), dtype="float32"), optimizer=sgd())
        data = OfflinePairs(str(tmp_path / "pairs.jsonl"), batch_size=1)
        fit(module, data, Measured(), strategy="fsdp2", devices=2, max_steps=1)
        return measured

    for before, built, sharded in run_in(2, measure):
        assert built - before < whole / 4, "a process has a copy of the whole model"
        assert sharded - before < 2 * whole / 2 + whole / 4, "more than its share of policy and reference"


def anonymous_memory() -> int:
    """Memory of this process that no file backs, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# --- modules of other people ---


class Foreign(L.LightningModule):
    """A policy that learns to give 1, and a reference that follows; nothing of lit_align's in it."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.policy = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = torch.linspace(0, 1, 12, device=self.device).view(4, 3) + batch_idx
        return (self.policy(x) - self.reference(x) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.policy.parameters(), lr=0.1)


def test_a_foreign_module_is_sharded_and_refreshed_by_the_two_callbacks(in_tmp):
    def run(strategy: str, *callbacks: L.Callback) -> Weights:
        return train(Foreign(), range(6), ReferenceRefresh(0.3), *callbacks, strategy=strategy)

    single = run("auto")
    both = run_in(2, run, "fsdp2", FSDPSharding(blocks=["Linear"]))
    assert farthest(single, both[0]) < 1e-6
    assert farthest(both[0], both[1]) == 0


# --- what cannot work ---


def test_it_refuses_options_that_cannot_work(in_tmp):
    class Early(Foreign):
        def __init__(self) -> None:
            super().__init__()
            Foreign.configure_model(self)

        configure_model = L.LightningModule.configure_model

    def attempt(module: L.LightningModule, plan: FSDPSharding, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            fit(module, range(2), plan, **{"strategy": "fsdp2", "devices": 2} | options)
        return str(error.value)

    tensor_parallel = L.pytorch.strategies.ModelParallelStrategy()
    for module, plan, options, message in (
        (Foreign(), FSDPSharding(), {"strategy": "ddp"}, "trainer.strategy=DDPStrategy must be fsdp2"),
        (Early(), FSDPSharding(), {}, "Early builds its networks in __init__"),
        (Foreign(), FSDPSharding(), {"strategy": tensor_parallel}, "puts all 2 processes on the tensor-parallel axis"),
        (Foreign(), FSDPSharding(), {"precision": "bf16-true"}, "precision=bf16-true rounds rotary frequencies"),
        (Foreign(), FSDPSharding(cpu_offload=True), {}, "cpu_offload=true has no effect on CPUs"),
        (
            Foreign(),
            FSDPSharding(blocks=["Block"]),
            {},
            "none of them. Take some of ['Linear', 'Sequential', 'Tanh']",
        ),
    ):
        assert message in run_in(2, lambda m=module, p=plan, o=options: attempt(m, p, **o))[0]


def test_blocks_without_a_class_are_refused():
    with pytest.raises(UserError, match=r"fsdp_sharding\.blocks=\[\] must name classes"):
        FSDPSharding(blocks=[])


def test_another_objective_and_optimizer_are_accepted_on_shards(folder, in_tmp, capfd):
    """One file, which the strategy loads: KTO has a buffer that DPO lacks, and SGD has no state."""
    save = ModelCheckpoint(in_tmp, filename="end")
    run_in(2, lambda: run(folder, "fsdp2", "DPO", None, None, save, optimizer=adamw()))

    def resume(*accepted: str) -> None:
        options = {"accept_changes": accepted, "ckpt_path": "end.ckpt", "max_epochs": 2}
        run_in(2, lambda: run(folder, "fsdp2", "KTO", None, None, **options) and None)

    with pytest.raises(RuntimeError, match=r"model\.optimizer: AdamW → SGD") as error:
        resume()
    listed = re.findall(r"accept_changes=\[(.*)\]", str(error.value))
    resume(*listed[0].split(","))
    said = capfd.readouterr().out
    assert said.count("SGD starts without the state of the checkpoint's optimizer") == 1
    assert said.count("z0 of the new objective begins as at the start of a run") == 1
