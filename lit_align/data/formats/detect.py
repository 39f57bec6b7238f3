"""Detection of a data set's layout from its first row, and advice where no layout fits."""

from dataclasses import dataclass, replace

from lit_align.data.formats.columns import TARGETS
from lit_align.data.formats.layouts import LAYOUTS
from lit_align.data.formats.layouts.layout import Layout
from lit_align.data.formats.record import Record, columns_of
from lit_align.data.formats.rows import DataError, Kind, shortened


@dataclass(frozen=True)
class _Example:
    """What the error about unknown columns suggests.

    Args:
        wanted: Name of the rows.
        mapping: The simplest mapping.
        others: Other columns that are read.
        user: What learns from such rows; empty for prompts, which nearly all columns give.
    """

    wanted: str
    mapping: str
    others: str
    user: str = ""


_EXAMPLES: dict[Kind, _Example] = {
    "prompts": _Example("prompts", "prompt: …", "messages"),
    "preferences": _Example(
        "preferences",
        "prompt: …, chosen: …, rejected: …",
        "prompt + response_1 + response_2 + winner; prompt + responses + rewards (or ranks)",
        "objectives such as DPO",
    ),
    "labelled": _Example("labelled responses", "prompt: …, completion: …, label: …", "messages + label; pairs", "KTO"),
    "texts": _Example("texts", "prompt: …, completion: …", "messages; text; pairs", "SFT"),
}


def detect_layout(first: Record, kind: Kind) -> Layout:
    """The first layout that gives rows of this kind and that the first row fits.

    Raises:
        DataError: none does, or the first row has no prompt where others have one.
    """
    given = next((each for each in first.reading.sample if each.has("prompt")), None)
    if given is not None and "prompt" in first.values and not first.has("prompt"):
        raise DataError(
            f"{first.source}: `prompt` is null, but {given.source} has one. Fill it in, or take the row out."
        )
    if "message_tree_id" in first.values:
        raise DataError(
            f"{first.source}: `message_tree_id` shows that the rows are messages or trees of them. Make a chat "
            "(messages: [{role, content}, …]) of each path from a first message to an answer."
        )
    if (layout := _fitting(first, kind)) is None:
        raise _unknown_layout(first, kind)
    return layout


def _fitting(first: Record, kind: Kind) -> Layout | None:
    return next((layout for layout in LAYOUTS if kind in layout.kinds and layout.matches(first)), None)


def _unknown_layout(first: Record, kind: Kind) -> DataError:
    """The error for columns that no layout reads: which names to change, or how to map them."""
    example = _EXAMPLES[kind]
    if "segments" in first.values and kind != "texts":
        return DataError(
            f"{first.source}: `segments` are the parts of a text to imitate, and no {example.wanted} can be made of "
            "them. Imitate them (SFT), or give other data."
        )
    lowered = {name.strip().lower(): name for name in first.values}
    if _fitting(replace(first, values={name: first.values[lowered[name]] for name in lowered}), kind):
        changed = ", ".join(
            f"{name}: {given!r}" for name, given in lowered.items() if name in TARGETS and name != given
        )
        return DataError(
            f"{first.source}: the names of the columns {shortened(columns_of(first))} differ from those that are read "
            f"in case or spaces. Set columns={{{changed}}}."
        )
    others = (other for name, other in _EXAMPLES.items() if other.user and _fitting(first, name))
    fitting = next((f"; they are {other.wanted}, for {other.user}" for other in others), "")
    return DataError(
        f"{first.source}: no {example.wanted} can be read from the columns {shortened(columns_of(first))}{fitting}. "
        f"Say which is which with columns={{{example.mapping}}}: names, templates such as '{{question}} {{context}}', "
        f"or paths such as answers.0.text. These columns are read, too: {example.others}."
    )
