"""The study's results as frontiers, and the tests of its hypotheses (`protocol.md`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

import numpy as np

from studies.papers.cells import FIRST_SEEDS, SEEDS, Arm, counted_cells
from studies.papers.comparison import Array, Frontier, MeanTest, at_equal_kl, bootstrap_interval, p_above
from studies.papers.results import Result, read_rows

MARGIN = 0.05  # of H6, and the difference that the study should detect
VALUES = ("wins", "gold", "proxy")

Pair = tuple[str, str]
CLAIMS: dict[str, tuple[str, list[Pair]]] = {
    "H1": ("iterating beats offline pairs", [("iterative_dpo", "offline_dpo")]),
    "H2": ("staying near the sampler improves on iterating", [("pr_dpo_1", "iterative_dpo")]),
    "H3": ("… for other objectives", [(f"pr_{loss}", f"iterative_{loss}") for loss in ("ipo", "sppo", "exo")]),
    "H4": ("a soft moving reference beats a fixed one", [(f"soft_{x}", f"offline_{x}") for x in ("dpo", "ipo", "kto")]),
    "H5": ("a hard moving reference beats a fixed one", [(f"hard_{x}", f"offline_{x}") for x in ("dpo", "ipo", "kto")]),
}
"""The hypotheses on gold win rate at equal KL; H6 has two quantities (`forgets_less`)."""
MPO_PAIRS: list[Pair] = [("mpo", "offline_dpo"), ("mpo", "offline_ipo")]
SECONDARY: list[Pair] = [
    ("pr_dpo_4", "iterative_dpo"),
    ("moving_dpo", "iterative_dpo"),
    *(pair for name in ("H3", "H4", "H5") for pair in CLAIMS[name][1]),
    *MPO_PAIRS,
    ("sft_best", "offline_dpo"),
    ("iterative_dpo_small", "offline_dpo_small"),
    ("pr_dpo_4_small", "iterative_dpo_small"),
]


@dataclass(frozen=True)
class Study:
    """The results in a folder."""

    folder: Path
    arms: Mapping[str, Arm]

    @cached_property
    def counted(self) -> dict[tuple[str, int], Result]:
        """The counted results, by arm and seed."""
        found = {}
        for cell in counted_cells(self.arms, len(SEEDS)):
            if result := Result.read(self.folder, cell.name):
                found[cell.arm.name, cell.seed] = result
        return found

    @cached_property
    def frontiers(self) -> dict[str, dict[tuple[str, int], Frontier]]:
        """The frontiers of the counted runs that did not fail, by value, then by arm and seed."""
        found: dict[str, dict[tuple[str, int], Frontier]] = {value: {} for value in VALUES}
        for (arm, seed), result in self.counted.items():
            if result.failed:
                continue
            rows = read_rows(self.folder, f"{arm}-{seed}").to_pandas()
            rows["wins"] = (rows.gold > rows.gold_start) + 0.5 * (rows.gold == rows.gold_start)
            steps = [frame.sort_values("prompt") for _, frame in rows.groupby("step")]
            kl = np.array([0.0, *(max(0.0, float(step.log_ratio.mean())) for step in steps)])
            prompts = len(steps[0])
            starts = {"wins": np.full(prompts, 0.5), "gold": steps[0].gold_start, "proxy": steps[0].proxy_start}
            for value in VALUES:
                by_step = [starts[value], *(step[value] for step in steps)]
                found[value][arm, seed] = Frontier(kl, np.array([np.asarray(each, float) for each in by_step]))
        return found

    def seeds_of(self, pairs: Iterable[Pair]) -> list[int]:
        """The seeds for which all arms of the pairs have a result."""
        names = {name for pair in pairs for name in pair}
        return [seed for seed in SEEDS if all((name, seed) in self.counted for name in names)]

    def complete(self, seeds: int) -> bool:
        return all((cell.arm.name, cell.seed) in self.counted for cell in counted_cells(self.arms, seeds))

    def differences(self, pairs: Sequence[Pair], share: float = 1.0) -> tuple[Array, list[float]]:
        """Gold wins at equal KL, A − B, the mean over pairs, [S, P]; and the KLs, by seed and pair.

        Args:
            share: Of the greatest KL that both runs reach.
        """
        runs, rows, kls = self.frontiers["wins"], [], []
        for seed in self.seeds_of(pairs):
            found = [_difference(runs.get((a, seed)), runs.get((b, seed)), share) for a, b in pairs]
            present = [each for each, _ in found if each is not None]
            prompts = len(present[0]) if present else 1
            rows.append(np.mean([np.zeros(prompts) if each is None else each for each, _ in found], axis=0))
            kls += [kl for _, kl in found]
        return np.array(rows), kls

    def head_to_head(self, a: str, b: str) -> list[float]:
        """The gold win rate of A's responses against B's at the end of each seed's runs, at each one's own KL."""
        gold = self.frontiers["gold"]
        both = [(gold[a, seed], gold[b, seed]) for seed in SEEDS if (a, seed) in gold and (b, seed) in gold]
        return [float(((x.values[-1] > y.values[-1]) + 0.5 * (x.values[-1] == y.values[-1])).mean()) for x, y in both]

    def forgetting(self, text: str, arm: str, seed: int) -> float:
        """The change of the negative log-likelihood per token; 0 for a run that failed, which keeps the start."""
        change = self.counted[arm, seed].forgetting.get(text)
        return change["end"] - change["start"] if change else 0.0


def _difference(a: Frontier | None, b: Frontier | None, share: float) -> tuple[Array | None, float]:
    return at_equal_kl(a, b, share) if a or b else (None, 0.0)


@dataclass(frozen=True)
class Finding:
    """A hypothesis with its test.

    Args:
        at_half: The mean difference at half the KL, where both runs are interpolated.
        kl: Mean over seeds and pairs.
        p: Not corrected; not to be shown while the study is open.
    """

    name: str
    claim: str
    test: MeanTest
    bootstrap: tuple[float, float]
    at_half: float
    kl: float
    p: float


def findings(study: Study) -> list[Finding]:
    """H1 to H5 on the seeds that are complete for them, at least two."""
    found = []
    for name, (claim, pairs) in CLAIMS.items():
        differences, kls = study.differences(pairs)
        if len(differences) > 1:
            test = MeanTest.of(differences)
            at_half = float(study.differences(pairs, 0.5)[0].mean())
            found.append(Finding(name, claim, test, bootstrap_interval(differences), at_half, fmean(kls), test.p))
    return found


@dataclass(frozen=True)
class MpoFinding:
    """H6: forgetting below 0, and gold win rate above −MARGIN."""

    forgetting: MeanTest
    quality: MeanTest
    p: float
    contradicted: float


def forgets_less(study: Study) -> MpoFinding | None:
    seeds = study.seeds_of(MPO_PAIRS)
    if len(seeds) < 2:
        return None
    changes = [
        fmean(study.forgetting("news", a, seed) - study.forgetting("news", b, seed) for a, b in MPO_PAIRS)
        for seed in seeds
    ]
    less = MeanTest.of(-np.array(changes)[:, None])
    quality = MeanTest.of(study.differences(MPO_PAIRS)[0])
    p = min(1.0, 2 * max(p_above(less, 0.0), p_above(quality, -MARGIN)))
    return MpoFinding(less, quality, p, less.p if less.mean < 0 else 1.0)


def planned_seeds(study: Study) -> int | None:
    """The seeds of the whole study; None before the first seeds are complete."""
    if not study.complete(FIRST_SEEDS):
        return None
    detectable = [MeanTest.of(study.differences(pairs)[0][:FIRST_SEEDS]).detectable for _, pairs in CLAIMS.values()]
    return len(SEEDS) if median(detectable) > MARGIN else FIRST_SEEDS


def is_closed(study: Study) -> bool:
    planned = planned_seeds(study)
    return planned is not None and study.complete(planned)


def verdict(p: float, mean: float) -> str:
    if p >= 0.05:
        return "not shown"
    return "supported" if mean > 0 else "contradicted"
