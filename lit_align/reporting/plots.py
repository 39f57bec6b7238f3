"""The plots of a report. Each plot is a function that draws on axes and returns whether the run has data for it.

Figures are made without pyplot, whose backend, such as a notebook's, stays as it is.
"""

import base64
import html
import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_align.evaluation.summary import TRAINING
from lit_align.files import writing
from lit_align.metrics.win_rate import rate_interval
from lit_align.reporting.page import plain
from lit_align.reporting.paired import SharedScorer, scorers_of
from lit_align.reporting.run_folder import Run, metric_of

LINES = {
    "loss": ("loss", ["train/loss", "val/loss"]),
    "margin": ("reward margin", ["train/reward_margin", "val/reward_margin"]),
    "accuracy": ("reward accuracy", ["train/reward_accuracy", "val/reward_accuracy"]),
    "log_ratio": ("log ratio to the anchor (nats)", ["train/log_ratio_chosen", "train/log_ratio_rejected"]),
    "reward": ("reward of fresh responses", ["round/reward", "val/reward"]),
    "drift": (
        "drift: KL in nats per response",
        [
            "drift/kl_policy_start",
            "drift/kl_policy_reference",
            "drift/kl_reference_start",
            "drift/kl_policy_sampler",
            "val/kl_from_start",
        ],
    ),
    "diversity": ("diversity of held-out responses", ["val/distinct_2", "val/self_bleu"]),
}
"""File name → title and metrics of the plots that are lines over optimizer steps."""

CAPTIONS = {
    "loss": "The objective's loss. train: each logged step; val: validation pairs.",
    "margin": "Implicit reward of the chosen minus that of the rejected response.",
    "accuracy": "Share of pairs whose chosen response has the higher implicit reward.",
    "log_ratio": "log π(y|x) − log anchor(y|x) of chosen and rejected responses. The pairs were selected, so this is "
    "not a KL.",
    "reward": "Mean reward of unselected responses. round: to the training prompts, sampled as each round begins. "
    "val: to the held-out prompts; at step 0, of the start.",
    "drift": "How far policy, reference and start are apart. Estimates from few prompts can be below 0. "
    "Where responses are sampled at another temperature than 1, or with top_p or top_k, these are means of log-ratios "
    "over such responses, not a KL.",
    "diversity": "distinct_2: different pairs of words / all. self_bleu: near 1, the responses repeat each other.",
    "frontier": "Reward gained against distance from the start. Numbers count the validations, 0 is the start; the "
    "diamond is the verdict on the test prompts. Crosses: the best of n of the start's responses to them, without "
    "training.",
    "win_rate": "Share of comparisons with the start's responses that the policy wins, on the validation prompts. "
    "Above 50 %, the policy is better.",
    "seconds": "Wall-clock time of each round by phase.",
    "lengths": "Tokens of the responses to the test prompts. A peak at the longest length shows truncated responses.",
}
"""Plot → what it shows, as a sentence below it."""

Draw = Callable[[Axes], bool]


def draws_of(run: Run) -> dict[str, Draw]:
    """How to draw each plot of a run, by its name."""
    draws: dict[str, Draw] = {
        name: partial(_draw_lines, run=run, title=title, metrics=metrics) for name, (title, metrics) in LINES.items()
    }
    scorers = scorers_of([run]) or [SharedScorer(TRAINING, "", {run.name: TRAINING})]
    draws["frontier"] = partial(_draw_frontier, runs=[run], scorer=scorers[0])
    draws["win_rate"] = partial(_draw_win_rate, runs=[run], scorers=scorers)
    draws["seconds"] = partial(_draw_seconds, run=run)
    draws["lengths"] = partial(_draw_lengths, run=run)
    return draws


