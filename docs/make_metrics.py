"""Make `metrics.md` beside this file from the docstrings that hold the formulas: `python docs/make_metrics.py`.

A docstring anywhere in `lit_align/` that has a table with the header `| metric | … |` or `| … | formula |` becomes a
section with the paragraph that leads to the table, the table, and the paragraphs that follow. A test compares the page
with what this makes.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
FAMILIES = {
    "loss": "Pairs, labels and texts",
    "learning_rate": "Training",
    "z0": "KTO",
    "round ": "Rounds",
    "round/": "Training of a round",
    "drift/": "Drift",
    "reference/refreshes": "Moving reference",
    "val/": "Held-out prompts",
    "difference": "Runs compared (`lit-align compare`)",
    "reference/": "Weights & Biases",
}
"""The beginning of a section's first metric → its heading, in the page's order; further sections follow."""
HEADER = re.compile(r"\| metric \| .* \||\| .* \| formula \|")
ARGUMENTS = re.compile(r"(Args|Returns|Raises|Example):$", re.MULTILINE)

INTRODUCTION = """\
# Metrics

This page is made from the docstrings that hold the formulas: `python docs/make_metrics.py`.

`metrics.csv` in a run's folder has every value; `report.html` plots them. A row holds what is logged at one time, so a
step has several rows. `step` counts optimizer steps: those before the update for `train/`, so that the first is 0, and
those done for all other metrics.

Names without a prefix (but `round`) are logged in training as `train/NAME`, and in validation as `val/NAME` where
validation computes them. The verdict on held-out prompts is explained in [results of a run](results.md)."""


class Section(NamedTuple):
    """A docstring with tables of metrics, and where it is."""

    path: str
    docstring: str


def sections() -> list[Section]:
    """Every docstring of the package that explains metrics, in the page's order."""
    found = []
    for file in sorted((ROOT / "lit_align").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if any(map(is_table, paragraphs(docstring))):
                    found.append(Section(file.relative_to(ROOT).as_posix(), docstring))
    return sorted(found, key=lambda section: family(section.docstring))


def family(docstring: str) -> int:
    """The place of a docstring's first metric in the page's order."""
    first = next(filter(is_table, paragraphs(docstring))).splitlines()[2].removeprefix("| ")
    return next((place for place, start in enumerate(FAMILIES) if first.startswith(start)), len(FAMILIES))


def heading(docstring: str) -> str:
    """The heading of the family, or else the docstring's first sentence."""
    if (place := family(docstring)) < len(FAMILIES):
        return list(FAMILIES.values())[place]
    return re.split(r"[.:;]", docstring.partition("\n\n")[0].replace("\n", " "))[0].replace("`", "")


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring, up to its arguments."""
    return re.split(r"\n{2,}", ARGUMENTS.split(docstring)[0].strip())


def is_table(paragraph: str) -> bool:
    return HEADER.fullmatch(paragraph.partition("\n")[0]) is not None


def body(docstring: str) -> Iterator[str]:
    """The first table with the paragraph that leads to it (it does not end with a full stop), and what follows."""
    parts = paragraphs(docstring)
    first = next(place for place, part in enumerate(parts) if is_table(part))
    leads = first > 1 and not parts[first - 1].endswith(".")
    for part in parts[first - leads :]:
        if is_table(part):
            yield "\n".join(map(row, part.splitlines()))
        elif part.startswith("    "):
            yield f"```text\n{part}\n```"
        else:
            yield part


def row(line: str) -> str:
    """A line of a table: names as code, each cell with its own bars escaped."""
    cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
    if len(cells) > 1 and cells[1] not in ("formula", "content"):
        cells[0] = re.sub(r"[\w/…]*[\w…][\w/…]*", r"`\g<0>`", cells[0]) if is_name(cells[0]) else cells[0]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" if len(cells) > 1 else line


def is_name(cell: str) -> bool:
    """Whether a cell lists names of metrics, not words."""
    return re.fullmatch(r"[\w/…]+(, [\w/…]+)*", cell) is not None


def names() -> set[str]:
    """All names of metrics in the tables' first columns."""
    rows = (line for section in sections() for part in paragraphs(section.docstring) if is_table(part)
            for line in part.splitlines()[2:])  # fmt: skip
    cells = (line.removeprefix("| ").partition(" | ")[0] for line in rows)
    return {name for cell in cells if is_name(cell) for name in cell.split(", ")}


def page() -> str:
    """The page's content."""
    parts = [INTRODUCTION]
    for path, docstring in sections():
        parts += [f"## {heading(docstring)}", *body(docstring), f"From [{path}](../{path})."]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (FOLDER / "metrics.md").write_text(page(), encoding="utf-8")
