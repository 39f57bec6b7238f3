"""From the rows of a source to tokenized examples; cut, dropped and unread parts are counted and reported."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from lit_align.arguments import CheckedArguments
from lit_align.console import phase
from lit_align.data.batches import Example
from lit_align.data.cache import OPTION, Report, TokenCache, code_version
from lit_align.data.encoding import AT_ONCE
from lit_align.data.formats.identity import identity_of
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Kind, Row, Rows, Turns, answer_text
from lit_align.data.given_rows import reading_rows
from lit_align.data.pairing import PairingRule, with_mismatched
from lit_align.data.sampling_prompt import SeenEnd
from lit_align.data.table import ExampleTable, digest_of_sample
from lit_align.data.tokenization import PreferenceTokenizer, RowIds, listing, notes_on
from lit_align.errors import UserError, amount
from lit_align.provenance import of_options

TABLE, HEADER = "examples.arrow", "examples.json"
SHOWN_FROM = 2000
"""Rows from which on a progress bar is shown."""
CHECKED = (8, 56)
"""How many of the first rows, and of the others, are decoded and compared with their text."""


@dataclass(frozen=True)
class Source(metaclass=CheckedArguments):
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

    argument_conversions = reading_rows("path")

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

    @property
    def options(self) -> dict[str, Any]:
        """All that names the rows; their weight does not."""
        path = str(Path(self.path).absolute()) if Path(self.path).exists() else self.path
        return vars(self) | {"path": path, "weight": None}

    @property
    def bytes_now(self) -> str:
        """Identifies the bytes of the source."""
        return identity_of(self.path, self.split)


class Selection(NamedTuple):
    """Some rows of one or more sources."""

    read: Callable[[], Rows]
    sources: Sequence[Source]  # those that decide which rows are read
    options: Mapping[str, Any]  # that decide it too; plain values


class Examples(NamedTuple):
    """Tokenized examples of a source, and what the run's header says about them."""

    examples: ExampleTable
    line: str
    labels: str  # how many responses are desirable and undesirable, if they are labelled
    unread: tuple[str, ...]  # columns that hold something and are not read
    notes: tuple[tuple[str, str], ...]  # further lines, such as on the chat template
    rows: int  # rows that they were made from
    prompt_ends: tuple[SeenEnd, ...] = ()  # the ways in which the chat template ends their prompts

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Examples that `save` wrote, and their table beside it."""
        header = json.loads((folder / HEADER).read_text())
        notes = tuple((name, text) for name, text in header.pop("notes"))
        table = ExampleTable.open(folder / TABLE, header.pop("digest"))
        ends = tuple(SeenEnd(*each) for each in header.pop("prompt_ends"))
        return cls(table, notes=notes, prompt_ends=ends, **header)

    def save(self, folder: Path) -> None:
        """Write all but the table."""
        header = self._asdict() | {"digest": self.examples.digest_of_tokens()}
        del header["examples"]
        (folder / HEADER).write_text(json.dumps(header))  # in ASCII: the name of a file may not be Unicode

    def describe(self, name: str, read_elsewhere: Collection[str] = ()) -> Iterator[tuple[str, str]]:
        """Lines of the run's header, under a name; columns that are read elsewhere are not unread."""
        yield name, self.line
        if self.labels:
            yield "labels", self.labels
        if unread := [column for column in self.unread if column not in read_elsewhere]:
            yield "not read", ", ".join(unread)
        yield from self.notes


