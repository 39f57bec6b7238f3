"""Trajectories of every objective on a fixed problem, to show that a change of the code does not change the numbers.

    python tests/golden/make.py        writes trajectories.json beside this file

Each case trains a tiny float64 model for 12 steps (3 epochs of 4 batches) at a constant learning rate, without
accumulation. The model has learned positions and LayerNorm, so that no part of it computes in float32. Kept are the
loss of each step, and at the end the gradient's norm, the weights' norm, the reference's form and log-probabilities,
and the logged training metrics. Write the file again only where a change is meant to move the numbers, and say so.
"""

# ruff: noqa: E402  # the imports need the path

import functools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import lightning as L
import torch
from lightning.pytorch import Callback
from tiny import byte_tokenizer
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from lit_align.callbacks import ReferenceRefresh
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import CPO, DPO, EXO, IPO, KTO, MPO, ORPO, SFT, SPPO, RewardModel, SimPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig

FILE = Path(__file__).parent / "trajectories.json"
EPOCHS, BATCHES = 3, 4
B, P, R = 3, 5, 6


class Case(NamedTuple):
    make: Callable[..., Any]
    options: dict[str, Any] = {}  # noqa: RUF012  # read, never written
    K: int = 2
    refresh: dict[str, Any] | None = None
    lora: bool = False
    rank: int = 2
    width: int = 8
    texts: bool = False


REFRESHES: dict[str, dict[str, Any] | None] = {
    "fixed": None,
    "soft": {"alpha": 0.3, "tau": 1},
    "hard": {"alpha": 1.0, "tau": 3},
}
ANCHORED: dict[str, Case] = {
    "DPO": Case(DPO, {"label_smoothing": 0.1}),
    "DPO robust": Case(DPO, {"label_smoothing": 0.1, "robust": True}),
    "DPO per token": Case(DPO, {"beta": 0.5, "length_normalize": True}),
    "DPO rewards": Case(DPO, {"reward_temperature": 0.7}, K=4),
    "IPO": Case(IPO, {"beta": 0.3}),
    "IPO per token": Case(IPO, {"beta": 0.3, "length_normalize": True}),
    "KTO": Case(KTO, {"desirable_weight": 1.2}, K=3),
    "KTO single": Case(KTO, {}, K=2),
    "SPPO": Case(SPPO, {"beta": 0.2}, K=4),
    "SPPO hard labels": Case(SPPO, {"beta": 0.2, "hard_labels": True}),
    "SPPO baseline": Case(SPPO, {"beta": 0.2, "estimate_baseline": True}, K=4),
    "EXO": Case(EXO, {"label_smoothing": 0.05}),
    "EXO rewards": Case(EXO, {"reward_temperature": 0.7}, K=4),
}
UNANCHORED: dict[str, Case] = {
    "MPO": Case(MPO, {"beta": 0.0}),
    "MPO log, with texts": Case(MPO, {"log_form": True, "length_normalize": True, "beta": 0.2}, texts=True),
    "SimPO": Case(SimPO),
    "CPO": Case(CPO, {"alpha": 0.5}),
    "CPO per token": Case(CPO, {"length_normalize": True}),
    "ORPO": Case(ORPO, {"beta": 0.2}),
    "SFT": Case(SFT, {}, K=1),
    "RewardModel": Case(RewardModel, {"margin": 0.3}),
    "RewardModel rewards": Case(RewardModel, {"margin": "rewards"}),
}


def cases() -> Iterator[tuple[str, Case]]:
    for lora in (False, True):
        weights = "LoRA" if lora else "full"
        for name, case in UNANCHORED.items():
            yield f"{name}, {weights}", case._replace(lora=lora)
        for refresh, rule in REFRESHES.items():
            for name, case in ANCHORED.items():
                yield f"{name}, {weights}, {refresh}", case._replace(lora=lora, refresh=rule)
                if name in ("DPO", "IPO", "KTO", "SPPO baseline", "EXO rewards") and refresh != "hard":
                    proximal = case.options | {"proximal": 0.15}
                    proximal_case = case._replace(lora=lora, refresh=rule, options=proximal)
                    yield f"PR-{name}, {weights}, {refresh}", proximal_case
        large = {"alpha": 0.9, "tau": 1}
        yield f"DPO, {weights}, large alpha", ANCHORED["DPO"]._replace(lora=lora, refresh=large)
        rounds = {"alpha": 1.0, "tau": 1, "unit": "round"}
        yield f"SPPO, {weights}, each round", ANCHORED["SPPO"]._replace(lora=lora, refresh=rounds)
    # eight past adapters, which need less memory than the dense updates of a wider model
    yield "DPO, LoRA, ring", ANCHORED["DPO"]._replace(lora=True, rank=1, width=32, refresh={"alpha": 0.9, "tau": 1})


