"""`report.html`: the results of one run, or of several runs side by side, in one self-contained file.

A report is written from the files in a run's folder (metrics.csv, summary.json, held_out/*.parquet, config.yaml) and
can be written again at any time: `lit-align report RUN`, `lit-align compare RUN RUN … --out report.html`. Plots are
inline SVG, and PNG files in the run's `plots/`. Responses are text that a model wrote: everything is escaped, and the
page forbids itself scripts and requests.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_align.errors import UserError, amount, decimal
from lit_align.evaluation.rows import HeldOutRow
from lit_align.evaluation.summary import Summary, test_command
from lit_align.files import write_text, writing
from lit_align.reporting.page import number, page, section, table, text
from lit_align.reporting.paired import PAIRED_HEAD, SharedScorer, not_compared, paired_rows, scorers_of
from lit_align.reporting.plots import CAPTIONS, comparison_plots, embedded, run_plots
from lit_align.reporting.run_folder import Run, open_runs

SHOWN_PROMPTS = 12


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` of a run into its folder; gives the report's path.

    Raises:
        UserError: the folder holds nothing to report.
    """
    run = open_runs([folder])[0]
    (run.folder / "plots").mkdir(exist_ok=True)
    figures = []
    for name, figure in run_plots(run):
        path = run.folder / "plots" / f"{name}.png"
        with writing(path):
            figure.savefig(path, dpi=150)
        figures.append(embedded(figure, name, CAPTIONS[name]))
    about = section("What was run", _about(run))
    configuration = f"<details><summary>config.yaml</summary><pre>{text(run.configuration)}</pre></details>"
    parts = [
        f'<div class="figures">{"".join(figures)}</div>',
        section("Responses", _responses(run)),
        section("Configuration", configuration if run.configuration else ""),
    ]
    verdict = ""
    if run.summary:
        sentences = [run.summary.sentence(), run.summary.caution()]
        body = "".join(f"<p>{text(sentence)}</p>" for sentence in filter(None, sentences))
        verdict = section("Verdict on held-out prompts", body + _verdict([run], scorers_of([run])) + _facts([run]))
    path = run.folder / "report.html"
    write_text(path, page(run.name, [about, verdict, *parts]))
    return path


def compare(runs: Sequence[Run], out: str | Path) -> Path:
    """Write one report of several runs; gives its path."""
    scorers = scorers_of(runs)
    figures = "".join(
        embedded(figure, f"{name}, {scorer.label}", CAPTIONS[name])
        for name, scorer, figure in comparison_plots(runs, scorers)
    )
    body = [
        section("Verdicts on held-out prompts", _verdict(runs, scorers) + _facts(runs)),
        f'<div class="figures">{figures}</div>',
        section("Paired comparisons, prompt by prompt", _paired(runs, scorers)),
        section("Responses at the end", _side_by_side(runs)),
    ]
    path = Path(out)
    write_text(path, page("Comparison of " + ", ".join(run.name for run in runs), body))
    return path


def compared_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs to compare.

    Raises:
        UserError: fewer than two runs, or one without a summary.json.
    """
    if len(folders) < 2:
        raise UserError(
            "compare needs at least two runs. Name their folders: lit-align compare RUN RUN --out report.html"
        )
    places = [Path(folder).resolve() for folder in folders]
    if repeated := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"compare: {repeated[-1]} is named twice. Name different runs.")
    runs = open_runs(folders)
    for run in runs:
        if not run.scorers:
            has_win_rate = re.search(r"^win_rate:\s*$", run.configuration, re.MULTILINE)  # not null
            options = "" if has_win_rate else " --win_rate.prompts=PATH --win_rate.scorer=SCORER"
            raise UserError(
                f"compare: {run.folder} has no summary.json. Evaluate the run: {test_command(run.folder)}{options}"
            )
    return runs


def _about(run: Run) -> str:
    """The run's header, how far it got, and when and how it was started."""
    facts: list[list[str]] = []
    for name, line in run.record.header if run.record else []:
        if name or not facts:
            facts.append([name, line])
        else:
            facts[-1][1] += f"; {line}"
    if run.metrics:
        rounds = sum("round" in row for row in run.metrics)
        steps = amount(int(max(row["step"] for row in run.metrics)), "optimizer steps")
        facts.append(["trained", f"{steps} in {amount(rounds, 'rounds')}" if rounds else steps])
    elif not run.summary:
        facts.append(["trained", "nothing is recorded yet"])
    if run.summary:
        step = "" if run.summary.step is None else f", by the policy of step {run.summary.step}"
        responses = amount(run.summary.responses_per_prompt, "responses")
        facts.append(["held-out prompts", f"{run.summary.prompts} × {responses}{step}"])
    for place, start in enumerate(run.record.starts if run.record else []):
        facts.append([f"resumed at step {start.step}" if place else "started", f"{start.time}: {start.command}"])
    return table(["", ""], facts, "facts")