@dataclass(frozen=True)
class ExampleMaker:
    """Makes the examples of a source from its rows.

    Args:
        tokenizer: Turns rows into tokens.
        pairing: Chooses from the responses of rows that have rewards.
        mismatched: Add labels, and a response to another prompt as one more branch.
        seed: Of the choice of rows whose tokens are compared with their text.
    """

    tokenizer: PreferenceTokenizer
    pairing: PairingRule
    mismatched: bool = False
    seed: int = 0

    def cached(self, cache: TokenCache, path: str, kind: Kind, selection: Selection) -> Examples:
        """The examples of some rows, from the cache; made first if they are not there.

        Raises:
            UserError: as for `make`, or the cache cannot be written to.
        """

        def make(folder: Path, report: Report) -> Examples:
            return self.make(selection.read(), path, kind, folder, report)

        rule = type(self.pairing)
        options = of_options("rule", vars(self.pairing)) | {
            "pairing": f"{rule.__module__}.{rule.__qualname__}",
            "mismatched": self.mismatched,
            "kind": kind,
            **selection.options,
        }
        return cached(cache, path, selection.sources, options, self.tokenizer, rule, make)

    def make(self, rows: Rows, path: str, kind: Kind, folder: Path, report: Report) -> Examples:
        """Write a table of the examples into a folder; cut, dropped and unread parts are counted.

        Args:
            path: The source's name, in messages.
            report: Called with the numbers of rows that are done, and of all, if there are many.

        Raises:
            UserError: nothing remains, only some rows have rewards or labels, none has rewards that the rule needs, or
                the tokens of a row do not spell its text.
        """
        if rows[0].rewards is None and not self.pairing.is_default:
            raise UserError(
                f"data.pairing={type(self.pairing).__name__} has no effect because the rule chooses by rewards, and "
                f"the rows of {path}, read as {kind}, have none. Leave it out, or give rewards (columns score_chosen "
                "and score_rejected, or responses and rewards)."
            )
        self.tokenizer.counts.clear()
        self.tokenizer.prompt_ends.clear()
        check_tokens(rows.rows, self.tokenizer, self.seed)
        counts = Counter(rows.skipped)
        table = self._table(self._paired(rows, counts, report), folder)
        counts.update(self.tokenizer.counts)
        sizes = table.group_sizes
        if len(sizes) > 1:  # a batch is of one K
            K, most = sizes.most_common(1)[0]
            counts[f"groups of other than {K} responses"] += sizes.total() - most
            table = self._table((each for each in table if len(each.response_ids) == K), folder)
        if not table:
            raise UserError(f"{path}: no row remains to train on: {listing(counts)}. Give other rows.")
        names = {"preferences": "groups", "labelled": "labelled responses"}
        what = "pairs" if len(table[0].response_ids) == 2 else names.get(kind, "texts")
        line = f"{amount(len(table), what)} from {path}: {rows.description}" + (
            f"; {listing(counts)}" if counts else ""
        )
        if self.mismatched:
            table = self._table(with_mismatched(table), folder)
        notes = (*describe_weights(table), *notes_on(self.tokenizer, rows.rows[: CHECKED[0]]))
        ends = tuple(self.tokenizer.prompt_ends.values())
        return Examples(table, line, count_labels(table), rows.unread, notes, len(rows), ends)

    def _table(self, examples: Iterable[Example], folder: Path) -> ExampleTable:
        return ExampleTable.write(folder / TABLE, examples, OPTION)

    def _paired(self, rows: Rows, counts: Counter[str], report: Report) -> Iterator[Example]:
        """The examples of all rows."""
        for row, tokens in self.tokenizer.rows(_alike(shown(rows, report))):
            if tokens is not None:
                examples, reasons = _pairs_of(row, tokens, self.pairing)
                counts.update(reasons)
                yield from examples


def shown(rows: Rows, report: Report) -> Iterator[Row]:
    """The rows; if there are many, a bar shows how many of them are done, and they are reported."""
    if len(rows) < SHOWN_FROM:
        yield from rows
        return
    with phase("tokenize", len(rows), "rows") as bar:
        for done, row in enumerate(rows, 1):
            yield row
            if done % AT_ONCE == 0 or done == len(rows):
                bar.advance(done - bar.done)
                report(done, len(rows))


