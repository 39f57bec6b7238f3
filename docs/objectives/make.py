"""Make the pages beside this file, one per objective, from its code: `python docs/objectives/make.py`.

A page is the docstring of the objective's file (formula, source, where popular code differs), its options with their
defaults, and how to run it. A test compares the pages with what this makes.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lit_align import objectives
from lit_align.objectives import AnchoredObjective, PreferenceObjective

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
METRICS = {"metrics.preference": "pairs-labels-and-texts", "objectives.base": "training"}
"""Modules whose docstrings explain metrics, and their sections of `docs/metrics.md`."""


def pages() -> dict[str, str]:
    """File name → content of every page, the index included."""
    classes = [getattr(objectives, name) for name in objectives.__all__]
    kinds = [c for c in classes if isinstance(c, type) and issubclass(c, PreferenceObjective) and "formula" in vars(c)]
    kinds.sort(key=stem)
    index = ["# Objectives", "Each page is made from the code: `python docs/objectives/make.py`."]
    rows = [f"| [{kind.__name__}]({stem(kind)}.md) | {cell(kind.formula)} |" for kind in kinds]
    index += ["\n".join(["| class | loss |", "|---|---|", *rows])]
    index += ["## Options of all", options(PreferenceObjective)]
    index += ["## Options of those with an anchor", options(AnchoredObjective)]
    index += ["What they log is explained in [metrics](../metrics.md)."]
    return {"README.md": "\n\n".join(index) + "\n"} | {f"{stem(kind)}.md": page(kind) for kind in kinds}


def stem(kind: type) -> str:
    return kind.__module__.rpartition(".")[2]


def page(kind: type[PreferenceObjective]) -> str:
    """One objective's page."""
    module = inspect.getmodule(kind)
    assert module is not None
    shared = "options of all with an anchor, and of all" if issubclass(kind, AnchoredObjective) else "options of all"
    general = PreferenceObjective.__mro__ + AnchoredObjective.__mro__
    own = options(*(owner for owner in kind.__mro__ if owner not in general))
    beside = f"It {'also ' if own else ''}has the [{shared}](README.md)."
    code, test = f"../../lit_align/objectives/{stem(kind)}.py", f"../../tests/objectives/test_{stem(kind)}.py"
    parts = [f"# {kind.__name__}", f"`{kind.formula}`", linked(markdown(inspect.getdoc(module) or ""))]
    parts += ["## Options", *([own] if own else []), beside, "## Run it"]
    parts += ["```sh\n" + "".join(f"{command}\n" for command in commands(kind)) + "```"]
    parts += [f"[Code]({code}), [tests]({test}), [configuration](../../configs/{stem(kind)}.yaml)."]
    return "\n\n".join(parts) + "\n"


def linked(text: str) -> str:
    """The text, with links to the metrics that a module explains."""
    for module, section in METRICS.items():
        text = text.replace(f"`{module}`", f"[`{module}`](../metrics.md#{section})")
    return text


def markdown(docstring: str) -> str:
    """A docstring whose indented lines are formulas, and whose tables have bars within cells."""
    pieces = []
    for indented, lines in groupby(map(row, docstring.splitlines()), key=lambda line: line.startswith("    ")):
        block = textwrap.dedent("\n".join(lines)).strip("\n")
        pieces += [f"```text\n{block}\n```" if indented else block] if block else []
    return "\n\n".join(pieces)


def row(line: str) -> str:
    """A line; of a table's, each cell with its own bars escaped."""
    cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return f"| {' | '.join(map(cell, cells))} |" if line.startswith("| ") else line


def options(*owners: type) -> str:
    """A table of the arguments that these classes themselves document; empty without any."""
    rows = []
    for owner in owners:
        parameters = inspect.signature(owner).parameters
        rows += [
            f"| `{name}` | {default(parameters[name].default)} | {cell(' '.join(what.split()))} |"
            for name, what in documented(owner)
            if name in parameters and (name != "policy" or owner is PreferenceObjective)
        ]
    return "\n".join(["| `model.` | default | what |", "|---|---|---|", *rows]) if rows else ""


def documented(owner: type) -> list[tuple[str, str]]:
    """Name and text of each argument in the class's docstring."""
    text = (inspect.getdoc(owner) or "") + "\n"
    return re.findall(r"^    (\w+): (.*?)(?=^    \w+:|\Z)", text, re.MULTILINE | re.DOTALL)


def default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if callable(value):
        return "AdamW, lr 1e-6"
    if dataclasses.is_dataclass(value):
        return "as the policy starts"
    if value == ():
        return "`[]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def cell(words: str) -> str:
    return words.replace("|", "\\|")


def commands(kind: type[PreferenceObjective]) -> Iterator[str]:
    """The commands that run the configurations of an objective."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.stem in (stem(kind), f"pr_{stem(kind)}", f"tr_{stem(kind)}"):
            yield f"python train.py fit --config configs/{path.name}"


def main() -> None:
    """Write the pages, and delete those of removed objectives."""
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, content in made.items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
