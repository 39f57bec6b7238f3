"""``lit-align rounds show RUN --round 2``: the best and the worst response to each prompt of a round."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text as Styled

from lit_align.console import console, print_line
from lit_align.data.formats.rows import Text
from lit_align.data.rounds.store import StoredRound, read_rounds
from lit_align.errors import UserError


def show(run: str, round: int | None = None, rows: int = 10, scorer: str | None = None) -> None:
    """Print a line for each round; of one round, the best and the worst response to each prompt.

    Args:
        run: Folder of a run, of its rounds, or of one round.
        round: Which one, counted from 1 as on the screen; None is all, or the only one.
        rows: Prompts shown, those with the widest margin first.
        scorer: A part of the scorer's name, where several scored the round.
    """
    if rows < 1:
        raise UserError(f"rounds show: --rows={rows} must be at least 1.")
    rounds = read_rounds(run, scorer)
    if round is None and len(rounds) > 1:
        print_line(summary(rounds))
        print_line(f"  the responses of one: rounds show {run} --round N")
        return
    wanted = rounds[0].number if round is None else round
    chosen = [stored for stored in rounds if stored.number == wanted]
    if not chosen:
        numbers = ", ".join(dict.fromkeys(str(stored.number) for stored in rounds))
        raise UserError(f"rounds show: --round={wanted}: {run} has the rounds {numbers}.")
    stored = chosen[-1]
    if len(chosen) > 1:
        others = ", ".join(each.path.name for each in chosen[:-1])
        print_line(f"  the newest of {len(chosen)}; older ones, of other settings: {others}")
    for line in account(stored):
        print_line(line)
    print_line(table(stored, rows))


def summary(rounds: Sequence[StoredRound]) -> Table:
    """A line for each round."""
    made = Table(box=None, pad_edge=False)
    for column in ("round", "prompts", "responses", "reward", "best", "worst", "finished", "folder"):
        made.add_column(column, justify="left" if column == "folder" else "right")
    for stored in rounds:
        rewards = [row["scores"] for row in stored.rows]
        numbers = [_mean([r for each in rewards for r in each]), _mean(map(max, rewards)), _mean(map(min, rewards))]
        finished = _mean([done for row in stored.rows for done in row["finished"]])
        counts = [stored.number, len(rewards), sum(map(len, rewards))]
        made.add_row(*map(str, counts), *(f"{n:.3f}" for n in numbers), f"{finished:.0%}", stored.path.name)
    return made


def account(stored: StoredRound) -> list[str]:
    """What there is to say of a round before its table."""
    rewards = [reward for row in stored.rows for reward in row["scores"]]
    parts = stored.rows[0].get("parts") or {} if stored.rows else {}
    return [
        f"round {stored.number} · {len(stored.rows)} prompts · {len(rewards)} responses · mean reward "
        f"{_mean(rewards):.3f} · {stored.path}",
        f"scorer {stored.scorer}",
        *(f"  mean {name} {_mean(part for row in stored.rows for part in row['parts'][name]):.3f}" for name in parts),
    ]


def table(stored: StoredRound, count: int) -> Table:
    """The best and the worst response to each of `count` prompts, the widest margins first."""
    order = sorted(stored.rows, key=lambda row: min(row["scores"]) - max(row["scores"]))[:count]
    width = max(20, (console.width - 4) // 3)
    made = Table(pad_edge=False, show_lines=True)
    for column in ("prompt", "best", "worst"):
        made.add_column(column, overflow="fold", ratio=1, max_width=width)
    for row in order:
        ranked = sorted(range(len(row["scores"])), key=lambda place: -row["scores"][place])
        cells = [Styled(shown(_words(row["prompt"]), 6 * width, end=True))]
        for place in (ranked[0], ranked[-1]):
            cell = Styled(f"{row['scores'][place]:+.3f} ", style="bold")
            cells.append(cell.append(shown(row["responses"][place], 6 * width), style="not bold"))
        made.add_row(*cells)
    return made


def shown(text: str, width: int, end: bool = False) -> str:
    """Text that may stand on a terminal: no control characters, ⏎ for a new line, at most `width` characters.

    Args:
        end: Keep the end of what is too long, not its beginning.
    """
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " if c == "\t" else "�" for c in text)
    if len(text) <= width:
        return text
    return f"…{text[-width + 1 :]}" if end else f"{text[: width - 1]}…"


def _words(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
