"""One paragraph per error: jsonargparse's report, reduced to the key, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.classes import (
    NAMED_CALLBACKS,
    class_names,
    form_hint,
    is_base,
    known,
    locate,
    name,
    options,
    subclasses,
    type_of,
)
from lit_align.cli.commands import COMMANDS
from lit_align.cli.findings import FINDING, PATTERNS
from lit_align.console import program, relative
from lit_align.data import FunctionScorer
from lit_align.objectives import PreferenceObjective

WORDS = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "text", "NoneType": "null"}


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Reduce jsonargparse's report to one paragraph: the key, the value, the fix."""
    where, cls, base = "", None, None
    see, example = f"See: {program()} fit --help", f"{program()} fit --config X.yaml"
    for found in FINDING.finditer(message):
        kind = next(name for name in PATTERNS if found[name])
        text = found[kind]
        match kind:
            case "key":
                where, base = below(where, cls, text), type_of(cls, text)
            case "subtypes":
                base = next(filter(inspect.isclass, map(locate, re.findall(r"\w+\.[\w.]+", text))), None)
            case "cls" | "callable":
                see = see if cls else f"See: {program()} fit --{where}.help={text.rpartition('.')[2]}"
                cls = locate(text)
                if cls is None:
                    reason = message[found.end() :].strip().partition("\n")[0]
                    return f"{where}: cannot import '{text}' ({reason}). {known(base)}"
                if not inspect.isclass(cls):
                    return f"{where}.class_path={text} must be a class. Name a class."
            case "argument" if not (cls or text.startswith("-")):
                fix = f"A file is given as --config {text}" if Path(text).suffix in (".yaml", ".yml") else see
                return f"'{text}' is not an option: options are written --key=value. {fix}"
            case "option" | "extra" | "argument":
                return unknown_option(where, cls, text, found["group"], parser, see)
            case "required" if cls is None:  # 'fit.model, fit.data'
                missing = max(key.rpartition(".")[2] for key in text.split(", "))
                which = known(PreferenceObjective if missing == "model" else LightningDataModule)
                return f"{missing}: not given. Name a YAML ({example}) or a class (--{missing}=NAME). {which}"
            case "required":
                keys = [below(where, cls, key) for key in text.split(", ")]
                return f"{' and '.join(keys)}: {name(cls)} needs a value, and none is given. {see}"
            case "other":
                return f"{where}: {text} is not a subclass of {name(base)}. {known(base)}"
            case "made":
                return f"{where}: {text} is not a subclass of {found['of']}. {see}"
            case "unnamed" if dataclasses.is_dataclass(base):
                value = message.partition("Given value: ")[2].partition("\n")[0]
                return f"{where}={value} must be options (key: value) or null. {see}"
            case "unnamed":
                return f"{where}: no class is named (class_path: NAME, options under init_args:). {known(base)}"
            case "path":
                return no_class(where, text, base)
            case "type":
                return wrong_value(where, base, message[found.start() :], see)
            case "file":
                file, there = relative(text), map(relative, Path(text).parent.glob("*"))
                return f"{where}: there is no file '{file}'.{did_you_mean(file, there, 0.8)}"
            case "unloadable":
                takes_path = cls is not None and f"{where.rpartition('.')[2]}.path" in options(cls)
                fix = f"Set {where}.path={text}." if takes_path else f"Leave {where} out to use the defaults."
                return f"{where}={text} must be options (key: value). {fix} {see}"
            case "yaml":
                problem = " ".join(text.replace('in "<unicode string>", ', "at ").split())
                return f"config: not a YAML with keys and values: {textwrap.shorten(problem, 200)!r}"
            case "command":
                hint = did_you_mean(text, COMMANDS)
                return f"there is no command '{text}'.{hint} {known_commands()}"
            case "nothing":
                return f"a command is needed: {example}. {known_commands()}"
            case "bare":
                return f"{text}, or the option below it, needs a value: --key=value. {see}"
    return " ".join(message.split())


