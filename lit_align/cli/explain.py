"""One paragraph per error: jsonargparse's report, reduced to the key, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import pydoc
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_align.callbacks import (
    Drift,
    FSDPSharding,
    Predictions,
    ReferenceRefresh,
    WandbReport,
    WinRate,
)
from lit_align.cli.commands import COMMANDS
from lit_align.objectives import PreferenceObjective

# Callbacks with a name of their own at top level. Of the list `trainer.callbacks` the command line reaches
# only the last, so nothing in it can be swept. Their class is implied: `reference_refresh: {alpha: 0.6}`.
NAMED_CALLBACKS: dict[str, type[Callback]] = {
    "reference_refresh": ReferenceRefresh,
    "win_rate": WinRate,
    "predictions": Predictions,
    "wandb_report": WandbReport,
    "checkpoint": ModelCheckpoint,
    "drift": Drift,
    "fsdp_sharding": FSDPSharding,
}


# --- what it says ---

# jsonargparse reports an error as a tree with a branch for each type that was tried. The first thing wrong is
# the one to name, what stands above it says where; other branches (a NoneType was expected) say nothing.
FINDING = re.compile(
    r"""Parser\ key\ "(?P<key>[^"]+)":
    | Problem\ with\ given\ class_path\ '(?P<cls>[^']+)':
    | expects\ a\ function\ or\ a\ callable\ class:(?=.*?class_path='(?P<callable>[^']+)')
    | Subtypes:\ \[(?P<subtypes>[^\n]*)\]
    | (?:Group\ '(?P<group>[^']*)'|Subcommand\ '\w+')\ does\ not\ accept\ option\ '(?P<option>[^']+)'
    | Option\ '[^']+'\ is\ not\ accepted\ (?P<early>before\ subcommand)
    | Option\ '(?P<extra>[^']+)'\ is\ not\ accepted
    | unrecognized\ arguments:\ (?P<argument>\S+)
    | arguments\ are\ required:\ (?P<required>[^\n]+)
    | Import\ path\ (?P<other>\S+)\ does\ not\ correspond\ to\ a\ subclass
    | (?P<unnamed>Not\ a\ valid\ subclass)
    | Expected\ an?\ (?P<type>(?!path\ but)\S[^\n]*)
    | File\ does\ not\ exist:\ '(?P<file>[^\n]+)'
    | (?:Problems\ parsing|Unexpected)\ config:(?P<yaml>.*)
    | invalid\ choice:\ '(?P<command>[^']+)'
    | expected\ "(?P<nothing>subcommand)"\ to\ be
    | argument\ (?P<bare>\S+):\ expected\ one\ argument
    """,
    re.VERBOSE | re.DOTALL,
)
WORDS = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "text", "NoneType": "null"}


def explain(message: str, parser: LightningArgumentParser) -> str:
    """jsonargparse's report as one paragraph: the key, the value, the mend."""
    where, cls, base = "", None, None
    see, example = f"See: {program()} fit --help", f"{program()} fit --config X.yaml"
    for found in FINDING.finditer(message):
        text = found[found.lastgroup or 0]
        match found.lastgroup:
            case "key":
                where = below(where, cls, text)
            case "subtypes":
                base = next(filter(inspect.isclass, map(locate, re.findall(r"\w+\.[\w.]+", text))), None)
            case "cls" | "callable":
                see = see if cls else f"See: {program()} fit --{where}.help={text.rpartition('.')[2]}"
                cls = locate(text)
                if cls is None:
                    reason = message[found.end() :].strip().partition("\n")[0]
                    return f"{where}: cannot import '{text}' ({reason}). {known(base)}"
            case "argument" if not (cls or text.startswith("-")):
                return f"'{text}' is not understood: options are written --key=value. {see}"
            case "option" | "extra" | "argument":
                return unknown_option(where, cls, text, found["group"], parser, see)
            case "required" if cls is None:  # 'fit.model, fit.data'
                missing = max(key.rpartition(".")[2] for key in text.split(", "))
                which = known(PreferenceObjective if missing == "model" else LightningDataModule)
                return f"{missing}: not given. Name a YAML ({example}) or a class (--{missing}=NAME). {which}"
            case "required":
                keys = [below(where, cls, key) for key in text.split(", ")]
                return f"{' and '.join(keys)}: needed by {name(cls)}, and not given. {see}"
            case "other":
                return f"{where}: {text} is no {name(base)}. {known(base)}"
            case "unnamed":
                return f"{where}: no class is named (class_path: NAME, options under init_args:). {known(base)}"
            case "type":
                return wrong_value(where, base, message[found.start() :], see)
            case "file":
                file, there = relative(text), map(relative, Path(text).parent.glob("*"))
                return f"{where}: there is no file '{file}'.{did_you_mean(file, there, 0.8)}"
            case "yaml":
                problem = " ".join(text.replace('in "<unicode string>", ', "at ").split())
                return f"config: no YAML with keys and values: {textwrap.shorten(problem, 200)!r}"
            case "early":
                return f"the command comes first: {example}. {known_commands()}"
            case "command":
                hint = did_you_mean(text, command_names())
                return f"there is no command '{text}'.{hint} {known_commands()}"
            case "nothing":
                return f"what is to be done? {example}. {known_commands()}"
            case "bare":
                return f"{text}: it, or the option of it that was named, needs a value: --key=value. {see}"
    return " ".join(message.split())


