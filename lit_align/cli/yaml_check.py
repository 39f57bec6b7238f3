"""Mistakes in a YAML file that its parser does not report, or not with their line."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_align.errors import UserError


def check_yaml(path: Path) -> None:
    """Check a configuration before it is parsed. Other mistakes are left to its parser.

    Raises:
        UserError: the file is not UTF-8, is indented with tabs, or gives a key twice, of which a parser takes the last.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"config: line {line} is not UTF-8. Save the file with the encoding UTF-8.") from error
    except OSError:
        return
    try:
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        if tab := re.search(r"^ *\t", text, re.MULTILINE):
            line = text[: tab.start()].count("\n") + 1
            raise UserError(f"config: line {line} is indented with a tab. Indent with spaces.") from error
        return
    for key, first, second in _repeated(root, ""):
        raise UserError(f"config: {key} is given twice, in lines {first} and {second}. Delete one.")


def _repeated(node: yaml.Node | None, where: str) -> Iterator[tuple[str, int, int]]:
    """Each key that is in one mapping twice, with the lines of both."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _repeated(entry, where)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{where}{key.value}", key.start_mark.line + 1
            if name in lines:
                yield name, lines[name], line
            lines[name] = line
            yield from _repeated(value, f"{name}.")
