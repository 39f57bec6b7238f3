"""The study's figures, as SVG; the same results give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.papers.cells import SEEDS
from studies.papers.comparison import Array, Frontier, MeanTest, bootstrap_interval
from studies.papers.hypotheses import CLAIMS, MPO_PAIRS, SECONDARY, Study

matplotlib.use("agg")
INK, PALE = "#2b2b2b", "#9aa0a6"
COLOURS = ("#2b2b2b", "#2f6db5", "#e08a1e", "#2a9d74", "#8a5cb5")
PANELS = {
    "iteration": ("offline_dpo", "iterative_dpo", "pr_dpo_1", "pr_dpo_4", "moving_dpo"),
    "moving reference": ("offline_dpo", "soft_dpo", "hard_dpo"),
    "MPO and SFT": ("offline_dpo", "offline_ipo", "mpo", "sft_best"),
}
HUMPS = ("offline_dpo", "iterative_dpo", "pr_dpo_4")


def draw(study: Study, folder: Path) -> None:
    """Draw the figures for which there are results."""
    with plt.rc_context({"svg.hashsalt": "lit_align", "axes.titlelocation": "left", "font.size": 9}):
        for name, figure in {
            "frontiers": frontiers(study),
            "forest": forest(study),
            "proxies": proxies(study),
            "forgetting": forgetting(study),
        }.items():
            for axis in figure.axes:
                axis.spines[["top", "right"]].set_visible(False)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def frontiers(study: Study) -> Figure:
    """Gold win rate against √KL, the mean over seeds with a band."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.6), sharey=True)
    for axis, (title, arms) in zip(axes, PANELS.items(), strict=True):
        axis.axhline(50, color=PALE, lw=1, ls=(0, (4, 3)), zorder=0)
        for arm, colour in zip(arms, COLOURS, strict=False):
            _curve(axis, _runs(study, "wins", arm), colour, arm, scale=100)
        axis.set(title=title, xlabel="√KL from the start (nats)")
        _legend(axis)
    axes[0].set_ylabel("gold win rate against the start (%)")
    return figure


def proxies(study: Study) -> Figure:
    """Gold and proxy reward against √KL, with the proxy of many and of few pairs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, suffix, title in zip(axes, ("", "_small"), ("large proxy", "small proxy"), strict=True):
        for arm, colour in zip(HUMPS, COLOURS, strict=False):
            _curve(axis, _runs(study, "gold", arm + suffix), colour, f"{arm}: gold")
            _curve(axis, _runs(study, "proxy", arm + suffix), colour, f"{arm}: proxy", line="--")
        axis.set(title=title, xlabel="√KL from the start (nats)", ylabel="reward (each judge's own scale)")
        _legend(axis)
    return figure


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7)


def _runs(study: Study, value: str, arm: str) -> list[Frontier]:
    return [run for seed in SEEDS if (run := study.frontiers[value].get((arm, seed)))]


def _curve(axis: Axes, runs: Sequence[Frontier], colour: str, label: str, line: str = "-", scale: float = 1.0) -> None:
    """Mean over seeds where all runs reach a KL; the band is a two-level bootstrap."""
    if not runs:
        return
    kls = np.linspace(0, np.sqrt(min(run.reach for run in runs)), 25) ** 2
    values: list[Array] = [scale * np.array([run.at(kl) for run in runs]) for kl in kls]  # [S, P] at each KL
    axis.plot(
        np.sqrt(kls), [each.mean() for each in values], line, color=colour, lw=1.6, label=f"{label} ({len(runs)})"
    )
    if len(runs) > 1:
        low, high = zip(*(bootstrap_interval(each, 500) for each in values), strict=True)
        axis.fill_between(np.sqrt(kls), low, high, color=colour, alpha=0.12, lw=0)


def forest(study: Study) -> Figure:
    """Differences in gold win rate at equal KL, with 95 % intervals: the claims, then the other comparisons."""
    lines = [(f"{name}: {claim}", pairs) for name, (claim, pairs) in CLAIMS.items()]
    lines += [(f"{a} − {b}", [(a, b)]) for a, b in SECONDARY]
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(lines) + 1))
    axis.axvline(0, color=PALE, lw=1)
    for place, (_, pairs) in enumerate(lines):
        differences, _ = study.differences(pairs)
        if len(differences) > 1:
            test = MeanTest.of(differences)
            primary = place < len(CLAIMS)
            colour = COLOURS[1] if primary else INK
            axis.plot([100 * test.low, 100 * test.high], [place, place], color=colour, lw=2.2 if primary else 1.2)
            axis.plot(100 * test.mean, place, "o", color=colour, ms=5 if primary else 3.5)
    axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=7)
    axis.invert_yaxis()
    axis.set(title="Gold win rate at equal KL: A − B", xlabel="percentage points, 95 % interval")
    return figure


def forgetting(study: Study) -> Figure:
    """NLL of held-out texts against the gold win rate, one point per run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    arms = dict.fromkeys(name for pair in MPO_PAIRS for name in pair)
    for axis, (text, title) in zip(axes, {"news": "editorials", "tweets": "tweets"}.items(), strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            keys = [(arm, seed) for seed in SEEDS if (arm, seed) in study.frontiers["wins"]]
            changes = [study.forgetting(text, *key) for key in keys]
            rates = [100 * float(study.frontiers["wins"][key].values[-1].mean()) for key in keys]
            if keys:
                axis.plot(rates, changes, "o", color=colour, ms=3.5, alpha=0.5)
                axis.plot(fmean(rates), fmean(changes), "o", color=colour, ms=7, label=arm)
        axis.axhline(0, color=PALE, lw=1, ls=(0, (4, 3)), zorder=0)
        axis.set(title=title, xlabel="gold win rate at the end (%)", ylabel="change of NLL per token")
        _legend(axis)
    return figure
