"""From the rows of a source to tokenized examples; cut, dropped and unread parts are counted and reported."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lit_align.data.batches import Example
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Kind, Row, Rows, Turns, answer_text
from lit_align.data.pairing import PairingRule
from lit_align.data.tokenization import PreferenceTokenizer, listing
from lit_align.errors import UserError
from lit_align.needs import DataNeeds
from lit_align.provenance import digest_of

CHECKED = (8, 56)
"""How many of the first rows, and of the others, are decoded and compared with their text."""


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Args:
        path: A file, a saved data set, a run's folder with rounds, or a hub name.
        weight: How often each row is trained on in an epoch: 2 is twice; 0.5 is every other epoch, half of the rows in
            each.
        split: Split of a saved or hub data set; of rounds with several scorers, a part of the name of one.
        columns: Source of each column, as in data.columns; None is data.columns.
        ignore_columns: Columns that are left out although they may belong to the prompt; None is data.ignore_columns.
        turns: Of a chat that is imitated, train on all of the assistant's turns or the last; None is data.turns.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    columns: dict[str, str] | None = None
    ignore_columns: list[str] | None = None
    turns: Turns | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"data.train: weight={self.weight} of {self.path} must be above 0. Leave the source out.")

    def read(self, kind: Kind) -> Rows:
        """Read the rows."""
        return read_rows(
            self.path,
            split=self.split,
            kind=kind,
            columns=self.columns,
            ignore_columns=self.ignore_columns or (),
            turns=self.turns or "all",
        )


class Examples(NamedTuple):
    """Tokenized examples of a source, and what the run's header says about them."""

    examples: list[Example]
    line: str
    unread: tuple[str, ...] = ()  # columns that hold something and are not read
    notes: tuple[tuple[str, str], ...] = ()  # further lines, such as on the chat template

    def describe(self, name: str) -> Iterator[tuple[str, str]]:
        """Lines of the run's header, under a name."""
        yield name, self.line
        if labels := count_labels(self.examples):
            yield "labels", labels
        if self.unread:
            yield "not read", ", ".join(self.unread)
        yield from self.notes


def make_examples(
    rows: Rows, path: str, kind: Kind, tokenizer: PreferenceTokenizer, pairing: PairingRule, seed: int = 0
) -> Examples:
    """Tokenize rows and pair their responses.

    Args:
        path: The source's name, in messages.
        pairing: Chooses from the responses of rows that have rewards.
        seed: Of the choice of rows whose tokens are compared with their text.

    Raises:
        UserError: nothing remains, only some rows have rewards or labels, none has rewards that the rule needs, or the
            tokens of a row do not spell its text.
    """
    _check_alike(rows)
    if rows[0].rewards is None and not pairing.is_default:
        raise UserError(
            f"data.pairing={type(pairing).__name__} has no effect because the rule chooses by rewards, and the "
            f"rows of {path}, read as {kind}, have none. Leave it out, or give rewards (columns score_chosen and "
            "score_rejected, or responses and rewards)."
        )
    tokenizer.counts.clear()
    check_tokens(rows.rows, tokenizer, seed)
    counts = Counter(rows.skipped)
    examples: list[Example] = []
    for row in rows:
        found, reasons = _pairs_of(row, tokenizer, pairing)
        examples += found
        counts.update(reasons)
    counts.update(tokenizer.counts)
    sizes = Counter(len(example.response_ids) for example in examples)
    if len(sizes) > 1:  # a batch is of one K
        K, most = sizes.most_common(1)[0]
        counts[f"groups of other than {K} responses"] += sizes.total() - most
        examples = [example for example in examples if len(example.response_ids) == K]
    if not examples:
        raise UserError(f"{path}: no row remains to train on: {listing(counts)}.")
    names = {"preferences": "groups", "labelled": "labelled responses"}
    what = "pairs" if len(examples[0].response_ids) == 2 else names.get(kind, "texts")
    line = f"{len(examples)} {what} from {path}: {rows.description}"
    line += f"; {listing(counts)}" if counts else ""
    return Examples(examples, line, rows.unread, tuple(tokenizer.notes(rows.rows[: CHECKED[0]])))


def account_of(
    rows: Rows,
    prompts: Sequence[tuple[Row, list[int]]],
    counts: Counter[str],
    path: str,
    tokenizer: PreferenceTokenizer,
) -> Examples:
    """What the run's header says about prompts; there are no examples yet.

    Args:
        prompts: Those that are kept of the rows.
        counts: Prompts that were dropped or cut, by reason.
    """
    skipped = rows.skipped + counts
    line = f"{len(prompts)} prompts from {path}: {rows.description}" + (f"; {listing(skipped)}" if skipped else "")
    return Examples([], line, rows.unread, tuple(tokenizer.notes(row for row, _ in prompts[: CHECKED[0]])))


def check_tokens(rows: Sequence[Row], tokenizer: PreferenceTokenizer, seed: int = 0) -> None:
    """Check that the tokens of the first rows and of a sample of the others spell the text that they come from.

    Raises:
        UserError: the tokens of a row do not.
    """
    first, more = CHECKED
    others = range(first, len(rows))
    sample = random.Random(seed).sample(others, min(more, len(others)))
    for place in [*range(min(first, len(rows))), *sample]:
        tokenizer.check(rows[place])


