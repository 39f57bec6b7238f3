"""`report.html`: what a run did, or several runs beside each other, in one file that loads nothing from anywhere.

It is made of what lies in a run's folder (metrics.csv, summary.json, held_out/*.parquet, config.yaml), so that it can
be made again at any time: `lit-align report RUN`, `lit-align compare RUN RUN … --out report.html`. Pictures are
inline SVG, and PNG files in the run's `plots/`. Responses are what a model wrote: all text is escaped, and the page
forbids itself scripts and requests.

Runs are compared in pairs, prompt by prompt, on the prompts that both have answered:

| column | formula |
|---|---|
| difference | mean over prompts of (mean reward of A − mean reward of B), with its bootstrap interval |
| p | paired sign-flip test of that difference, 10,000 flips; not corrected for the number of comparisons |
| A beats B | win rate of A's responses against B's (`metrics/win_rate.py`), with its interval |
"""

import base64
import html
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pyarrow.parquet as pq
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_align.errors import UserError
from lit_align.loggers import read_metrics
from lit_align.metrics.win_rate import bootstrap_interval, win_rates, with_interval

plt.rcParams["svg.hashsalt"] = "lit_align"  # the same run gives the same bytes

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
"""File name → title and metrics of the pictures that are lines over optimizer steps."""

SHOWN_PROMPTS = 12
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as it is filled."""

    folder: Path
    name: str

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder / "metrics.csv")

    @cached_property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def held_out(self) -> list[Row]:
        """One row per prompt of the verdict at the end."""
        path = self.folder / "held_out" / "test.parquet"
        return pq.read_table(path).to_pylist() if path.exists() else []

    @cached_property
    def validations(self) -> dict[int, list[Row]]:
        """The same at each validation, by optimizer step."""
        paths = sorted((self.folder / "held_out").glob("validation-*.parquet"))
        return {int(path.stem.rpartition("-")[2]): pq.read_table(path).to_pylist() for path in paths}

    @property
    def configuration(self) -> str:
        path = self.folder / "config.yaml"
        return path.read_text() if path.exists() else ""

    @property
    def judges(self) -> list[str]:
        """Names of the scorers in the summary; "" is the training scorer."""
        nested = [k for k, v in self.summary.items() if isinstance(v, dict) and k not in ("data", "forgetting")]
        return ["", *nested] if "win_rate" in self.summary else []

    def scored(self, judge: str) -> dict[str, float]:
        """The summary by one scorer."""
        return self.summary.get(judge, {}) if judge else self.summary

    def points(self, *names: str) -> list[tuple[float, ...]]:
        """The logged rows that have all of these metrics."""
        return [tuple(row[name] for name in names) for row in self.metrics if all(name in row for name in names)]

    def marks(self) -> dict[str, tuple[str, list[float]]]:
        """Steps at which rounds begin and the reference is refreshed, with their colours."""
        counts = self.points("step", "reference/refreshes")
        before = [0.0, *(count for _, count in counts)]
        refreshes = [step for (step, count), last in zip(counts, before, strict=False) if count > last]
        rounds = [row["step"] for row in self.metrics if row.get("round", 0) > 0]
        return {"reference refreshed": ("tab:red", refreshes), "new round": ("0.75", rounds)}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` of a run into its folder; gives the report's path.

    Raises:
        UserError: there is nothing in the folder to report.
    """
    run = _runs([folder])[0]
    pictures = {name: picture for name, picture in _pictures(run) if picture is not None}
    (run.folder / "plots").mkdir(exist_ok=True)
    figures = []
    for name, figure in pictures.items():
        figure.savefig(run.folder / "plots" / f"{name}.png", dpi=150)
        figures.append(_embedded(figure, name))
    configuration = f"<details><summary>config.yaml</summary><pre>{text(run.configuration)}</pre></details>"
    parts = [
        f'<div class="figures">{"".join(figures)}</div>',
        _section("Responses", _responses(run)),
        _section("Configuration", configuration if run.configuration else ""),
    ]
    verdict = _section("Verdict on held-out prompts", _verdict([run]) + _facts(run))
    path = run.folder / "report.html"
    path.write_text(_page(run.name, [verdict, *parts]), encoding="utf-8")
    return path


