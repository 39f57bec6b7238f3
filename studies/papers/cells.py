"""The cells of the study: which arm runs with which options and seed, and the choice among tuning cells."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
WORK = "runs/study"

TUNING_SEED = 101
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
FIRST_SEEDS = 5  # the others run only if the rule of protocol.md asks for them
TRIALS = 4  # configurations of each tuned arm
LEARNING_RATES = (1e-4, 6e-4)
BETAS = (0.02, 0.2)
KL_CAP = 10.0  # nats per response
EVALUATED_EVERY = 17  # steps; with the verdict at the end, two points of each run's frontier


@dataclass(frozen=True)
class Setting:
    """The two options that are tuned."""

    lr: float
    beta: float


@cache
def settings() -> tuple[Setting, ...]:
    """The same configurations for every arm: a Latin hypercube on logarithmic scales, drawn once."""
    generator = random.Random(20)
    columns = []
    for low, high in (LEARNING_RATES, BETAS):
        places = [(k + generator.random()) / TRIALS for k in range(TRIALS)]
        generator.shuffle(places)
        columns.append([float(f"{low * (high / low) ** place:.2g}") for place in places])
    return tuple(Setting(lr, beta) for lr, beta in zip(*columns, strict=True))


@dataclass(frozen=True)
class Arm:
    """A method with its options.

    Args:
        data: rounds (sampled from the policy) or pairs (sampled from the start).
        config: Options beyond those of base.yaml.
        proximal: λ/β.
        beta: Whether the objective has a β.
        gamma: Whether it has a γ, which is then β.
        tuned_as: The arm whose learning rate and β it takes; None tunes its own.
        small_proxy: Whether the proxy that learned from few pairs scores its responses.
    """

    name: str
    data: str
    config: Mapping[str, Any]
    proximal: float = 0.0
    beta: bool = True
    gamma: bool = False
    tuned_as: str | None = None
    small_proxy: bool = False


def read_arms(path: Path = HERE / "arms.yaml") -> dict[str, Arm]:
    return {name: Arm(name, **options) for name, options in yaml.safe_load(path.read_text()).items()}


@dataclass(frozen=True)
class Cell:
    """One run: a counted one, or, with a trial, a tuning run."""

    arm: Arm
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}" if self.trial is None else f"tuning-{self.arm.name}-{self.trial}"

    @property
    def prompts(self) -> str:
        """Held-out prompts: the test prompts are for counted cells only."""
        return f"{WORK}/data/{'test' if self.trial is None else 'validation'}.jsonl"

    @property
    def pairs(self) -> str | None:
        """The file of offline pairs."""
        return None if self.arm.data == "rounds" else f"{WORK}/samples/seed{self.seed}/{self.proxy}.jsonl"

    @property
    def store(self) -> str:
        """Folder of the rounds of all cells of a seed: the arms have the same first round, which is sampled once."""
        return f"{WORK}/samples/seed{self.seed}/rounds"

    @property
    def proxy(self) -> str:
        return "proxy_small" if self.arm.small_proxy else "proxy_large"


def tuning_cells(arms: Mapping[str, Arm]) -> list[Cell]:
    tuned = [arm for arm in arms.values() if arm.tuned_as is None]
    return [Cell(arm, TUNING_SEED, trial) for trial in range(TRIALS) for arm in tuned]


def counted_cells(arms: Mapping[str, Arm], seeds: int = FIRST_SEEDS) -> list[Cell]:
    """Seed by seed, so that all pairs of a seed are complete early."""
    return [Cell(arm, seed) for seed in SEEDS[:seeds] for arm in arms.values()]


# --- the configuration of a cell ---


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options, the later ones over the earlier ones."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def configuration(cell: Cell, setting: Setting, folder: str) -> dict[str, Any]:
    """All options of a cell, as `train.py fit` reads them."""
    files = [yaml.safe_load((HERE / f"{name}.yaml").read_text()) for name in ("base", cell.arm.data)]
    return merged(*files, cell.arm.config, *_own_options(cell, setting), {"trainer": {"default_root_dir": folder}})


def _own_options(cell: Cell, setting: Setting) -> Iterator[dict[str, Any]]:
    arm = cell.arm
    model: dict[str, Any] = {"optimizer": {"init_args": {"lr": setting.lr}}}
    model |= {"beta": setting.beta} if arm.beta else {}
    model |= {"proximal": arm.proximal * setting.beta} if arm.proximal else {}
    model |= {"gamma": setting.beta} if arm.gamma else {}
    yield {"seed_everything": cell.seed, "model": {"init_args": model}}
    scorer = {"init_args": {"model": f"{WORK}/{cell.proxy}/model"}}
    yield {"data": {"init_args": {"train": cell.pairs} if cell.pairs else {"scorer": scorer, "store": cell.store}}}
    yield {"win_rate": {"prompts": cell.prompts, "seed": cell.seed, "scorer": scorer}}
    if cell.trial is None:
        forgetting = {name: f"{WORK}/data/{name}_held_out.jsonl" for name in ("news", "tweets")}
        frontier = {"validation": cell.prompts, "unit": "step", "every": EVALUATED_EVERY}
        yield {"win_rate": frontier | {"forgetting": forgetting}}


# --- the choice among the tuning cells ---


@dataclass(frozen=True)
class Trial:
    """The end of a tuning cell on the validation prompts; without values if it failed."""

    gold: float = field(default=-math.inf)
    kl: float = field(default=math.inf)


def choose(trials: Sequence[Trial]) -> int:
    """The trial of the highest gold reward within the KL cap; if none is within it, the one of the lowest KL."""
    within = [place for place, trial in enumerate(trials) if trial.kl <= KL_CAP]
    if within:
        return max(within, key=lambda place: trials[place].gold)
    return min(range(len(trials)), key=lambda place: trials[place].kl)
