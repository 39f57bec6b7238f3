"""Parsing: the order of arguments, what is refused, and the configuration that a run writes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from lit_align.callbacks import AlignCallback, DryRun, Order
from lit_align.cli.classes import import_path, locate, name, options, subclasses
from lit_align.cli.explain import explain
from lit_align.cli.yaml_check import check_yaml
from lit_align.console import paragraph, relative
from lit_align.errors import UserError
from lit_align.files import write_whole
from lit_align.objectives import PreferenceObjective


class AlignParser(LightningArgumentParser):
    """A parser whose errors are one paragraph, without the usage text."""

    _file = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # parses the options of one class for another parser, which reports
            super().error(message, ex)
        text = explain(message, getattr(ex, "subcommand_parser", self)).strip()
        where = f" (in {relative(self._file)})" if self._file else ""
        self.exit(2, paragraph(f"error: {text}{where}"))

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add the options of a class.

        jsonargparse reads an option that may be an object from a file, if one of that name exists. An option that may
        be a text as well, such as data.train, is the file's name: the file holds data, and a CSV would become the text.
        """
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if isinstance(action, ActionTypeHint) and str in get_args(action._typehint):
                action._enable_path = False
        return added

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._file = str(cfg_path)
        try:
            check_yaml(Path(cfg_path))
        except UserError as error:
            self.error(str(error), error)
        namespace = super().parse_path(cfg_path, *args, **kwargs)
        self._file = ""
        return namespace


class SaveConfig(AlignCallback, SaveConfigCallback):
    """Writes the configuration to `default_root_dir`: config.yaml for fit, config_test.yaml for test, ...

    It overwrites an earlier file. Lightning's own callback writes to the logger's folder and fails if the file exists.
    The checkpoint that a fit resumed from and `fresh` are left out: they belong to this run alone and are not settings
    for the next.
    """

    order = Order.LAST
    in_dry_run = DryRun.SKIP

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, save_to_log_dir=False, **kwargs)
        self.config = self.config.clone()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write once the model is loaded and the checkpoint fits: a refused run leaves an earlier one as it was."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # on rank 0
        root = trainer.default_root_dir
        get_filesystem(root).makedirs(root, exist_ok=True)
        name = "config.yaml" if stage == "fit" else f"config_{TrainerFn(stage).value}.yaml"
        if stage == "fit":
            self.config.ckpt_path = None
            self.config.pop("fresh", None)
        self._write(os.path.join(root, name))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                run = logger.experiment
                self._write(os.path.join(run.dir, "lit_align.yaml"))  # config.yaml there is W&B's own
                config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
                run.config.update({"cli": config}, allow_val_change=True)

    def _write(self, path: str) -> None:
        write_whole(Path(path), lambda beside: self.parser.save(self.config, beside, skip_unset=False, multifile=False))


def arguments_in_order(args: list[str]) -> list[str]:
    """Sort the arguments into the order in which they must act: the command, files, classes, options.

    A file would override the options before it, and a class would refuse them; W&B passes arguments in any order.
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
    """Append the run's id to `default_root_dir`: the runs of an agent share all options but those that are swept."""
    run = os.environ.get("WANDB_RUN_ID", "")
    root = config.trainer.default_root_dir
    if os.environ.get("WANDB_SWEEP_ID") and run and Path(root).name != run:
        config.trainer.default_root_dir = os.path.join(root, run)


def configure_wandb(config: Any) -> None:
    """Let W&B keep its files in the run's folder, and continue the history of a run that is started again.

    The command line passes on the logger's defaults: `save_dir=.`, the working directory, and `resume=None`, with which
    W&B would start a new history.
    """
    given = config.trainer.logger
    for logger in given if isinstance(given, list) else [given]:
        if isinstance(logger, Namespace) and locate(logger.class_path) is WandbLogger:
            logger.init_args.resume = logger.init_args.get("resume") or "allow"
            if logger.init_args.get("save_dir") == "." and not logger.init_args.get("dir"):
                logger.init_args.save_dir = os.environ.get("WANDB_DIR") or config.trainer.default_root_dir


def refuse_options_of_another_objective(config: Any, args: list[str]) -> None:
    """Refuse an option that a YAML sets for one objective and another would use.

    ``--model=SimPO`` over a YAML for DPO would take over its `beta`, which is a different quantity there. Options with
    the same default in both classes (`policy`, `optimizer`, ...) mean the same, and stay.

    Raises:
        UserError: a YAML sets an option for one objective, another uses it, and their defaults differ.
    """
    chosen: Any = locate(config.model.class_path)
    last: dict[str, tuple[Any, Any, Path]] = {}  # by option, from the file that decides: objective, value, path
    for path in filter(None, config.config or []):  # None: given as text, not as a file
        written = yaml.safe_load(Path(path.absolute).read_text(encoding="utf-8")).get("model")
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
                f"model.init_args.{key}={value} is meant for {name(meant)} in {relative(path)}, but {name(chosen)} "
                f"(default {ours.get(key)}) would use it. Start from a YAML for {name(chosen)}, or give its value: "
                f"--model.{key}={ours.get(key)}"
            )
