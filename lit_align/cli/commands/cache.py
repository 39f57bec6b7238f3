"""`cache` and `cache clear [NAME …]`: the tokenized data on disk."""

from pathlib import Path

from rich.table import Table

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line, relative
from lit_align.data.cache import Entry, TokenCache, default_folder
from lit_align.errors import UserError, amount


def run(args: list[str]) -> None:
    """List the entries of the cache, or delete some or all of them.

    Raises:
        UserError: there is no entry of a name.
    """
    parser = Arguments("cache", "List or clear the tokenized data that later starts read.")
    parser.add_argument("action", nargs="?", choices=["list", "clear"], default="list", help="default: list")
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries to clear, or their sources; default: all")
    parser.add_argument("--folder", metavar="FOLDER", help="the cache, where a run has data.cache_dir")
    given = parser.parse_args(args)
    cache = TokenCache(Path(given.folder) if given.folder else default_folder())
    entries = cache.entries()
    named = [entry for name in given.names for entry in _named(name, entries, cache.folder)]
    chosen = [entry for entry in entries if entry in named] if given.names else entries
    if given.action == "list":
        print_line(_table(chosen) if chosen else f"{relative(cache.folder)} is empty.")
        return
    for entry in chosen:
        cache.clear(entry)
    print_line(
        f"{len(chosen)} of {amount(len(entries), 'entries')} deleted, {_size(sum(entry.size for entry in chosen))}."
    )


def _named(name: str, entries: list[Entry], folder: Path) -> list[Entry]:
    found = [entry for entry in entries if name in (entry.path.name, entry.source)]
    if not found:
        names = ", ".join(entry.path.name for entry in entries) or "none"
        raise UserError(f"{relative(folder)} has no entry {name!r}. Its entries are: {names}.")
    return found


def _table(entries: list[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "source", "size", ""):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(entry.path.name, entry.source, _size(entry.size), "damaged" * entry.is_damaged)
    return table


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"