def _verdict(runs: Sequence[Run], scorers: Sequence[SharedScorer]) -> str:
    head = ["scorer", *(["run"] if len(runs) > 1 else []), "reward at start", "reward at end"]
    head += ["win rate", "at equal length", "ties as wins"]
    rows = []
    for scorer in scorers:
        for run in runs:
            if (found := scorer.summary(run)) is None:
                continue
            row = [f"{scorer.label}\n{found.identity}", *([run.name] if len(runs) > 1 else [])]
            row += [number(found.reward_start, like=found.reward_end), number(found.reward_end)]
            is_equal = run.summary is None or run.summary.has_equal_lengths
            equal = number(found.win_rate_length_controlled, percent=True) if is_equal else "n/a"
            row += [number(found.win_rate, percent=True), equal]
            rows.append([*row, f"{found.win_rate_ties_as_wins:.1%}"])
    note = (
        "<p class=note>Win rates against the start; ties count as half, in the last column as wins. Small: 95 % "
        "intervals over prompts.</p>"
    )
    return table(head, rows) + note if rows else ""


def _facts(runs: Sequence[Run]) -> str:
    """Further results, of one run at the start and at the end, of several side by side."""
    facts = [_facts_of(run.summary) if run.summary else {} for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    if len(runs) == 1:
        return table(["held-out", "start", "end"], [[name, *facts[0][name]] for name in names])
    rows = []
    for name in names:
        both = [each.get(name, ("", "–")) for each in facts]
        rows.append([name, *(f"{end}\nfrom {start}" if start else end for start, end in both)])
    return table(["held-out", *(run.name for run in runs)], rows)


def _facts_of(summary: Summary) -> dict[str, tuple[str, str]]:
    """Start and end of distance, length, diversity, forgetting, and the parts of rewards; the data's own responses."""
    start, end = summary.diversity_start, summary.diversity_end
    facts = {
        "KL from start, nats per response": ("0", number(summary.kl_from_start) + summary.kl_condition),
        "tokens per response": (f"{summary.length_start:.1f}", f"{summary.length_end:.1f}"),
        "ended by themselves": (f"{summary.finished_start:.1%}", f"{summary.finished_end:.1%}"),
        "different words / all": (f"{start.distinct_1:.3f}", f"{end.distinct_1:.3f}"),
        "different pairs of words / all": (f"{start.distinct_2:.3f}", f"{end.distinct_2:.3f}"),
        "Self-BLEU": (f"{start.self_bleu:.3f}", f"{end.self_bleu:.3f}"),
    }
    for name, nll in summary.forgetting.items():
        change = f"{decimal(nll.change.low, '+.4f')} to {decimal(nll.change.high, '+.4f')}".replace("-", "−")
        facts[f"nats per token of {name}"] = (f"{nll.nll_start:.4f}", f"{nll.nll_end:.4f}\n{change}")
    for name, scorer in summary.scorers.items():
        for part, values in scorer.parts.items():
            facts[f"{part}, {name}"] = (number(values.start, like=values.end), number(values.end))
        for n, best in scorer.best_of_n.items():
            facts[f"reward of the start's best of {n}, {name}, at KL {best.kl:.2f}"] = (number(best.reward), "")
        if scorer.data:
            facts[f"win rate against the data's own responses, {name}"] = (
                "",
                number(scorer.data.win_rate, percent=True),
            )
    return facts


def _responses(run: Run) -> str:
    """One response to each of some prompts: of the start, at each validation, and at the end."""
    during = "<h3>During training</h3>" + _validated(run.validations) if run.validations else ""
    return during + ("<h3>Test prompts</h3>" + _tested(run.held_out) if run.held_out else "")


def _validated(validations: Mapping[int, Sequence[HeldOutRow]]) -> str:
    """The responses at up to six validations, by their optimizer steps."""
    steps = list(validations)
    first = validations[steps[0]]
    kept = steps if len(steps) <= 6 else [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)]
    rows = []
    by_prompt = [{row.prompt: row.responses[0] for row in validations[step]} for step in kept]  # they may have changed
    for prompt, row in zip(_prompts([row.prompt for row in first])[:SHOWN_PROMPTS], first, strict=False):
        rows.append([prompt, row.responses_start[0], *(each.get(row.prompt, "–") for each in by_prompt)])
    return table(["prompt", "start", *(f"step {step}" for step in kept)], rows, "responses")


def _tested(held_out: Sequence[HeldOutRow]) -> str:
    """The responses at the end, with the data set's own if they were compared."""
    own = held_out[0].response_data is not None
    rows = [
        [prompt, *([row.response_data or ""] if own else []), row.responses_start[0], row.responses[0]]
        for prompt, row in zip(_prompts([row.prompt for row in held_out]), held_out, strict=True)
    ][:SHOWN_PROMPTS]
    return table(["prompt", *(["data"] if own else []), "start", "end"], rows, "responses")


def _side_by_side(runs: Sequence[Run]) -> str:
    answers = [{row.prompt: row for row in run.held_out} for run in runs]
    prompts = [prompt for prompt in answers[0] if all(prompt in each for each in answers)]
    rows = [
        [short, answers[0][prompt].responses_start[0], *(each[prompt].responses[0] for each in answers)]
        for short, prompt in zip(_prompts(prompts), prompts, strict=True)
    ][:SHOWN_PROMPTS]
    return table(["prompt", f"start of {runs[0].name}", *(run.name for run in runs)], rows, "responses")


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


def _paired(runs: Sequence[Run], scorers: Sequence[SharedScorer]) -> str:
    rows = paired_rows(runs, scorers)
    notes = ["p: paired sign-flip test over prompts, not corrected for the number of comparisons."] if rows else []
    notes += filter(None, [not_compared(runs, scorers)])
    return table(PAIRED_HEAD, rows) + "".join(f"<p class=note>{text(note)}</p>" for note in notes)