def run_plots(run: Run) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each plot that the run has data for."""
    for name, draw in draws_of(run).items():
        if (figure := _figure(draw)) is not None:
            yield name, figure


def comparison_plots(
    runs: Sequence[Run], scorers: Sequence[SharedScorer]
) -> Iterator[tuple[str, SharedScorer, Figure]]:
    """Name, scorer and figure of each plot of several runs: frontier and win rate by each scorer."""
    for scorer in scorers:
        draws: dict[str, Draw] = {"frontier": partial(_draw_frontier, runs=runs, scorer=scorer)}
        draws["win_rate"] = partial(_draw_win_rate, runs=runs, scorers=[scorer])
        for name, draw in draws.items():
            if (figure := _figure(draw)) is not None:
                yield name, scorer, figure


def plot_curves(folder: str | Path) -> Path | None:
    """Draw all plots of a run into `curves.png`; None if nothing was logged."""
    run, figure = Run(Path(folder), Path(folder).name), Figure()
    for draw in draws_of(run).values():
        axis = figure.add_subplot()
        if not draw(axis):
            axis.remove()
    axes = figure.axes
    if not axes:
        return None
    columns = min(3, len(axes))
    height = -(-len(axes) // columns)
    figure.set_size_inches(4.6 * columns, 3.2 * height)
    grid = figure.add_gridspec(height, columns)
    for place, axis in enumerate(axes):
        axis.set_subplotspec(grid[place])
    _lay_out(figure)
    path = run.folder / "curves.png"
    with writing(path):
        figure.savefig(path, dpi=120)
    return path


def _figure(draw: Draw) -> Figure | None:
    """A plot; None where there is nothing to draw."""
    figure = Figure(figsize=(5, 3.4))
    if not draw(figure.add_subplot()):
        return None
    _lay_out(figure)
    return figure


def _lay_out(figure: Figure) -> None:
    """Make room for the texts around the axes, once; a figure with `layout=` does so in each format it is saved in."""
    ConstrainedLayoutEngine().execute(figure)


def _styled(axis: Axes, title: str, x: str) -> bool:
    axis.set_title(label_of(title, 60), fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, frameon=False)
    return True


def _draw_lines(axis: Axes, run: Run, title: str, metrics: Sequence[str]) -> bool:
    drawn = 0
    for name in metrics:
        if points := run.points("step", name):
            points = _with_start(run, TRAINING, points) if name == "val/reward" else points
            marker = "o" if len(points) < 12 else None
            style = (drawn * 3, (5, 2)) if drawn else "-"  # equal lines stay visible, one through the other's gaps
            axis.plot(
                *zip(*points, strict=True), marker=marker, markersize=3, linewidth=1.2, linestyle=style, label=name
            )
            drawn += 1
    if not drawn:
        return False
    for label, (color, steps) in run.marks().items():
        for number, step in enumerate(steps if len(steps) <= 40 else []):
            axis.axvline(step, label=label if number == 0 else None, color=color, linewidth=1, linestyle=":", zorder=0)
        if len(steps) > 40:
            axis.plot([], [], color=color, linestyle=":", label=f"{label} {len(steps)} times")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _styled(axis, title, "optimizer step")


def _draw_frontier(axis: Axes, runs: Sequence[Run], scorer: SharedScorer) -> bool:
    """Reward against KL from the start, along the validations; a diamond is the verdict on the test prompts."""
    drawn = False
    for number, run in enumerate(runs):
        if name := scorer.names.get(run.name):
            drawn |= _draw_frontier_of(axis, run, name, f"C{number % 10}", several=len(runs) > 1)
    if not drawn:
        return False
    for label, points in _best_of_n(runs, scorer).items():
        axis.plot(
            *zip(*points, strict=True), marker="x", markersize=4, linewidth=0.8, linestyle="--", color="0.5",
            label=label, zorder=0,
        )  # fmt: skip
    axis.set_ylabel("mean reward", fontsize=8)
    return _styled(axis, f"reward against KL ({scorer.label})", "KL(policy‖start), nats per response")


def _draw_frontier_of(axis: Axes, run: Run, scorer: str, color: str, *, several: bool) -> bool:
    """One run's validations and verdict, by the scorer of a name; False if it has neither.

    Args:
        several: Whether the plot has other runs, so that labels name the run.
    """
    points = _with_start(run, scorer, run.points("val/kl_from_start", metric_of("val/reward", scorer)))
    if points:
        label = label_of(run.name) if several else "validation prompts"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color=color, label=label)
    for place, (x, y) in enumerate([] if several else points):
        axis.annotate(str(place), (x, y), fontsize=7, textcoords="offset points", xytext=(4, -9))
    if run.summary:
        x, (y, low, high) = run.summary.kl_from_start.value, run.summary.scorers[scorer].reward_end
        axis.errorbar(
            [x], [y], yerr=[[y - low], [high - y]], marker="D", markersize=5, color=color, capsize=2,
            label=(label_of(run.name) if not points else None) if several else "test prompts, 95 %",
        )  # fmt: skip
    return bool(points or run.summary)


def _best_of_n(runs: Sequence[Run], scorer: SharedScorer) -> dict[str, list[tuple[float, float]]]:
    """KL and reward of the best of 1, 2, 4, … of the start's responses to the test prompts; equal starts once."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if (found := scorer.summary(run)) and found.best_of_n:
            points = [(best.kl, best.reward.value) for best in found.best_of_n.values()]
            points = [(0.0, found.reward_start.value), *points]
            if points not in lines.values():
                of = f" of {label_of(run.name)}" if lines else ""
                lines[f"best of 1 to {[*found.best_of_n][-1]}{of}, start"] = points
    return lines