def unknown_option(where: str, cls: Any, option: str, group: str | None, parser: Any, see: str) -> str:
    """`group` is the dataclass among the options of `cls` that lacks the option."""
    option = option.removeprefix("--").partition("=")[0]
    option = f"{group}.{option}" if group else option
    if cls is None:
        bases = {"model": PreferenceObjective, **NAMED_CALLBACKS}
        deep = [f"{key}.{o}" for key, base in bases.items() for c in subclasses(base) for o in options(c)]
        hint = did_you_mean(option, [*(action.dest for action in parser._actions), *deep])
        return f"{option}: there is no such option.{hint} {see}"
    if option == "class_path":
        return f"{where}: beside class_path:, the options of a class stand under init_args:."
    parent = option.rpartition(".")[0]
    siblings = [key for key in options(cls) if not parent or key.rpartition(".")[0] == parent]
    names = dict.fromkeys(key.removeprefix(f"{parent}.").partition(".")[0] for key in siblings)
    listed = f" Options: {', '.join(names)}." if len(names) <= 16 else ""
    hint = did_you_mean(option, siblings)
    return f"{below(where, cls, option)}: {name(cls)} has no option '{option}'.{hint}{listed} {see}"


def wrong_value(where: str, base: Any, report: str, see: str) -> str:
    """`report` begins with the first type that was tried; the other types of a union follow."""
    tried, _, rest = report.partition("Given value type:")
    value = rest.partition("Given value: ")[2].partition("\n")[0].partition(". Got value: ")[0]
    if "Got value: " in (line := report.partition("\n")[0]):  # one type, with the value on its line
        tried, value = line.split(". Got value: ", 1)
    value = re.sub(r"^NestedArg\(key='[^']*', val=(.*)\)$", r"\1", value).strip("'\"")
    value = "null" if value == "None" else value
    types = re.findall(r"Expected an? <class '([\w.]+)'>", tried)
    choices = [c.strip(" '\"") for literal in re.findall(r"Literal\[(.*?)\]", tried) for c in literal.split(",")]
    missing = re.search(r"Expected a dot import path string: (\S+)", tried)
    if missing and not {"float", "int", "str"} & set(types):
        hint = did_you_mean(missing[1], class_names(base))
        return f"{where}: there is no class '{missing[1]}'.{hint} {known(base)}"
    words = [WORDS.get(t, f"a {t.rpartition('.')[2]}") for t in types if not choices or t == "NoneType"]
    if choices:
        words.insert(0, f"one of {', '.join(choices)}")
    wanted = " or ".join(dict.fromkeys(words)) or " ".join(tried.removeprefix("Expected a").split())
    return f"{where}: '{value}' is not {wanted}.{did_you_mean(value, choices)} {see}"


def below(where: str, cls: Any, key: str) -> str:
    """The key as a YAML has it: under a class's `init_args`; of a dataclass or a named callback, directly."""
    direct = cls is None or dataclasses.is_dataclass(cls) or where in NAMED_CALLBACKS
    return ".".join(part for part in (where, "" if direct else "init_args", key) if part)


def options(cls: Any) -> dict[str, Any]:
    """The options of a class and their defaults, with those it hands on to its base class."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={"params"})
    return vars(parser.get_defaults(skip_validation=True).as_flat())


def subclasses(base: Any) -> list[type]:
    """The class and all below it."""
    if not inspect.isclass(base):
        return []
    return list(dict.fromkeys([base, *(c for child in base.__subclasses__() for c in subclasses(child))]))


def class_names(base: Any) -> list[str]:
    """Names to choose from. An objective states its formula; what states none is a base of objectives."""
    classes = [c for c in subclasses(base) if c is not base and not c.__name__.startswith("_")]
    return sorted({c.__name__ for c in classes if base is not PreferenceObjective or hasattr(c, "formula")})


def known(base: Any) -> str:
    names = class_names(base)
    return f"Known: {', '.join(names)}." if 0 < len(names) <= 24 else ""


def command_names() -> list[str]:
    return [*LightningCLI.subcommands(), *COMMANDS]


def known_commands() -> str:
    return f"Known: {', '.join(command_names())}."


def did_you_mean(word: str, among: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that is spelled most like the word, or that ends in it (`model.beta` for `beta`)."""
    spelled = {name.lower(): name for name in among}
    close = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    close += [lower for lower in spelled if lower.endswith(f".{word.lower()}")]
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""


def locate(path: str) -> Any:
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None


def import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def name(cls: Any) -> str:
    return getattr(cls, "__name__", str(cls))


def relative(path: Any) -> str:
    """As the user would type it."""
    path = Path(str(path))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def program() -> str:
    return "lit-align" if Path(sys.argv[0]).stem == "lit-align" else "python train.py"


def paragraph(text: str) -> str:
    """Broken between words on a terminal; left whole elsewhere, where lines are searched."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())
    return text + "\n"