def compare(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one report of several runs; gives its path.

    Raises:
        UserError: fewer than two runs, or one without a summary.json.
    """
    if len(folders) < 2:
        raise UserError("compare: name at least two runs' folders: lit-align compare RUN RUN --out report.html")
    runs = _runs(folders)
    for run in runs:
        if not run.judges:
            raise UserError(
                f"compare: {run.folder} has no verdict (summary.json). Configure win_rate, or make one now: python "
                f"train.py test --config {run.folder}/config.yaml --ckpt_path {run.folder}/checkpoints/last.ckpt"
            )
    judges = list(dict.fromkeys(judge for run in runs for judge in run.judges))
    figures = "".join(
        _embedded(figure, title)
        for judge in judges
        for title, draw in (("frontier", _draw_frontier), ("win_rate", _draw_win_rate))
        if (figure := _figure(lambda axis, draw=draw, judge=judge: draw(axis, runs, judge))) is not None
    )
    body = [
        _section("Verdicts on held-out prompts", _verdict(runs)),
        f'<div class="figures">{figures}</div>',
        _section("Paired comparisons, prompt by prompt", _paired(runs, judges)),
        _section("Responses at the end", _side_by_side(runs)),
    ]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("Comparison of " + ", ".join(run.name for run in runs), body), encoding="utf-8")
    return path


def _runs(folders: Sequence[str | Path]) -> list[Run]:
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / "metrics.csv").exists() and not (path / "summary.json").exists():
            raise UserError(f"{path}: no run's folder; there is neither metrics.csv nor summary.json in it.")
    short = [path.resolve().name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return [Run(path, name) for path, name in zip(paths, names, strict=True)]


# --- pictures ---


def _pictures(run: Run) -> Iterator[tuple[str, Figure | None]]:
    for name, (title, metrics) in LINES.items():
        yield name, _figure(lambda axis, t=title, m=metrics: _draw_lines(axis, run, t, m))
    yield "frontier", _figure(lambda axis: _draw_frontier(axis, [run], ""))
    yield "win_rate", _figure(lambda axis: _draw_win_rate(axis, [run], ""))
    yield "seconds", _figure(lambda axis: _draw_seconds(axis, run))
    yield "lengths", _figure(lambda axis: _draw_lengths(axis, run))


def plot_curves(folder: str | Path) -> Path | None:
    """All of a run's pictures in `curves.png`; None if nothing was logged."""
    run = Run(Path(folder), Path(folder).name)
    draws: list[Callable[[Axes], bool]] = [
        *(lambda axis, t=title, m=metrics: _draw_lines(axis, run, t, m) for title, metrics in LINES.values()),
        lambda axis: _draw_frontier(axis, [run], ""),
        lambda axis: _draw_win_rate(axis, [run], ""),
    ]
    scratch = plt.figure()
    drawn = [draw for draw in draws if draw(scratch.add_subplot())]
    plt.close(scratch)
    if not drawn:
        return None
    columns = min(3, len(drawn))
    height = -(-len(drawn) // columns)
    size = (4.6 * columns, 3.2 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, draw in zip(axes.flat, drawn, strict=False):
        draw(axis)
    path = run.folder / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _figure(draw: Callable[[Axes], bool]) -> Figure | None:
    """A picture; None where there is nothing to draw."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    plt.close(figure)  # from pyplot's list; it can still be saved
    return figure if draw(axis) else None


def _styled(axis: Axes, title: str, x: str, legend: bool = True) -> bool:
    axis.set_title(_label(title), fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if legend and axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, frameon=False)
    return True


def _draw_lines(axis: Axes, run: Run, title: str, metrics: Sequence[str]) -> bool:
    drawn = False
    for name in metrics:
        if points := run.points("step", name):
            few = len(points) < 12
            axis.plot(*zip(*points, strict=True), marker="o" if few else None, markersize=3, linewidth=1.2, label=name)
            drawn = True
    if not drawn:
        return False
    for label, (color, steps) in run.marks().items():
        for number, step in enumerate(steps if len(steps) <= 40 else []):
            axis.axvline(step, label=label if number == 0 else None, color=color, linewidth=1, linestyle=":", zorder=0)
        if len(steps) > 40:
            axis.plot([], [], color=color, linestyle=":", label=f"{label} {len(steps)} times")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _styled(axis, title, "optimizer step")


def _suffix(judge: str) -> str:
    return f"_{judge}" if judge else ""


def _draw_frontier(axis: Axes, runs: Sequence[Run], judge: str) -> bool:
    """Reward against KL from the start, along the validations; a diamond is the verdict on the test prompts."""
    drawn = False
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        points = run.points("val/kl_from_start", f"val/reward{_suffix(judge)}")
        rows = next(iter(run.validations.values()), [])
        if points and rows and f"rewards_start{_suffix(judge)}" in rows[0]:
            start = [reward for row in rows for reward in row[f"rewards_start{_suffix(judge)}"]]
            points = [(0.0, sum(start) / len(start)), *points]
        if points:
            label = _label(run.name) if len(runs) > 1 else "validation prompts"
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color=color, label=label)
            if len(runs) == 1:
                for place, (x, y) in enumerate(points):
                    axis.annotate(str(place), (x, y), fontsize=7, textcoords="offset points", xytext=(4, -9))
        if end := run.scored(judge):
            x, y = run.summary["kl_from_start"], end["reward_end"]
            low, high = end.get("reward_end_low", y), end.get("reward_end_high", y)
            axis.errorbar(
                [x], [y], yerr=[[y - low], [high - y]], marker="D", markersize=5, color=color, capsize=2,
                label=(_label(run.name) if not points else None) if len(runs) > 1 else "test prompts, 95 %",
            )  # fmt: skip
            drawn = True
        drawn = drawn or bool(points)
    if not drawn:
        return False
    axis.set_ylabel("mean reward", fontsize=8)
    by = f" by {judge}" if judge else ""
    return _styled(axis, f"frontier: reward{by} against KL", "KL(policy‖start), nats per response")


def _draw_win_rate(axis: Axes, runs: Sequence[Run], judge: str) -> bool:
    drawn = False
    for number, run in enumerate(runs):
        shown = ["", *filter(None, run.judges)] if len(runs) == 1 else [judge]
        for place, name in enumerate(shown):
            color = f"C{(number + place) % 10}"
            if not (points := run.points("step", f"val/win_rate{_suffix(name)}")):
                continue
            drawn = True
            label = _label(run.name) if len(runs) > 1 else (_label(name) or "training scorer")
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color=color, label=label)
            if not name and (band := run.points("step", "val/win_rate_low", "val/win_rate_high")):
                steps, low, high = zip(*band, strict=True)
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    if not drawn:
        return False
    axis.axhline(0.5, color="0.6", linewidth=0.8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    by = f" by {judge}" if judge else ""
    return _styled(axis, f"win rate{by} against the start, 95 % band", "optimizer step")


def _draw_seconds(axis: Axes, run: Run) -> bool:
    names = ["round/seconds_sample", "round/seconds_score", "round/seconds_train", "val/seconds"]
    columns = {name: [value for (value,) in run.points(name)] for name in names}
    columns = {name: values for name, values in columns.items() if values}
    if not columns:
        return False
    rounds = max(map(len, columns.values()))
    left = [0.0] * rounds
    for name, values in columns.items():
        values = values + [0.0] * (rounds - len(values))
        axis.barh(
            range(1, rounds + 1),
            values,
            left=left,
            height=0.6,
            label=name.rpartition("seconds")[2].strip("_") or "held-out",
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("round", fontsize=8)
    return _styled(axis, "time of each phase", "seconds")


def _draw_lengths(axis: Axes, run: Run) -> bool:
    if not run.held_out:
        return False
    both = [[n for row in run.held_out for n in row[name]] for name in ("lengths_start", "lengths")]
    highest = max(map(max, both))
    bins = torch.linspace(0.5, highest + 0.5, min(highest, 30) + 1).tolist()
    axis.hist(both, bins=bins, label=["start", "end"], color=["0.7", "C0"])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _styled(axis, "length of held-out responses", "tokens")


def _label(words: str) -> str:
    """Text that matplotlib neither typesets nor hides."""
    return _plain(words).replace("$", r"\$").lstrip("_")


def _embedded(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(name)}" src="data:image/svg+xml;base64,{data}">'


# --- text ---

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of writing."""


def text(value: object) -> str:
    """Escaped, without control characters and what turns the direction of writing."""
    return html.escape(_plain(str(value)))


def _plain(words: str) -> str:
    words = words.encode("utf-8", "replace").decode()
    return "".join("\ufffd" if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in BIDI else c for c in words)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table of text, escaped; on a narrow screen each row becomes a block with the head beside each cell."""
    if not rows:
        return ""
    heads = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-head="{text(name)}">{text(c)}</td>' for name, c in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(values: dict[str, float], name: str) -> str:
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    interval = f" ({low:.1%} – {high:.1%})" if low is not None and high is not None else ""
    return f"{values[name]:.1%}{interval}" if name in values else "–"


def _number(values: dict[str, float], name: str) -> str:
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    interval = f" ({low:.3f} – {high:.3f})" if low is not None and high is not None else ""
    return f"{values[name]:.3f}{interval}" if name in values else "–"


def _verdict(runs: Sequence[Run]) -> str:
    head = ["scorer", "reward at start", "reward at end", "win rate", "at equal length", "KL from start", "length"]
    rows = []
    for judge in dict.fromkeys(judge for run in runs for judge in run.judges):
        for run in runs:
            if not (values := run.scored(judge)):
                continue
            name = [run.name] if len(runs) > 1 else []
            rows.append(
                [
                    *name,
                    judge or "training scorer",
                    _number(values, "reward_start"),
                    _number(values, "reward_end"),
                    _percent(values, "win_rate"),
                    _percent(values, "win_rate_length_controlled"),
                    f"{run.summary['kl_from_start']:.2f}",
                    f"{values['length_end']:.1f}" if "length_end" in values else "–",
                ]
            )
    note = "<p class=note>In parentheses 95 % intervals over prompts; ties count as half; KL in nats per response.</p>"
    return _table((["run"] if len(runs) > 1 else []) + head, rows) + note if rows else ""


def _facts(run: Run) -> str:
    """What else the summary says: the data's own responses, diversity, forgetting."""
    s = run.summary
    rows = []
    data = {"": s["data"], **{k: v for k, v in s["data"].items() if isinstance(v, dict)}} if "data" in s else {}
    for judge, values in data.items():
        rows.append(
            [
                f"win rate against the data's own responses, {judge or 'training scorer'}",
                "",
                _percent(values, "win_rate"),
            ]
        )
    facts = {
        "different words / all": "distinct_1",
        "different pairs of words / all": "distinct_2",
        "Self-BLEU": "self_bleu",
    }
    rows += [[what, f"{s[f'{k}_start']:.3f}", f"{s[k]:.3f}"] for what, k in facts.items() if k in s]
    for name, nll in s.get("forgetting", {}).items():
        change = f" ({nll['change_low']:+.4f} to {nll['change_high']:+.4f})"
        rows.append([f"nats per token of {name}", f"{nll['nll_start']:.4f}", f"{nll['nll_end']:.4f}{change}"])
    return _table(["held-out", "start", "end"], rows)


def _responses(run: Run) -> str:
    """One response to each of some prompts: of the start, at each validation, and at the end."""
    parts = []
    if run.validations:
        steps = list(run.validations)
        first = run.validations[steps[0]]
        kept = steps if len(steps) <= 6 else [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)]
        head = ["prompt", "start", *(f"step {step}" for step in kept)]
        rows = []
        for place, prompt in enumerate(_prompts([row["prompt"] for row in first])[:SHOWN_PROMPTS]):
            during = [run.validations[step][place]["responses"][0] for step in kept]
            rows.append([prompt, first[place]["responses_start"][0], *during])
        parts.append("<h3>During training</h3>" + _table(head, rows, "responses"))
    if run.held_out:
        own = ["data"] if "response_data" in run.held_out[0] else []
        columns = [*(["response_data"] if own else []), "responses_start", "responses"]
        rows = [
            [prompt, *(row[name] if name == "response_data" else row[name][0] for name in columns)]
            for prompt, row in zip(_prompts([row["prompt"] for row in run.held_out]), run.held_out, strict=True)
        ][:SHOWN_PROMPTS]
        parts.append("<h3>Test prompts</h3>" + _table(["prompt", *own, "start", "end"], rows, "responses"))
    return "".join(parts)


def _side_by_side(runs: Sequence[Run]) -> str:
    answers = [{row["prompt"]: row for row in run.held_out} for run in runs]
    prompts = [prompt for prompt in answers[0] if all(prompt in each for each in answers)]
    rows = [
        [short, answers[0][prompt]["responses_start"][0], *(each[prompt]["responses"][0] for each in answers)]
        for short, prompt in zip(_prompts(prompts), prompts, strict=True)
    ][:SHOWN_PROMPTS]
    return _table(["prompt", f"start of {runs[0].name}", *(run.name for run in runs)], rows, "responses")


def _prompts(prompts: Sequence[str], most: int = 300) -> list[str]:
    """The end of each prompt, of a chat its last message; lines that all of them begin with are left out."""
    lasts = []
    for prompt in prompts:
        try:
            chat = json.loads(prompt)
            prompt = chat[-1]["content"] if isinstance(chat, list) else prompt
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            pass
        lasts.append(str(prompt))
    shared = os.path.commonprefix(lasts).rfind("\n") + 1 if len(lasts) > 1 else 0  # noqa: RUF071  # characters are meant
    ends = [last[shared:].strip() or last.strip() for last in lasts]
    return [("… " if shared or len(end) > most else "") + end[-most:] for end in ends]


def _paired(runs: Sequence[Run], judges: Sequence[str]) -> str:
    head = ["scorer", "A", "B", "prompts", "difference of mean reward, A − B", "p", "A beats B"]
    rows = []
    for judge in judges:
        for a, b in combinations(runs, 2):
            values = paired_comparison(a.held_out, b.held_out, judge)
            if values is None:
                rows.append([judge or "training scorer", a.name, b.name, "0", "no prompt in common", "–", "–"])
                continue
            p = values["p"]
            rows.append(
                [
                    judge or "training scorer",
                    a.name,
                    b.name,
                    f"{values['prompts']:.0f}",
                    _number(values, "difference"),
                    f"{p:.3f}" if p >= 0.001 else "< 0.001",
                    _percent(values, "win_rate"),
                ]
            )
    note = "<p class=note>p: paired sign-flip test over prompts, not corrected for the number of comparisons.</p>"
    return _table(head, rows) + note


def paired_comparison(
    a: Sequence[Row], b: Sequence[Row], judge: str = "", flips: int = 10_000
) -> dict[str, float] | None:
    """Two runs on the prompts that both have answered, by one scorer; None if there is none.

    Returns:
        prompts, difference and win_rate of A with their intervals, and p.
    """
    column = f"rewards{_suffix(judge)}"
    ours, theirs = ({row["prompt"]: row[column] for row in rows if column in row} for rows in (a, b))
    both = [prompt for prompt in ours if prompt in theirs]
    if not both:
        return None
    A = [torch.tensor(ours[prompt], dtype=torch.float64) for prompt in both]
    B = [torch.tensor(theirs[prompt], dtype=torch.float64) for prompt in both]
    differences = torch.stack([x.mean() - y.mean() for x, y in zip(A, B, strict=True)])
    rates = torch.stack([win_rates(x[None], y[None])[0] for x, y in zip(A, B, strict=True)])
    signs = torch.randint(2, (flips, len(both)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    flipped = (signs @ differences).abs() / len(both)
    p = (1 + (flipped >= differences.mean().abs() - 1e-12).sum().item()) / (1 + flips)
    low, high = bootstrap_interval(differences)
    values = {"prompts": float(len(both)), "p": p, "difference": differences.mean().item()}
    return values | {"difference_low": low, "difference_high": high} | with_interval("win_rate", rates)


STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #f5f6f8; margin: 0; padding: 24px }
main { max-width: 1280px; margin: auto }
h1 { font-size: 22px; margin: 0 0 16px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 0 0 10px }
h3 { font-size: 14px; margin: 14px 0 6px; color: #555 }
section, .figures img { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px }
section { padding: 16px; margin: 0 0 16px }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 12px;
  margin: 0 0 16px }
.figures img { width: 100%; height: auto; padding: 6px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: 0 0 8px }
th { text-align: left; font-size: 12px; color: #667; font-weight: 600 }
th, td { padding: 6px 10px; border-bottom: 1px solid #eceff2; vertical-align: top }
.numbers td { font-variant-numeric: tabular-nums }
.responses { table-layout: fixed; min-width: 640px }
.responses td { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; unicode-bidi: isolate }
.responses td:first-child { font-weight: 600 }
.responses td:empty::after { content: "(empty)"; color: #99a }
.note { color: #667; font-size: 13px; margin: 4px 0 }
pre { font-size: 12px; overflow: auto; max-height: 60vh }
summary { cursor: pointer }
@media (max-width: 640px) {
  body { padding: 10px }
  section { padding: 12px }
  .responses { min-width: 0 }
  thead { display: none }
  table, tbody, tr, td { display: block }
  tr { border-bottom: 2px solid #dfe3e8; padding: 6px 0 }
  td { border: 0; padding: 2px 0 }
  td::before { content: attr(data-head); display: block; font-size: 11px; color: #667; font-weight: 600 }
  .numbers td { display: flex; justify-content: space-between; gap: 12px; text-align: right }
  .numbers td::before { text-align: left }
}
"""


def _page(title: str, parts: Sequence[str]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{text(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )
