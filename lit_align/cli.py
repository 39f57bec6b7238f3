"""The command line: ``python train.py fit --config X.yaml``, installed as ``lit-align``.

A `LightningCLI` whose options are the signatures of the classes: model and data by class name
(``--model=IPO``), the callbacks that are swept under names of their own (``--reference_refresh.alpha=0.6``),
all of it overridable key by key. It differs from Lightning's in what it refuses and what it says:

- an error is one paragraph on stderr that names key, value and mend, with exit code 2;
- option names are not abbreviated, null is refused where a value is needed, and options written for one
  objective do not configure another unseen;
- the command line overrides files wherever it stands, and later files earlier ones;
- a checkpoint restores weights and state, never the configuration;
- each run writes its whole configuration to ``<trainer.default_root_dir>/config.yaml``, and to W&B.

W&B sweeps run the same command (``configs/sweeps/``), with dotted keys as options; each run of a sweep has
its own folder, ``<default_root_dir>/<run id>``. ``${args}`` and ``${args_no_equals}`` work;
``${args_no_hyphens}`` is refused, ``${args_no_boolean_flags}`` loses every ``false``. A null must be quoted
(``values: ["null", 0.5]``), since W&B writes a plain one as ``None``; bf16 is ``trainer.precision: {value:
bf16-mixed}``, as in a YAML. To sweep over objectives, sweep over ``config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import pydoc
import re
import shutil
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# Read when libgomp and tokenizers load, hence above their imports. Idle OpenMP threads that sleep at once cost a third
# of a round's time, and those that spin long starve the processes they share cores with; tokenizers warns at each fork
# of a data loader, and turns itself off there.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns: some microseconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

import lit_align.data  # noqa: F401  # for its names: a class is found by its short name once it is imported
from lit_align import __version__, commands
from lit_align.callbacks import (
    Drift,
    FSDPSharding,
    Interruption,
    PhaseProgress,
    Predictions,
    ReferenceRefresh,
    RunReport,
    WandbReport,
    WinRate,
)
from lit_align.errors import UserError
from lit_align.objectives import PreferenceObjective
from lit_align.sharding import leave

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
# After each round, into <default_root_dir>/checkpoints; `last.ckpt` is the one to resume from, whichever run wrote it.
CHECKPOINT = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "filename": "{step}",
        "save_last": "link",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,  # a second run would leave last.ckpt to the first, and write last-v1.ckpt
    },
}

# Commands beside Trainer's: name -> function of the arguments after it.
COMMANDS: dict[str, Callable[[list[str]], None]] = commands.COMMANDS


def main(args: list[str] | None = None) -> None:
    """Run one command. A `UserError`, or a file that cannot be read or written, ends it with a paragraph and exit
    code 2, Ctrl-C with a line and 130; others have a traceback.
    """
    args = sys.argv[1:] if args is None else args
    quiet()
    try:
        if args and args[0] in COMMANDS:
            COMMANDS[args[0]](args[1:])
        else:
            AlignCLI(args)
            leave()
    except (UserError, MisconfigurationException) as error:
        sys.stderr.write(paragraph(f"error: {error}"))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # no file of the user's: a connection, a worker
            raise
        sys.stderr.write(paragraph(f"error: {relative(error.filename)}: {error.strerror}."))
        sys.exit(2)
    except KeyboardInterrupt:  # before a fit takes it over (`Interruption`), or of another command
        sys.stderr.write("interrupted\n")
        sys.exit(130)


class AlignCLI(LightningCLI):
    """LightningCLI for preference objectives; ``AlignCLI(args, run=False)`` builds all and runs nothing.

    The seed is 1 unless `seed_everything` says otherwise: the same command twice is the same run, and the
    runs of a sweep differ by what is swept. ``seed_everything: true`` draws one.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True):
        super().__init__(
            model_class=PreferenceObjective,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=1,
            trainer_defaults={"default_root_dir": "runs", "logger": False},  # the report keeps metrics.csv
            parser_class=AlignParser,
            auto_configure_optimizers=False,  # objectives take their own: here there is no policy yet
            args=sys.argv[1:] if args is None else args,
            run=run,
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:  # `ckpt_path` and such, so that what fit takes and saves is read here too
            self.parser.add_method_arguments(Trainer, "fit", skip={*self.subcommands()["fit"]})

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name, command in COMMANDS.items():  # for the help alone: `main` runs them
            parser._subcommands_action.add_subcommand(name, AlignParser(), help=command.__doc__)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        header = [f"lit_align=={__version__}, lightning=={lightning.__version__}"]
        kwargs.setdefault("description", "Preference optimization of language models, against anchors that move.")
        return super().init_parser(prog=program(), allow_abbrev=False, dump_header=header, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in NAMED_CALLBACKS.items():
            parser.add_subclass_arguments(callback, key, required=False)
            parser.callback_keys.append(key)
        parser.set_defaults({"checkpoint": CHECKPOINT, "drift": {"class_path": "lit_align.callbacks.Drift"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(in_order(args))
        # jsonargparse takes null for "not given" and hands it to a float; for a second look it is a value
        set_parsing_settings(unset_sentinel=True)
        try:
            parser.validate(self.config)
        except (TypeError, KeyError) as error:
            parser.error(str(error), error)
        finally:
            set_parsing_settings(unset_sentinel=False)
        refuse_options_of_another_objective(self._given, args)
        own_folder_in_a_sweep(self._given)

    @property
    def _given(self) -> Namespace:
        """The options of the command, where there is one."""
        return self.config.get(str(self.config.get("subcommand")), self.config)

    def before_instantiate_classes(self) -> None:
        config = self._given
        path = config.get("ckpt_path")
        if path == "best":
            raise UserError(
                "ckpt_path: which is 'best' only the process that trained knows. Name the checkpoint itself."
            )
        if not path or path in ("last", "hpc", "registry") or "://" in path:
            return
        if not Path(path).exists():
            raise UserError(f"ckpt_path: there is no checkpoint '{path}'.")
        if Path(path).is_file() and not zipfile.is_zipfile(path):  # as torch.save writes it
            raise UserError(
                f"ckpt_path: '{path}' is no checkpoint, or not a whole one. A run's lie in its folder checkpoints/."
            )
        if Path(path).is_dir() and not config.get("fsdp_sharding"):
            raise UserError(
                f"ckpt_path: {relative(path)} is a folder of shards, which a sharded run can go on from, on any number "
                "of processes: --config configs/overlays/fsdp.yaml. (Checkpoints of one file, the default, are read "
                "everywhere.)"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor's comes wrapped, as the report of a value that fits no type
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError | ModuleNotFoundError):
                cause = cause.__cause__
            if isinstance(cause, ModuleNotFoundError):
                raise UserError(f"a package is missing: {str(cause).splitlines()[0]}") from None
            if cause is None:
                raise
            raise cause from None
        saving = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if self._given.get("ckpt_path") == "last" and not any(
            each._find_last_checkpoints(self.trainer) for each in saving
        ):
            folders = " or ".join(relative(each.dirpath) for each in saving) or "a run without checkpoints"
            raise UserError(
                f"ckpt_path: there is no last checkpoint in {folders}. Name one, or leave ckpt_path out to begin anew."
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = [callback for callback in callbacks if callback is not None]
        if config.get("enable_checkpointing") is False:
            given = [callback for callback in given if not isinstance(callback, ModelCheckpoint)]
        for callback in given:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(config["default_root_dir"], "checkpoints")
        bar = [] if config.get("enable_progress_bar") is False else [PhaseProgress()]
        config["enable_model_summary"] = bool(config.get("enable_model_summary"))  # the report's header says it
        after = [callback for callback in given if isinstance(callback, WandbReport)] or [WandbReport()]
        drift = [callback for callback in given if isinstance(callback, Drift)]  # no part of the time of training
        given = [callback for callback in given if not isinstance(callback, WandbReport | Drift)]
        try:
            return super()._instantiate_trainer(config, [*bar, *given, RunReport(), *drift, *after, Interruption()])
        except ValueError as error:  # such as an unknown strategy
            raise UserError(f"trainer: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put a checkpoint's hyperparameters over the configuration."""


class AlignParser(LightningArgumentParser):
    """A parser whose errors are one paragraph, without the usage in front."""

    _file = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # parses the options of one class for another parser, which reports
            super().error(message, ex)
        text = explain(message, getattr(ex, "subcommand_parser", self)).strip()
        where = f" (in {relative(self._file)})" if self._file else ""
        self.exit(2, paragraph(f"error: {text}{where}"))

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._file = str(cfg_path)
        namespace = super().parse_path(cfg_path, *args, **kwargs)
        self._file = ""
        return namespace


class SaveConfig(SaveConfigCallback):
    """Writes the configuration to `default_root_dir`: config.yaml for fit, config_test.yaml for test, ...

    It overwrites: Lightning's own writes to the logger's folder, where a second run dies on the first's file. The
    checkpoint that a fit went on from is left out: it is this run's alone, and no setting for the next.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, save_to_log_dir=False, **kwargs)
        self.config = self.config.clone()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not before the model is loaded and the checkpoint fits: what is refused leaves an earlier run as it was."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # on rank 0
        root = trainer.default_root_dir
        get_filesystem(root).makedirs(root, exist_ok=True)
        name = "config.yaml" if stage == "fit" else f"config_{TrainerFn(stage).value}.yaml"
        if stage == "fit":
            self.config.ckpt_path = None
        self._write(os.path.join(root, name))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                run = logger.experiment
                self._write(os.path.join(run.dir, "lit_align.yaml"))  # config.yaml there is W&B's own
                config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
                run.config.update({"cli": config}, allow_val_change=True)

    def _write(self, path: str) -> None:
        self.parser.save(self.config, path, skip_unset=False, overwrite=True, multifile=False)


def in_order(args: list[str]) -> list[str]:
    """The arguments in the order in which they must act: the command, files, classes, options.

    A file would override the options before it, and a class refuse its own; W&B orders arguments as it likes.
    """
    groups: list[list[str]] = []  # an option and its value
    for arg in args:
        if not groups or arg.startswith("--") or arg == "-c":
            groups.append([])
        groups[-1].append(arg)
    kinds = [r"[^-]", r"(-c|--config)(=|$)", r"--(model|data)(\.class_path)?(=|$)", ""]
    groups.sort(key=lambda group: next(i for i, kind in enumerate(kinds) if re.match(kind, group[0])))
    return [arg for group in groups for arg in group]


def own_folder_in_a_sweep(config: Any) -> None:
    """`default_root_dir` gets the run's id behind it: an agent's runs have the same options, but for what is swept."""
    run = os.environ.get("WANDB_RUN_ID", "")
    root = config.trainer.default_root_dir
    if os.environ.get("WANDB_SWEEP_ID") and run and Path(root).name != run:
        config.trainer.default_root_dir = os.path.join(root, run)


def refuse_options_of_another_objective(config: Any, args: list[str]) -> None:
    """``--model=SimPO`` over a YAML of DPO would take over its `beta`, which is another quantity there.

    Options that have the same default in both classes (`policy`, `optimizer`, ...) are shared, and may stay.

    Raises:
        UserError: a YAML sets an option for one objective, another uses it, and their defaults differ.
    """
    chosen: Any = locate(config.model.class_path)
    last: dict[str, tuple[Any, Any, Path]] = {}  # of each option the file that decides: its objective, value, path
    for path in filter(None, config.config or []):  # None: given as text, not as a file
        written = yaml.safe_load(path.read_text()).get("model")
        if not isinstance(written, dict):
            continue
        names = {key: c for c in subclasses(PreferenceObjective) for key in (c.__name__, import_path(c))}
        meant: Any = names.get(written.get("class_path", ""), chosen)
        last |= {key: (meant, value, path) for key, value in (written.get("init_args") or {}).items()}
    for key, (meant, value, path) in last.items():
        theirs, ours = options(meant), options(chosen)
        given = any(re.match(rf"--model\.(init_args\.)?{key}(=|$)", arg) for arg in args)
        if theirs.get(key) != ours.get(key) and config.model.init_args.get(key) == value and not given:
            raise UserError(
                f"model.init_args.{key}: {value} is meant for {name(meant)} in {relative(path)}, and "
                f"{name(chosen)}, whose own default is {ours.get(key)}, would take it over. Start from a "
                f"YAML of {name(chosen)}, or give its value: --model.{key}={ours.get(key)}"
            )


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


# --- what it does not say ---

# What Lightning says at a start that nobody can act on; each line has its reason.
WARNINGS = [
    r"Found \d+ module\(s\) in eval mode",  # the reference is, and is meant to be
    r".*does not have many workers",  # batches are cut from memory: a worker would only cost
    r".*`tensorboardX` has been removed",  # the CSV logger is meant
    r"Total length of `list` across ranks is zero",  # no validation data were given, and none is wanted
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own business with torch
    r"`is_gradient_checkpointing` is deprecated",  # peft's with transformers
    r"predict returned None",  # answers go to a file (`Predictions`)
]
# Advertisements, and a device that nobody missed.
TIPS = re.compile(r"litlogger|litmodels|TPU available: False")


def is_no_tip(record: logging.LogRecord) -> bool:
    return not TIPS.search(record.getMessage())


def quiet() -> None:
    """Keep the terminal for what concerns the user."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(logger).addFilter(is_no_tip)