def _with_start(run: Run, scorer: str, points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Rewards at the validations, with the start's mean reward on the same prompts at 0, if it is known."""
    rows = next(iter(run.validations.values()), [])
    rewards = [reward for row in rows if (scored := row.scored_by(scorer)) for reward in scored.rewards_start]
    return [(0.0, sum(rewards) / len(rewards)), *points] if points and rewards else points


def _draw_win_rate(axis: Axes, runs: Sequence[Run], scorers: Sequence[SharedScorer]) -> bool:
    """Win rate at each validation with its 95 % band: of one run by several scorers, or of several by one."""
    drawn = 0
    for run in runs:
        for scorer in scorers:
            name = scorer.names.get(run.name)
            if name is None or not (points := run.points("step", metric_of("val/win_rate", name))):
                continue
            color = f"C{drawn % 10}"
            drawn += 1
            label = label_of(run.name if len(runs) > 1 else scorer.label)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color=color, label=label)
            rates = {
                step: [scored.win_rate for row in rows if (scored := row.scored_by(name))]
                for step, rows in run.validations.items()
            }
            rates = {step: torch.tensor(values) for step, values in rates.items() if values}
            if rates:
                low, high = zip(*map(rate_interval, rates.values()), strict=True)
                axis.fill_between(list(rates), low, high, color=color, alpha=0.12, linewidth=0)
                axis.vlines(list(rates), low, high, color=color, alpha=0.3, linewidth=1)  # a single one has no band
    if not drawn:
        return False
    axis.axhline(0.5, color="0.6", linewidth=0.8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    by = f" ({scorers[0].label})" if len(runs) > 1 else ""
    return _styled(axis, f"win rate against the start, 95 % band{by}", "optimizer step")


def _draw_seconds(axis: Axes, run: Run) -> bool:
    seconds = _seconds_by_round(run)
    if not seconds:
        return False
    rounds = range(1, 1 + max(max(by_round) for by_round in seconds.values()))
    left = [0.0] * len(rounds)
    for label, by_round in seconds.items():
        values = [by_round.get(number, 0.0) for number in rounds]
        axis.barh(rounds, values, left=left, height=0.6, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_xlim(right=1.4 * max(left))  # room for the legend
    axis.invert_yaxis()
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("round", fontsize=8)
    return _styled(axis, "time of each phase", "seconds")


def _seconds_by_round(run: Run) -> dict[str, dict[int, float]]:
    """Seconds of each phase by the number of the round that they belong to, from 1."""
    ends = [step for step, _ in run.points("step", "round/seconds_train")]
    phases = {
        "sample": ("round/seconds_sample", bisect_right),  # at the step at which the round before ended
        "score": ("round/seconds_score", bisect_right),
        "train": ("round/seconds_train", bisect_left),
        "held-out": ("val/seconds", bisect_left),
    }
    seconds: dict[str, dict[int, float]] = {}
    for label, (metric, place) in phases.items():
        for step, value in run.points("step", metric):
            by_round, number = seconds.setdefault(label, {}), 1 + place(ends, step)
            by_round[number] = by_round.get(number, 0.0) + value
    return seconds


def _draw_lengths(axis: Axes, run: Run) -> bool:
    if not run.held_out:
        return False
    start = [length for row in run.held_out for length in row.lengths_start]
    both = [start, [length for row in run.held_out for length in row.lengths]]
    highest = max(map(max, both))
    bins = torch.linspace(0.5, highest + 0.5, min(highest, 30) + 1).tolist()
    axis.hist(both, bins=bins, label=["start", "end"], color=["0.7", "C0"])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("responses", fontsize=8)
    return _styled(axis, "length of held-out responses", "tokens")


def label_of(words: str, most: int = 40) -> str:
    """Text that matplotlib neither typesets nor hides; the middle of a long one is left out."""
    words = words if len(words) <= most else f"{words[: most // 2]}…{words[-most // 2 :]}"
    return plain(words).replace("$", r"\$").lstrip("_")


def embedded(figure: Figure, name: str, caption: str) -> str:
    buffer = io.BytesIO()
    # the same run gives the same bytes; text is kept as text, which takes a quarter of the space of its outlines
    with matplotlib.rc_context({"svg.hashsalt": "lit_align", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