def write_model(folder: Path, seed: int, width: int) -> str:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=259, hidden_size=width, ffn_dim=2 * width, word_embed_proj_dim=width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, init_std=0.3, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).double().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@functools.cache
def models(width: int) -> tuple[str, str]:
    """Folders of the policy's start and of another model, the reference of proximal forms."""
    folder = Path(tempfile.mkdtemp())
    return write_model(folder / "start", 0, width), write_model(folder / "other", 1, width)


def batches(case: Case, proximal: bool, count: int = BATCHES) -> list[PreferenceBatch]:
    """Random tokens; with random log π_s where the loss reads it and need not equal the policy's start."""
    random = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(1, 259, shape, generator=random)

    def mask(longest: int, *shape: int) -> torch.Tensor:
        lengths = torch.randint(2, longest + 1, shape, generator=random)
        return torch.arange(longest) < lengths[..., None]

    made, kto = [], case.make is KTO
    for number in range(count):
        K = case.K
        labels = uniform(B).clamp(0.2, 0.9)
        made.append(
            PreferenceBatch(
                prompt_ids=tokens(B, P),
                prompt_mask=mask(P, B),
                response_ids=tokens(B, K, R),
                response_mask=mask(R, B, K),
                index=torch.arange(B) + B * number,
                sampler_logps=-20 - 10 * uniform(B, K) if proximal else None,
                rewards=2 * uniform(B, K) - 1,
                labels=(uniform(B, K - 1) > 0.5).double() if kto else labels,
                win_probabilities=uniform(B, K),
                mismatched=kto,
            )
        )
    return made


class Record(Callback):
    """Keeps each loss, and the norm of the last gradient."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient = 0.0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        self.gradient = norm(grads)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


def norm(tensors: list[torch.Tensor]) -> float:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().item()


def trajectory(case: Case, accelerator: str = "cpu") -> dict[str, Any]:
    """Train one case and give what is compared."""
    start, other = models(case.width)  # before the seed: making them draws numbers
    L.seed_everything(1, verbose=False)
    options = dict(case.options)
    proximal = bool(options.get("proximal")) or options.get("estimate_baseline", False)
    if proximal:  # of another reference the step-0 check asks nothing
        options["reference"] = ReferenceConfig(path=other)
    module = case.make(
        PolicyConfig(start, dtype="float64"),
        lora=LoRAConfig(r=case.rank, alpha=4) if case.lora else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2 if case.lora else 3e-3),
        schedule="constant",
        **options,
    )
    data = batches(case, proximal)
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    if case.texts:
        loader = {"preferences": loader, "sft": DataLoader(batches(case._replace(K=1), False), batch_size=None)}  # type: ignore[arg-type]
    record = Record()
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, max_epochs=EPOCHS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[record, *([ReferenceRefresh(**case.refresh)] if case.refresh else [])],
    )  # fmt: skip
    trainer.fit(module, loader)
    done: dict[str, Any] = {
        "losses": record.losses,
        "gradient": record.gradient,
        "weights": norm([weight.detach() for _, weight in module.policy.trainable_weights()]),
        "metrics": {
            name.removeprefix("train/"): float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("train/")
        },
    }
    reference = getattr(module, "reference", None)
    if reference is not None:
        done["form"] = str(reference)
        batch = module.transfer_batch_to_device(data[0], module.device, 0)
        done["reference"] = reference.logps(batch).double().sum().item()
    return done


def rounded(value: Any) -> Any:
    """12 digits say more than the comparison reads."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return {name: rounded(each) for name, each in value.items()}


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    quiet()
    lines = [f"{json.dumps(name)}: {json.dumps(rounded(trajectory(case)))}" for name, case in cases()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FILE}: {len(lines)} trajectories, {FILE.stat().st_size / 1000:.0f} KB")