def unknown_option(where: str, cls: Any, option: str, group: str | None, parser: Any, see: str) -> str:
    """Name an option that does not exist, and the nearest one that does.

    Args:
        group: The dataclass among the options of `cls` that lacks the option.
    """
    option = option.removeprefix("--").partition("=")[0]
    option = f"{group}.{option}" if group else option
    if cls is None:
        bases = {"model": PreferenceObjective, **NAMED_CALLBACKS}
        deep = [f"{key}.{o}" for key, base in bases.items() for c in subclasses(base) for o in options(c)]
        hint = did_you_mean(option, [*(action.dest for action in parser._actions), *deep])
        return f"{option}: there is no such option.{hint} {see}"
    if option == "class_path":
        return f"{where}: put the options of a class under init_args:, next to class_path:."
    if is_base(cls) or not options(cls):
        key = where.partition(".")[0]
        return f"{key}: no class is named, so its options are not known. Name it first: --{key}=NAME. {known(cls)}"
    parent = option.rpartition(".")[0]
    siblings = [key for key in options(cls) if not parent or key.rpartition(".")[0] == parent]
    if parent and not siblings:  # the option above it does not exist, either
        return unknown_option(where, cls, parent.partition(".")[0], None, parser, see)
    names = dict.fromkeys(key.removeprefix(f"{parent}.").partition(".")[0] for key in siblings)
    listed = f" Options: {', '.join(names)}." if len(names) <= 20 else ""
    hint = _classes_with(option, cls) or did_you_mean(option, siblings)
    return f"{below(where, cls, option)}: {name(cls)} has no option '{option}'.{hint}{listed} {see}"


def _classes_with(option: str, cls: Any) -> str:
    """Name the other classes of the same kind that have the option, such as OfflinePairs for OnPolicyPairs' `train`."""
    base = next((base for base in (PreferenceObjective, LightningDataModule) if issubclass(cls, base)), None)
    named = [
        each.__name__ for each in subclasses(base) if each.__name__ in class_names(base) and option in options(each)
    ]
    return f" It is an option of {', '.join(named)}." if named else ""


def no_class(where: str, word: str, base: Any) -> str:
    """Name a class that does not exist, and those that do."""
    if ".py:" in word and inspect.isclass(base) and issubclass(FunctionScorer, base):
        return f"{where}={word} is a function. Write class_path: FunctionScorer, and under init_args: function: {word}."
    hint = form_hint(word) or did_you_mean(word, class_names(base))
    return f"{where}: there is no class '{word}'.{hint} {known(base)}"


def wrong_value(where: str, base: Any, report: str, see: str) -> str:
    """Name a value of the wrong type, and the types that fit.

    Args:
        report: Begins with the first type that was tried; the other types of a union follow.
    """
    tried, _, rest = report.partition("Given value type:")
    value = rest.partition("Given value: ")[2].partition("\n")[0].partition(". Got value: ")[0]
    if "Got value: " in (line := report.partition("\n")[0]):  # one type, with the value on its line
        tried, value = line.split(". Got value: ", 1)
    value = re.sub(r"^NestedArg\(key='[^']*', val=(.*)\)$", r"\1", value).strip("'\"")
    value = value.partition(". Got value: ")[0]
    value = "null" if value == "None" else _brief(value)
    types = re.findall(r"Expected an? <class '([\w.]+)'>", tried)
    choices = [c.strip(" '\"") for literal in re.findall(r"Literal\[(.*?)\]", tried) for c in literal.split(",")]
    missing = re.search(r"Expected a dot import path string: (\S+)", tried)
    if missing and not {"float", "int", "str"} & set(types):
        if dataclasses.is_dataclass(base):
            return f"{where}={missing[1]} must be options (key: value) or null. {see}"
        return no_class(where, missing[1], base)
    words = [WORDS.get(t, f"a {t.rpartition('.')[2]}") for t in types if not choices or t == "NoneType"]
    if choices:
        words.insert(0, f"one of {', '.join(choices)}")
    if "list" in types and where.startswith("trainer.callbacks"):
        return f"{where}: '{value}' is not a list. Add it to the list: --{where}+={value}"
    wanted = " or ".join(dict.fromkeys(words)) or " ".join(tried.removeprefix("Expected a").split())
    return f"{where}: '{value}' is not {wanted}.{did_you_mean(value, choices)} {see}"


def _brief(value: str) -> str:
    """A value in one short line; of the options of a class, the class."""
    named = re.match(r"(?:Namespace\(|\{)'?class_path'?[=:] ?'([^']+)'", value)
    return named[1].rpartition(".")[2] if named else textwrap.shorten(value, 80, placeholder="…")


def below(where: str, cls: Any, key: str) -> str:
    """The key as in a YAML: below a class's `init_args`, or directly below a dataclass or a named callback."""
    direct = cls is None or dataclasses.is_dataclass(cls) or where in NAMED_CALLBACKS
    return ".".join(part for part in (where, "" if direct else "init_args", key) if part)


def known_commands() -> str:
    return f"Known: {', '.join(COMMANDS)}."


def did_you_mean(word: str, among: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest the name with the most similar spelling, or one that ends in the word (`model.beta` for `beta`)."""
    spelled = {name.lower(): name for name in among}
    close = [lower for lower in spelled if lower.endswith(f".{word.lower()}")]
    close += difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""
