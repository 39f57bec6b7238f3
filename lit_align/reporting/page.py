"""HTML of reports: one file without scripts that loads nothing; all text is escaped."""

import html
import math
import re
import unicodedata
from collections.abc import Sequence

from lit_align.metrics.win_rate import Estimate

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #f5f6f8; margin: 0; padding: 24px }
main { max-width: 1280px; margin: auto }
h1 { font-size: 22px; margin: 0 0 16px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 0 0 10px }
h3 { font-size: 14px; margin: 14px 0 6px; color: #555 }
section, figure { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px }
section { padding: 16px; margin: 0 0 16px }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 12px;
  margin: 0 0 16px }
figure { margin: 0; padding: 6px }
figure img { width: 100%; height: auto }
figcaption { color: #667; font-size: 12px; padding: 0 8px 6px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: 0 0 8px }
th { text-align: left; font-size: 12px; color: #667; font-weight: 600 }
th, td { padding: 6px 10px; border-bottom: 1px solid #eceff2; vertical-align: top }
.facts thead { display: none }
.facts td { overflow-wrap: anywhere; font-size: 13px }
.option { display: inline-block; max-width: 100% }
.facts td:first-child { color: #667; white-space: nowrap; width: 1% }
.numbers td { font-variant-numeric: tabular-nums }
.numbers small { display: block; white-space: pre-line; overflow-wrap: anywhere; color: #667; font-size: 12px }
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
  .facts td:first-child { width: auto }
  tr { border-bottom: 2px solid #dfe3e8; padding: 6px 0 }
  td { border: 0; padding: 2px 0 }
  td::before { content: attr(data-head); display: block; font-size: 11px; color: #667; font-weight: 600 }
  .numbers td { display: flex; justify-content: space-between; gap: 12px; text-align: right }
  .numbers td::before { text-align: left }
}
"""


BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of writing."""


def plain(words: str) -> str:
    """Text without control characters and characters that turn the direction of writing."""
    words = words.encode("utf-8", "replace").decode()
    return "".join("\ufffd" if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in BIDI else c for c in words)


def text(value: object) -> str:
    """Escaped, without control characters and what turns the direction of writing."""
    return html.escape(plain(str(value)))


def section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table of text, escaped; on a narrow screen each row becomes a block with the head beside each cell.

    In a table of numbers, the further lines of a cell are small. No line ends at an option's hyphens.
    """
    if not rows:
        return ""

    def content(cell: str) -> str:
        if kind == "facts":
            return re.sub(r"--\S+", r'<span class="option">\g<0></span>', text(cell))
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


def number(value: Estimate | None, percent: bool = False, like: Estimate | None = None) -> str:
    """A mean, on a second line its interval, to two digits of the interval's width, or of that of `like`."""
    if value is None:
        return "–"
    low, high = (like or value)[1:]
    digits = max(2, 1 - math.floor(math.log10(high - low))) if high > low else 3
    is_tiny = 0 < max(map(abs, value)) < 5e-4 and (digits > 6 or high == low)
    form = ".1%" if percent else ".2g" if is_tiny else f".{min(6, digits)}f"
    return f"{value.value:{form}}\n{value.low:{form}} to {value.high:{form}}".replace("-", "−")


def page(title: str, parts: Sequence[str]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{text(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )
