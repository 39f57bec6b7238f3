"""Results as printed on the terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text as Styled

from lit_align.console import console, print_line
from lit_align.data.formats.rows import Text
from lit_align.data.sampling import Response
from lit_align.errors import amount, decimal
from lit_align.evaluation.results import Evaluation
from lit_align.evaluation.summary import RESULTS_HEAD, Summary, results_cells
from lit_align.reporting.paired import PAIRED_HEAD, not_compared, paired_rows, scorers_of
from lit_align.reporting.run_folder import Run


def print_evaluation(evaluation: Evaluation, shown: int) -> None:
    """Print the verdict on held-out prompts, and one response before and after to the first prompts.

    Args:
        shown: Number of prompts.
    """
    summary = evaluation.summary
    print_summary(summary)
    print_line()
    held_out = evaluation.held_out
    for place, row in enumerate(held_out.prompts.rows[:shown]):
        print_line(Styled(_last_line(row.prompt), style="bold"))
        for name, answers in (("before", held_out.start), ("after", evaluation.policy)):
            line = _one_line(answers.responses[place][0])
            print_line(Styled(f"  {name:<8}", style="dim").append(line, style="not dim"))


def print_summary(summary: Summary) -> None:
    """Print rewards and win rates by scorer, then distance, length, diversity and forgetting."""
    table = results_table(f"Against the start, on {amount(summary.prompts, 'held-out prompts')}")
    for name, scorer in summary.scorers.items():
        table.add_row(name, *scorer.cells(is_equal=summary.has_equal_lengths))
    print_line()
    print_line(table)
    data = {name: (scorer, scorer.data) for name, scorer in summary.scorers.items() if scorer.data}
    if data:
        table = results_table("Against the data set's own responses")
        for name, (scorer, own) in data.items():
            estimates = (own.reward, scorer.reward_end, own.win_rate, own.win_rate_length_controlled)
            is_equal = own.has_equal_lengths and not summary.is_truncated
            table.add_row(name, *results_cells(*estimates, is_equal=is_equal))
        print_line(table)
    for line in best_of_n_lines(summary):
        print_line(line)
    start, end = summary.diversity_start, summary.diversity_end
    if warning := summary.caution():
        print_line(Styled(warning, style="yellow"))
        print_line()
    print_line(f"KL from start {summary.kl_from_start.value:z.2f} nats per response{summary.kl_condition}")
    print_line(f"length {summary.length_start:.1f} → {summary.length_end:.1f} tokens")
    print_line(f"distinct pairs of words {start.distinct_2:.1%} → {end.distinct_2:.1%}")
    for name, nll in summary.forgetting.items():
        print_line(
            f"forgetting {name}: {nll.nll_start:.4f} → {nll.nll_end:.4f} nats per token "
            f"({decimal(nll.change.low, '+.4f')} to {decimal(nll.change.high, '+.4f')})"
        )


def best_of_n_lines(summary: Summary) -> Iterator[str]:
    """The rewards of the best of n of the start's responses, for the largest n, and their distance from the start."""
    largest = {name: [*scorer.best_of_n.items()][-1] for name, scorer in summary.scorers.items() if scorer.best_of_n}
    for n, best in dict(largest.values()).items():
        yield f"best of {n} of the start's responses, at KL {best.kl:.2f}, instead of training:"
    for name, (_, best) in largest.items():
        yield f"  {name} reward {decimal(best.reward.value)}"


def results_table(title: str) -> Table:
    """An empty table of rewards and win rates; within 80 columns, numbers stay on one line."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    first, *others = RESULTS_HEAD
    table.add_column(first, overflow="fold")
    for column in others:
        table.add_column(column, justify="right", no_wrap=console.width >= 80, overflow="fold")
    return table


def _last_line(prompt: Text) -> str:
    """The last line of a prompt, of a chat that of its last message."""
    text = (prompt if isinstance(prompt, str) else prompt[-1]["content"] or "").strip()
    return ("… " if "\n" in text else "") + text.rpartition("\n")[2]


def _one_line(response: Response) -> str:
    return " ".join(response.text.split()) + ("" if response.finished else " …")


def print_comparison(runs: Sequence[Run]) -> None:
    """Print the verdicts of several runs, and their paired comparisons by each scorer."""
    scorers = scorers_of(runs)
    table = results_table("Against their starts, on held-out prompts")
    table.columns[0].header = "run, scorer"
    for scorer in scorers:
        for run in runs:
            if (found := scorer.summary(run)) and run.summary:
                cells = found.cells(is_equal=run.summary.has_equal_lengths)
                table.add_row(f"{run.name}, {scorer.label}", *cells)
    print_line()
    print_line(table)
    table = Table(title="Prompt by prompt", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in PAIRED_HEAD:
        table.add_column(column, justify="left" if column in ("scorer", "A", "B") else "right", overflow="fold")
    for row in paired_rows(runs, scorers):
        table.add_row(*row)
    if table.row_count:
        print_line(table)
    if note := not_compared(runs, scorers):
        print_line(Styled(note, style="yellow"))
