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

import html
import json
import math
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from lit_align.errors import UserError
from lit_align.metrics.win_rate import bootstrap_interval, win_rates, with_interval
from lit_align.reporting.plots import comparison_pictures, embedded, pictures, plain
from lit_align.reporting.run_folder import Row, Run, of_judge, read_runs

SHOWN_PROMPTS = 12


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` of a run into its folder; gives the report's path.

    Raises:
        UserError: there is nothing in the folder to report.
    """
    run = read_runs([folder])[0]
    (run.folder / "plots").mkdir(exist_ok=True)
    figures = []
    for name, figure in pictures(run):
        figure.savefig(run.folder / "plots" / f"{name}.png", dpi=150)
        figures.append(embedded(figure, name))
    configuration = f"<details><summary>config.yaml</summary><pre>{text(run.configuration)}</pre></details>"
    parts = [
        f'<div class="figures">{"".join(figures)}</div>',
        _section("Responses", _responses(run)),
        _section("Configuration", configuration if run.configuration else ""),
    ]
    verdict = _section("Verdict on held-out prompts", _verdict([run]) + _facts([run]))
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
    runs = read_runs(folders)
    for run in runs:
        if not run.judges:
            raise UserError(
                f"compare: {run.folder} has no verdict (summary.json). Configure win_rate, or make one now: python "
                f"train.py test --config {run.folder}/config.yaml --ckpt_path {run.folder}/checkpoints/last.ckpt"
            )
    judges = list(dict.fromkeys(judge for run in runs for judge in run.judges))
    figures = "".join(embedded(figure, name) for name, figure in comparison_pictures(runs, judges))
    body = [
        _section("Verdicts on held-out prompts", _verdict(runs) + _facts(runs)),
        f'<div class="figures">{figures}</div>',
        _section("Paired comparisons, prompt by prompt", _paired(runs, judges)),
        _section("Responses at the end", _side_by_side(runs)),
    ]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("Comparison of " + ", ".join(run.name for run in runs), body), encoding="utf-8")
    return path


# --- text ---


def text(value: object) -> str:
    """Escaped, without control characters and what turns the direction of writing."""
    return html.escape(plain(str(value)))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table of text, escaped; on a narrow screen each row becomes a block with the head beside each cell.

    Beside numbers, what stands on further lines of a cell is small.
    """
    if not rows:
        return ""

    def content(cell: str) -> str:
        first, line, more = cell.partition("\n") if kind == "numbers" else (cell, "", "")
        return f"<span>{text(first)}<small>{text(more)}</small></span>" if line else text(cell)

    heads = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-head="{text(name)}">{content(c)}</td>' for name, c in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(values: dict[str, float], name: str, percent: bool = False, like: str | None = None) -> str:
    """A value, below it its interval, to two digits of the interval's width, or of that of the value it is `like`."""
    if name not in values:
        return "–"

    def ends(name: str) -> tuple[float, float] | None:
        return (values[f"{name}_low"], values[f"{name}_high"]) if f"{name}_low" in values else None

    low, high = ends(like or name) or (0.0, 0.0)
    digits = min(6, max(2, 1 - math.floor(math.log10(high - low)))) if high > low else 3
    form = ".1%" if percent else f".{digits}f"
    interval = "\n{:{form}} to {:{form}}".format(*own, form=form) if (own := ends(name)) else ""
    return f"{values[name]:{form}}{interval}".replace("-", "−")


def _called(judge: str) -> str:
    return judge or "training scorer"


def _verdict(runs: Sequence[Run]) -> str:
    head = ["scorer", *(["run"] if len(runs) > 1 else []), "reward at start", "reward at end"]
    head += ["win rate", "at equal length", "ties as wins"]
    rows = []
    for judge in dict.fromkeys(judge for run in runs for judge in run.judges):
        for run in runs:
            if not (values := run.scored(judge)):
                continue
            row = [_called(judge), *([run.name] if len(runs) > 1 else [])]
            row += [_number(values, name, like="reward_end") for name in ("reward_start", "reward_end")]
            rates = ("win_rate", "win_rate_length_controlled", "win_rate_ties_as_wins")
            rows.append(row + [_number(values, name, percent=True) for name in rates])
    note = (
        "<p class=note>Win rates against the start; ties count as half, in the last column as wins. Small: 95 % "
        "intervals over prompts.</p>"
    )
    return _table(head, rows) + note if rows else ""


def _facts(runs: Sequence[Run]) -> str:
    """What else the summaries say, of one run at the start and at the end, of several side by side."""
    facts = [_facts_of(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    if len(runs) == 1:
        return _table(["held-out", "start", "end"], [[name, *facts[0][name]] for name in names])
    rows = []
    for name in names:
        both = [each.get(name, ("", "–")) for each in facts]
        rows.append([name, *(f"{end}\nfrom {start}" if start else end for start, end in both)])
    return _table(["held-out", *(run.name for run in runs)], rows)


def _facts_of(run: Run) -> dict[str, tuple[str, str]]:
    """Start and end of distance, length, diversity, forgetting, a judge's grades, and the data's own responses."""
    s = run.summary
    facts = {}
    if "kl_from_start" in s:
        facts["KL from start, nats per response"] = ("", _number(s, "kl_from_start"))
    if "length_end" in s:
        facts["tokens per response"] = (f"{s['length_start']:.1f}", f"{s['length_end']:.1f}")
    varied = {"distinct_1": "different words / all", "distinct_2": "different pairs of words / all"}
    for name, what in (varied | {"self_bleu": "Self-BLEU"}).items():
        if name in s:
            facts[what] = (f"{s[f'{name}_start']:.3f}", f"{s[name]:.3f}")
    for name, nll in s.get("forgetting", {}).items():
        change = f"{nll['change_low']:+.4f} to {nll['change_high']:+.4f}".replace("-", "−")
        facts[f"nats per token of {name}"] = (f"{nll['nll_start']:.4f}", f"{nll['nll_end']:.4f}\n{change}")
    for judge in run.judges:
        values = run.scored(judge)
        for name in (end.removesuffix("_end") for end in values if end.endswith("_end")):
            if name not in ("reward", "length"):  # what its rewards are made of
                start, end = (_number(values, f"{name}_{when}", like=f"{name}_end") for when in ("start", "end"))
                facts[f"{name}, {_called(judge)}"] = (start, end)
        own = s.get("data", {}).get(judge, {}) if judge else s.get("data", {})
        if own:
            facts[f"win rate against the data's own responses, {_called(judge)}"] = (
                "",
                _number(own, "win_rate", percent=True),
            )
    return facts


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
    head = ["scorer", "A", "B", "prompts", "reward of A − B", "p", "A beats B"]
    rows = []
    for judge in judges:
        for a, b in combinations(runs, 2):
            values = paired_comparison(a.held_out, b.held_out, judge)
            if values is None:
                rows.append([_called(judge), a.name, b.name, "0", "no prompt in common", "–", "–"])
                continue
            p = f"{values['p']:.3f}" if values["p"] >= 0.001 else "< 0.001"
            difference, beats = _number(values, "difference"), _number(values, "win_rate", percent=True)
            rows.append([_called(judge), a.name, b.name, f"{values['prompts']:.0f}", difference, p, beats])
    note = "<p class=note>p: paired sign-flip test over prompts, not corrected for the number of comparisons.</p>"
    return _table(head, rows) + note


def paired_comparison(
    a: Sequence[Row], b: Sequence[Row], judge: str = "", flips: int = 10_000
) -> dict[str, float] | None:
    """Two runs on the prompts that both have answered, by one scorer; None if there is none.

    Returns:
        prompts, difference and win_rate of A with their intervals, and p.
    """
    column = of_judge("rewards", judge)
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
.numbers small { display: block; white-space: pre; color: #667; font-size: 12px }
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
