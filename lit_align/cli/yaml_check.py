"""Mistakes in a YAML file that its parser does not report, or not with their line."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_align.errors import UserError


def check_yaml(path: Path) -> None:
    """Check a configuration before it is parsed. Other mistakes are left to its parser.

    Raises:
        UserError: the file is not UTF-8, is indented with tabs, has a decimal comma within braces, or gives a key twice
            (a parser takes the last).
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
    if comma := next(_decimal_commas(root), None):
        number, line = comma
        point = number.replace(",", ".")
        raise UserError(f"config: {number} in line {line} must be written with a point. Write {point}.")
    for key, first, second in _repeated(root, ""):
        raise UserError(f"config: {key} is given twice, in lines {first} and {second}. Delete one.")


def _decimal_commas(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Each number like 0,001 within braces, which a parser reads as 0 and an option 001, with its line."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _decimal_commas(entry)
    if isinstance(node, yaml.MappingNode):
        before: yaml.Node | None = None
        for key, value in node.value:
            digits = node.flow_style and isinstance(key, yaml.ScalarNode) and key.value.isdecimal()
            if digits and value.value == "" and before is not None:
                yield f"{before.value},{key.value}", key.start_mark.line + 1
            yield from _decimal_commas(value)
            before = value if isinstance(value, yaml.ScalarNode) else None


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
