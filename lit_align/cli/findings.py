"""The patterns by which jsonargparse's report of an error is read.

It reports an error as a tree with a branch for each type that was tried. The first finding that says what is wrong
decides; those above it say where. Other branches (a NoneType was expected) say nothing.
"""

import re

PATTERNS = {
    "key": r"""Parser key "(?P<key>[^"]+)":""",
    "cls": r"Problem with given class_path '(?P<cls>[^']+)':",
    "callable": r"expects a function or a callable class:(?=.*?class_path='(?P<callable>[^']+)')",
    "subtypes": r"Subtypes: \[(?P<subtypes>[^\n]*)\]",
    "option": r"(?:Group '(?P<group>[^']*)'|Subcommand '\w+') does not accept option '(?P<option>[^']+)'",
    "extra": r"Option '(?P<extra>[^']+)' is not accepted",
    "argument": r"unrecognized arguments: (?P<argument>\S+)",
    "required": r"arguments are required: (?P<required>(?:(?!\. Got value)[^\n])+)",
    "other": r"Import path (?P<other>\S+) does not correspond to a subclass",
    "unnamed": r"(?P<unnamed>Not a valid subclass)",
    "path": r"Unexpected import path format: (?P<path>[^\n]+)",
    "made": r"Expected '(?P<made>[^']+)' to be a (?:function that returns|subclass of) <class '(?P<of>\w+)'>",
    "type": r"Expected an? (?P<type>(?!path but)\S[^\n]*)",
    "file": r"File does not exist: '(?P<file>[^\n]+)'",
    "unloadable": r"Unable to load config '(?P<unloadable>[^']+)'",
    "yaml": r"(?:Problems parsing|Unexpected) config:(?P<yaml>.*)",
    "command": r"invalid choice: '(?P<command>[^']+)'",
    "nothing": r'expected "(?P<nothing>subcommand)" to be',
    "flag": r"argument (?P<flag>\S+): ignored explicit argument",
    "bare": r"argument (?P<bare>\S+): expected one argument",
}
"""Each fills the group of its own name."""

FINDING = re.compile("|".join(PATTERNS.values()), re.DOTALL)