def cached(
    cache: TokenCache,
    path: str,
    sources: Sequence[Source],
    options: Mapping[str, Any],
    tokenizer: PreferenceTokenizer,
    rule: type,
    make: Callable[[Path, Report], Examples],
) -> Examples:
    """Examples from the cache; made first if they are not there, or if the sources or the code have changed since.

    Args:
        path: Name of the sources.
        options: What decides the examples beside sources and tokenizer; plain values.
        rule: A class whose code decides them, too.
    """
    today = tokenizer.renderer.template.today
    state = {"code": code_version(rule), "today": today, "bytes": [each.bytes_now for each in sources]}
    options = {**options, **_options_of(tokenizer), "sources": [each.options for each in sources]}
    return Examples.read(
        cache.load_or_make(path, options, state, lambda folder, report: make(folder, report).save(folder))
    )


def _options_of(tokenizer: PreferenceTokenizer) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.encoder.identity,
        "template_args": tokenizer.renderer.template.arguments,
        "max_prompt_length": tokenizer.max_prompt_length,
        "max_response_length": tokenizer.max_response_length,
        "long_prompts": tokenizer.long_prompts,
        "wraps_prompts": tokenizer.wraps_prompts,
        "positions": tokenizer.positions,
    }


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


def digest_of_examples(table: ExampleTable) -> str:
    """Identifies the tokens of examples, their weights, labels and other numbers."""
    some, digests = table.sample()
    if table.weights is not None:
        digests.append(hashlib.sha256(table.weights.tobytes()).hexdigest())
    sample = [*([each.prompt_ids, *each.response_ids] for each in some), *digests, *table.digests_of_numbers()]
    return digest_of_sample(len(table), int(table.lengths.total.sum()), sample)


def count_labels(table: ExampleTable) -> str:
    """How many responses are desirable and undesirable, with a warning if only one kind is there; else nothing."""
    labels = table.numbers("labels")
    if labels is None:
        return ""
    good = int((labels > 0.5).sum())
    line = f"{good} desirable, {amount(len(labels) - good, 'undesirable responses')}"
    return line if 0 < good < len(labels) else f"{line} (warning: without both there is nothing to tell apart)"


def describe_weights(table: ExampleTable) -> Iterator[tuple[str, str]]:
    """The header's line on the weights of examples, if they have any."""
    if (weights := table.weights) is not None:
        yield "weights", f"{weights.min():g} to {weights.max():g}, {weights.mean():.4g} in the mean (column weight)"


def _pairs_of(row: Row, ids: RowIds, pairing: PairingRule) -> tuple[list[Example], Counter[str]]:
    """Examples to be written; their token ids are arrays, but for those that a rule chooses from."""
    prompt: Any = ids.prompt
    responses: list[Any] = ids.responses
    if len(responses) == 1:
        rewards = list(row.rewards) if row.rewards else None
        labels = [float(label) for label in row.labels] if row.labels else None
        example = Example(prompt, responses, row.source, rewards=rewards, labels=labels, weight=row.weight)
        return [example], Counter()
    if row.rewards:
        texts = [answer_text(answer) for answer in row.responses]
        group = Example(*ids.in_python(), row.source, rewards=list(row.rewards), texts=texts, weight=row.weight)
        pairs = pairing([group])
        return pairs.examples, pairs.counts + pairs.partial_drops
    chosen, *rejected = responses
    different = [each for each in rejected if each != chosen]
    equal = len(rejected) - len(different)
    examples = [Example(prompt, [chosen, each], row.source, weight=row.weight) for each in different]
    return examples, Counter({"equal after truncation": equal} if equal else {})


def _alike(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, of which all must have rewards and labels, or none: a batch has them for all its responses, or none."""
    first: Row | None = None
    for row in rows:
        first = first or row
        for name in ("rewards", "labels"):
            has = getattr(row, name) is not None
            if has != (getattr(first, name) is not None):
                raise UserError(
                    f"{row.source}: the row has {name if has else f'no {name}'}, but {first.source} has "
                    f"{'none' if has else 'some'}. Give {name} to every row, or to none."
                )
        yield row