def hold_out(parts: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], Rows]:
    """Split the rows of sources into those to train on and a held-out share of the prompts.

    All rows of a prompt are on one side. The choice depends on the prompts and the seed alone.

    Raises:
        UserError: a source keeps no rows, or none are held out.
    """

    def key(row: Row) -> str:
        text = json.dumps(row.prompt, sort_keys=True, default=str)
        return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).hexdigest()

    prompts = sorted({key(row) for rows in parts for row in rows})
    held = set(prompts[: round(share * len(prompts))])
    train = [replace(rows, rows=[row for row in rows if key(row) not in held]) for rows in parts]
    others = [row for rows in parts for row in rows if key(row) in held]
    if not others or not all(train):
        raise UserError(
            f"data.validation={share} must leave prompts on both sides, and there are {len(prompts)}. Change the "
            "share, or name a file."
        )
    return train, replace(parts[0], rows=others, skipped=Counter())


def check_joinable(sources: Sequence[Source], parts: Sequence[Sequence[Example]]) -> None:
    """Check that a batch can hold examples of all sources.

    Raises:
        UserError: they differ in the number of responses, or only some have rewards or labels.
    """

    def form(examples: Sequence[Example]) -> str:
        first = examples[0]
        given = [name for name in ("rewards", "labels") if getattr(first, name) is not None]
        return f"{len(first.response_ids)} responses with {' and '.join(given) or 'no rewards and no labels'}"

    forms = [form(examples) for examples in parts]
    for source, other in zip(sources, forms, strict=True):
        if other != forms[0]:
            raise UserError(
                f"data.train: examples of {source.path} have {other}, those of {sources[0].path} have {forms[0]}. "
                "Give sources of one form."
            )


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Identifies the tokens of examples."""
    return digest_of([[example.prompt_ids, *example.response_ids] for example in examples])


def count_labels(examples: Sequence[Example]) -> str:
    """How many responses are desirable and undesirable, with a warning if only one kind is there; else nothing."""
    labels = [label for example in examples if isinstance(example.labels, list) for label in example.labels]
    if not labels:
        return ""
    good = sum(label > 0.5 for label in labels)
    line = f"{good} desirable, {len(labels) - good} undesirable responses"
    return line if 0 < good < len(labels) else f"{line} (warning: without both there is nothing to tell apart)"


def _pairs_of(row: Row, tokenizer: PreferenceTokenizer, pairing: PairingRule) -> tuple[list[Example], Counter[str]]:
    tokens = tokenizer.row(row)
    if tokens is None:
        return [], Counter()
    prompt_ids, responses = tokens
    texts = [answer_text(answer) for answer in row.responses]
    rewards = list(row.rewards) if row.rewards else None
    group = Example(prompt_ids, responses, row.source, rewards=rewards, texts=texts)
    if len(responses) == 1:
        labels = [float(label) for label in row.labels] if row.labels else None
        return [replace(group, labels=labels)], Counter()
    if group.rewards is not None:
        pairs = pairing([group])
        return pairs.examples, pairs.counts + pairs.partial_drops
    chosen, *rejected = responses
    different = [ids for ids in rejected if ids != chosen]
    equal = len(rejected) - len(different)
    examples = [Example(prompt_ids, [chosen, ids], row.source) for ids in different]
    return examples, Counter({"equal after truncation": equal} if equal else {})


def _check_alike(rows: Rows) -> None:
    """Check that all rows have rewards and labels, or none: a batch has a number for each response, or for none."""
    for row in rows:
        for name in ("rewards", "labels"):
            has, first_has = (getattr(each, name) is not None for each in (row, rows[0]))
            if has != first_has:
                raise UserError(
                    f"{row.source}: the row has {name if has else f'no {name}'}, but {rows[0].source} has "
                    f"{'some' if first_has else 'none'}. Give {name} to every row, or to none."
                )


def check_pairing(pairing: PairingRule, needs: DataNeeds, name: str, *, sampled: bool) -> None:
    """Check that an objective can train on a pairing rule's examples.

    Args:
        name: The objective's, in messages.
        sampled: The rule selects from a round's responses; rows of texts need no selection.

    Raises:
        UserError: it needs the other kind.
    """
    if needs.data_kind == "texts" and sampled and not pairing.gives_texts:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} imitates one response. Use data.pairing=Best, the best of "
            "each prompt's responses."
        )
    if pairing.gives_texts and needs.data_kind != "texts":
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} compares responses, and this rule keeps one. Use "
            "BestWorst, or SFT, which imitates one response."
        )
    if pairing.gives_groups and not needs.takes_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}, as configured, compares two responses. Use "
            "BestWorst, or learn from rewards (model.reward_temperature of DPO and EXO)."
        )
    if pairing.gives_labels and not needs.takes_labels:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: soft labels (labels=soft, ties=half) have no effect on {name}, "
            "as configured. Leave them out, or use DPO, IPO, CPO, ORPO or MPO."
        )
    if needs.needs_whole_groups and not pairing.gives_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}'s constant is estimated from all responses that were "
            "sampled. Take Listwise, or leave model.estimate_baseline out."
        )


def check_fits(examples: Sequence[Example], positions: int | None) -> None:
    """Check that the model reads all of each example. A GGUF file says how much it reads only once it is loaded.

    Args:
        positions: The model's maximum number of tokens, prompt and response together; None without a limit.

    Raises:
        UserError: an example is longer.
    """
    for example in examples if positions is not None else ():
        tokens = len(example.prompt_ids) + max(map(len, example.response_ids))
        if tokens > positions:  # type: ignore[operator]
            raise UserError(
                f"{example.source}: prompt and response have {tokens} tokens, but the model reads {positions}. Lower "
                f"data.max_prompt_length and data.max_response_length to at most {positions} together."
            )
