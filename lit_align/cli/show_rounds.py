"""``lit-align rounds show RUN --round 2``: the best and the worst response to each prompt of a round."""

import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text as Styled

from lit_align.console import command, console, print_line, printable
from lit_align.data.formats.rows import Text
from lit_align.data.rounds.row_types import SampledTexts
from lit_align.data.rounds.stored import StoredRound, read_rounds
from lit_align.errors import UserError, amount, check_number, decimal


def show(run: str, round: int | None = None, rows: int = 10, scorer: str | None = None) -> None:
    """Print a line for each round, or the best and the worst response to each prompt of one round.

    Args:
        run: Folder of a run, of its rounds, or of one round.
        round: Number of the round, counted from 1 as on the screen; None is all rounds, or the only one.
        rows: Prompts shown, those with the widest margin first.
        scorer: A part of the scorer's name, where several scored the round.
    """
    check_number("rounds show: --rows", rows, least=1)
    rounds = read_rounds(run, scorer)
    if round is None and len(rounds) > 1:
        print_line(summary(rounds))
        print_line(f"  the responses of one: {command('rounds', 'show', run, '--round', 'N')}")
        return
    wanted = rounds[0].number if round is None else round
    chosen = [stored for stored in rounds if stored.number == wanted]
    if not chosen:
        numbers = ", ".join(dict.fromkeys(str(stored.number) for stored in rounds))
        raise UserError(f"rounds show: --round={wanted} must be one of the rounds in {run}: {numbers}.")
    stored = chosen[-1]
    if len(chosen) > 1:
        others = ", ".join(each.path.name for each in chosen[:-1])
        print_line(f"  the newest of {len(chosen)}; older ones, with other settings: {others}")
    for line in heading(stored):
        print_line(line)
    print_line(table(stored, rows))


def summary(rounds: Sequence[StoredRound]) -> Table:
    """A line for each round."""
    made = Table(box=None, pad_edge=False)
    for column in ("round", "prompts", "responses", "reward", "best", "worst", "finished", "folder"):
        made.add_column(column, justify="left" if column == "folder" else "right", overflow="fold")
    for stored in rounds:
        rewards = stored.numbers.rewards
        numbers = [rewards.mean(), rewards.max(1).mean(), rewards.min(1).mean()]
        known = stored.numbers.finished[~np.isnan(stored.numbers.finished)]
        finished = known.mean() if known.size else math.nan
        counts = [stored.number, len(rewards), rewards.size]
        made.add_row(*map(str, counts), *map(decimal, numbers), f"{finished:.0%}", stored.path.name)
    return made


def heading(stored: StoredRound) -> list[str]:
    """The lines above a round's table: counts, mean reward and its parts, the scorer."""
    rewards = stored.numbers.rewards
    return [
        f"round {stored.number} · {amount(len(rewards), 'prompts')} · {amount(rewards.size, 'responses')} · "
        f"mean reward {decimal(rewards.mean())} · {stored.path}",
        f"scorer {stored.numbers.scorer}",
        *(f"  mean {name} {decimal(mean)}" for name, mean in stored.numbers.part_means.items()),
    ]


def table(stored: StoredRound, count: int) -> Table:
    """The best and the worst response to each of `count` prompts, the widest margins first."""
    width = max(20, (console.width - 4) // 3)
    made = Table(pad_edge=False, show_lines=True)
    for column in ("prompt", "best", "worst"):
        made.add_column(column, overflow="fold", ratio=1, max_width=width)
    for sample, rewards in widest(stored, count):
        places = sorted(range(len(rewards)), key=lambda place: -rewards[place])
        cells = [Styled(one_line(_words(sample.prompt), 6 * width, end=True))]
        for place in (places[0], places[-1]):
            cell = Styled(f"{decimal(rewards[place], '+.3f')} ", style="bold")
            cells.append(cell.append(one_line(sample.responses[place], 6 * width), style="not bold"))
        made.add_row(*cells)
    return made


def widest(stored: StoredRound, count: int) -> list[tuple[SampledTexts, list[float]]]:
    """The rows with the widest margins, with their rewards; only the batches that hold them are read."""
    batch, rewards = stored.numbers.batch, stored.numbers.rewards
    places = np.argsort(rewards.min(1) - rewards.max(1), kind="stable")[:count].tolist()
    rows = {number: stored.batch(number) for number in dict.fromkeys(batch[places].tolist())}
    within = [(int(batch[place]), place - int(np.argmax(batch == batch[place]))) for place in places]
    return [rows[number][row] for number, row in within if rows[number]]


def one_line(text: str, width: int, end: bool = False) -> str:
    """A text as one line of at most `width` characters, with ⏎ for a line break.

    Args:
        end: Keep the end of a longer text, not its beginning.
    """
    text = printable(text.replace("\n", "⏎").replace("\t", " "))
    if len(text) <= width:
        return text
    return f"…{text[-width + 1 :]}" if end else f"{text[: width - 1]}…"


def _words(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
