"""One paragraph per error: jsonargparse's report, reduced to the key, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.arguments import no_value
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


@dataclass
class Place:
    """A place in a configuration, as far as the report of an error has led there.

    Args:
        see: Names the help on the options of this place.
        key: Its key, as in a YAML; empty for the top.
        cls: The class whose options are read there.
        base: The class whose subclasses the value of the key may be.
    """

    see: str
    key: str = ""
    cls: Any = None
    base: Any = None

    def below(self, key: str) -> str:
        """A key below this place: below a class's `init_args`, or directly below a dataclass or a named callback."""
        direct = self.cls is None or dataclasses.is_dataclass(self.cls) or self.key in NAMED_CALLBACKS
        return ".".join(part for part in (self.key, "" if direct else "init_args", key) if part)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Reduce jsonargparse's report to one paragraph: the key, the value, the fix."""
    place = Place(f"See: {program()} fit --help")
    for found in FINDING.finditer(message):
        kind = next(name for name in PATTERNS if found[name])
        text = found[kind]
        match kind:
            case "key":
                place.key, place.base = place.below(text), type_of(place.cls, text)
            case "subtypes":
                place.base = next(filter(inspect.isclass, map(locate, re.findall(r"\w+\.[\w.]+", text))), None)
            case "cls" | "callable":
                if place.cls is None:
                    place.see = f"See: {program()} fit --{place.key}.help={text.rpartition('.')[2]}"
                place.cls = locate(text)
                if place.cls is None:
                    reason = message[found.end() :].strip().partition("\n")[0]
                    return f"{place.key}: cannot import '{text}' ({reason}). {known(place.base)}"
                if not inspect.isclass(place.cls):
                    return f"{place.key}.class_path={text} must be a class. Name a class."
            case _:
                return _fault(kind, found, place, parser)
    return " ".join(message.split())


def _fault(kind: str, found: re.Match[str], place: Place, parser: LightningArgumentParser) -> str:
    """The paragraph for a finding that says what is wrong at the place."""
    text, example = found[kind], f"{program()} fit --config X.yaml"
    match kind:
        case "argument" if place.cls is None and not text.startswith("-"):
            fix = f"A file is given as --config {text}" if Path(text).suffix in (".yaml", ".yml") else place.see
            return f"'{text}' is not an option: options are written --key=value. {fix}"
        case "option" | "extra" | "argument":
            return unknown_option(place, text, found["group"], parser)
        case "required" if place.cls is None:  # 'fit.model, fit.data'
            missing = max(key.rpartition(".")[2] for key in text.split(", "))
            which = known(PreferenceObjective if missing == "model" else LightningDataModule)
            return f"{missing}: not given. Name a YAML ({example}) or a class (--{missing}=NAME). {which}"
        case "required":
            keys = map(place.below, text.split(", "))
            return f"{' and '.join(keys)}: {name(place.cls)} needs a value, and none is given. {place.see}"
        case "other":
            return f"{place.key}: {text} is not a subclass of {name(place.base)}. {known(place.base)}"
        case "made":
            return f"{place.key}: {text} is not a subclass of {found['of']}. {place.see}"
        case "unnamed" if dataclasses.is_dataclass(place.base):
            value = found.string.partition("Given value: ")[2].partition("\n")[0]
            return f"{place.key}={value} must be options (key: value) or null. {place.see}"
        case "unnamed":
            return f"{place.key}: no class is named (class_path: NAME, options under init_args:). {known(place.base)}"
        case "path":
            return no_class(place, text)
        case "type":
            return wrong_value(place, found.string[found.start() :])
        case "file":
            file, there = relative(text), map(relative, Path(text).parent.glob("*"))
            return f"{place.key}: there is no file '{file}'.{did_you_mean(file, there, 0.8)}"
        case "unloadable":
            takes_path = place.cls is not None and f"{place.key.rpartition('.')[2]}.path" in options(place.cls)
            fix = f"Set {place.key}.path={text}." if takes_path else f"Leave {place.key} out to use the defaults."
            return f"{place.key}={text} must be options (key: value). {fix} {place.see}"
        case "yaml":
            problem = " ".join(text.replace('in "<unicode string>", ', "at ").split())
            return f"config: not a YAML with keys and values: {textwrap.shorten(problem, 200)!r}"
        case "command":
            return f"there is no command '{text}'.{did_you_mean(text, COMMANDS)} {known_commands()}"
        case "nothing":
            return f"a command is needed: {example}. {known_commands()}"
        case "flag":
            return f"{no_value(text)}."
        case _:  # bare
            return f"{text}, or the option below it, needs a value: --key=value. {place.see}"


