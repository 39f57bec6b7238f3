"""The prompts of a source, tokenized once: examples without responses, from which rounds are sampled."""

from collections.abc import Iterator
from pathlib import Path

from lit_align.data.batches import Example
from lit_align.data.cache import OPTION, Report, TokenCache
from lit_align.data.examples import CHECKED, TABLE, Examples, Source, cached, shown
from lit_align.data.formats.beside import columns_beside
from lit_align.data.formats.rows import Rows, Text
from lit_align.data.rendering import continues_text
from lit_align.data.table import ExampleTable, digest_of_sample
from lit_align.data.tokenization import PreferenceTokenizer, listing, notes_on
from lit_align.errors import UserError, amount
from lit_align.files import digest, repr_in_pieces


def read_prompts(source: Source, tokenizer: PreferenceTokenizer, cache: TokenCache) -> Examples:
    """The prompts of a source, from the cache; tokenized first if they are not there.

    Raises:
        UserError: the source cannot be read, no prompt remains, or the cache cannot be written to.
    """

    def make(folder: Path, report: Report) -> Examples:
        return _make(source.read("prompts"), source.path, tokenizer, folder, report)

    return cached(cache, source.path, [source], {"kind": "prompts"}, tokenizer, PreferenceTokenizer, make)


def _make(rows: Rows, path: str, tokenizer: PreferenceTokenizer, folder: Path, report: Report) -> Examples:
    tokenizer.counts.clear()
    table = ExampleTable.write(folder / TABLE, _tokenized(rows, tokenizer, report), OPTION)
    counts = rows.skipped + tokenizer.counts
    if not table:
        raise UserError(f"{path}: no prompt remains: {listing(tokenizer.counts)}. Give other prompts.")
    line = f"{amount(len(table), 'prompts')} from {path}: {rows.description}" + (
        f"; {listing(counts)}" if counts else ""
    )
    notes = tuple(notes_on(tokenizer, rows.rows[: CHECKED[0]]))
    return Examples(table, line, "", rows.unread, notes, len(rows))


def _tokenized(rows: Rows, tokenizer: PreferenceTokenizer, report: Report) -> Iterator[Example]:
    for row, ids in tokenizer.prompts(shown(rows, report)):
        continues = continues_text(tokenizer.as_chat(row))
        yield Example(ids, [], row.source, prompt=row.prompt, beside=columns_beside(row), continues=continues)


def texts_of(table: ExampleTable) -> Iterator[Text]:
    """The prompts as scorers read them."""
    return (example.prompt for example in table if example.prompt is not None)


def digest_of_prompts(table: ExampleTable) -> str:
    """Identifies all tokens of prompts, in their order."""
    return digest(repr_in_pieces(prompt.prompt_ids for prompt in table))


def identity_of_prompts(table: ExampleTable) -> str:
    """Identifies the tokens of prompts."""
    some, digests = table.sample()
    sample = [*(prompt.prompt_ids for prompt in some), *digests]
    return digest_of_sample(len(table), int(table.lengths.prompt.sum()), sample)