def unknown_option(place: Place, option: str, group: str | None, parser: Any) -> str:
    """Name an option that does not exist, and the nearest one that does.

    Args:
        group: The dataclass among the options of the place's class that lacks the option.
    """
    option = option.removeprefix("--").partition("=")[0]
    option = f"{group}.{option}" if group else option
    cls = place.cls
    if cls is None:
        bases = {"model": PreferenceObjective, **NAMED_CALLBACKS}
        deep = [f"{key}.{o}" for key, base in bases.items() for c in subclasses(base) for o in options(c)]
        hint = did_you_mean(option, [*(action.dest for action in parser._actions), *deep])
        return f"{option}: there is no such option.{hint} {place.see}"
    if option == "class_path":
        return f"{place.key}: put the options of a class under init_args:, next to class_path:."
    if is_base(cls) or not options(cls):
        key = place.key.partition(".")[0]
        return f"{key}: no class is named, so its options are not known. Name it first: --{key}=NAME. {known(cls)}"
    parent = option.rpartition(".")[0]
    siblings = [key for key in options(cls) if not parent or key.rpartition(".")[0] == parent]
    if parent and not siblings:  # the option above it does not exist, either
        return unknown_option(place, parent.partition(".")[0], None, parser)
    names = dict.fromkeys(key.removeprefix(f"{parent}.").partition(".")[0] for key in siblings)
    listed = f" Options: {', '.join(names)}." if len(names) <= 20 else ""
    hint = _classes_with(option, cls) or did_you_mean(option, siblings)
    return f"{place.below(option)}: {name(cls)} has no option '{option}'.{hint}{listed} {place.see}"


def _classes_with(option: str, cls: Any) -> str:
    """Name the other classes of the same kind that have the option, such as OfflinePairs for OnPolicyPairs' `train`."""
    base = next((base for base in (PreferenceObjective, LightningDataModule) if issubclass(cls, base)), None)
    named = [
        each.__name__ for each in subclasses(base) if each.__name__ in class_names(base) and option in options(each)
    ]
    return f" It is an option of {', '.join(named)}." if named else ""


def no_class(place: Place, word: str) -> str:
    """Name a class that does not exist, and those that do."""
    key, base = place.key, place.base
    if ".py:" in word and inspect.isclass(base) and issubclass(FunctionScorer, base):
        return f"{key}={word} is a function. Write class_path: FunctionScorer, and under init_args: function: {word}."
    hint = form_hint(word) or did_you_mean(word, class_names(base))
    return f"{key}: there is no class '{word}'.{hint} {known(base)}"


def wrong_value(place: Place, report: str) -> str:
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
        if dataclasses.is_dataclass(place.base):
            return f"{place.key}={missing[1]} must be options (key: value) or null. {place.see}"
        return no_class(place, missing[1])
    words = [WORDS.get(t, f"a {t.rpartition('.')[2]}") for t in types if not choices or t == "NoneType"]
    if choices:
        words.insert(0, f"one of {', '.join(choices)}")
    if "list" in types and place.key.startswith("trainer.callbacks"):
        return f"{place.key}: '{value}' is not a list. Add it to the list: --{place.key}+={value}"
    wanted = " or ".join(dict.fromkeys(words)) or " ".join(tried.removeprefix("Expected a").split())
    return f"{place.key}: '{value}' is not {wanted}.{did_you_mean(value, choices)} {place.see}"


def _brief(value: str) -> str:
    """A value in one short line; of the options of a class, the class."""
    named = re.match(r"(?:Namespace\(|\{)'?class_path'?[=:] ?'([^']+)'", value)
    return named[1].rpartition(".")[2] if named else textwrap.shorten(value, 80, placeholder="…")


def known_commands() -> str:
    return f"Known: {', '.join(COMMANDS)}."


def did_you_mean(word: str, among: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest the name with the most similar spelling, or one that ends in the word (`model.beta` for `beta`)."""
    spelled = {name.lower(): name for name in among}
    close = [lower for lower in spelled if lower.endswith(f".{word.lower()}")]
    close += difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""
