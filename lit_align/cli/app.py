"""The command line of Trainer's commands: fit, validate, test, predict.

A `LightningCLI` whose options are the signatures of the classes: model and data by class name (``--model=IPO``), the
callbacks that are swept under keys of their own (``--reference_refresh.alpha=0.6``), and each key can be overridden. It
differs from Lightning's in what it refuses and prints:

- an error is one paragraph on stderr that names the key, the value and the fix, with exit code 2;
- option names are not abbreviated, null is refused where a value is needed, and options written for one objective do
  not silently configure another;
- the command line overrides files in whatever order they are given, and later files override earlier ones;
- a checkpoint restores weights and state, never the configuration;
- one `fit` at a time writes to a folder (`run_lock`), and continues the unfinished run there (`continuation`);
- each run writes its whole configuration to ``<trainer.default_root_dir>/config.yaml``, and to W&B.

W&B sweeps run the same command (``configs/sweeps/``), with dotted keys as options; each run of a sweep has its own
folder, ``<default_root_dir>/<run id>``. ``${args}`` and ``${args_no_equals}`` work; ``${args_no_hyphens}`` is refused,
and ``${args_no_boolean_flags}`` loses every ``false``. A null must be quoted (``values: ["null", 0.5]``), since W&B
writes a plain one as ``None``; bf16 is ``trainer.precision: {value: bf16-mixed}``, as in a YAML. To sweep over
objectives, sweep over ``config``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from lit_align.cli.fast_start import without_scipy_signal

with without_scipy_signal():
    import torchmetrics  # noqa: F401  # Lightning would import it

import lightning
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

from lit_align import __version__
from lit_align.callbacks import Interruption, MonitorCheck, PeerWatching, PhaseProgress, RunReport, WandbReport
from lit_align.callbacks.base import in_order
from lit_align.checkpoints import HashedCheckpointIO
from lit_align.cli.classes import NAMED_CALLBACKS
from lit_align.cli.commands import COMMANDS
from lit_align.cli.construction import raise_constructor_error
from lit_align.cli.continuation import (
    check_ckpt_path,
    check_config_is_ours,
    check_last,
    check_verdict_is_ours,
    checkpoint_to_resume,
    seed_to_resume,
)
from lit_align.cli.parser import (
    AlignParser,
    SaveConfig,
    arguments_in_order,
    configure_wandb,
    own_folder_in_a_sweep,
    refuse_options_of_another_objective,
)
from lit_align.cli.run_lock import hold
from lit_align.cli.usage import DESCRIPTION
from lit_align.cli.values import check_groups, check_values, write_out_enums
from lit_align.console import program
from lit_align.data import *  # noqa: F403  # a class is found by its short name once it is imported
from lit_align.data.base import PairsDataModule
from lit_align.errors import UserError, first_line
from lit_align.lightning_features import check_features, explained
from lit_align.objectives import PreferenceObjective
from lit_align.sharding import destroy_process_group

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

TITLES = {
    "trainer": "Lightning's Trainer",
    "model": "The objective, and the policy that it trains",
    "data": "The data",
    "checkpoint": "When checkpoints are saved",
}
"""Headings of the help in place of the first lines of Lightning's docstrings."""


def run(args: list[str]) -> None:
    """Run one of Trainer's commands.

    Raises:
        UserError: the command is not the first argument, or the run is refused.
    """
    if args and args[0].startswith("-") and not COMMANDS.keys().isdisjoint(args):
        raise UserError(f"the command must be the first argument: {program()} fit --config X.yaml")
    AlignCLI(args)
    destroy_process_group()


class AlignCLI(LightningCLI):
    """LightningCLI for preference objectives; ``AlignCLI(args, run=False)`` builds everything and runs nothing.

    The seed is 1 unless `seed_everything` sets another: the same command twice is the same run, and the runs of a
    sweep differ only in what is swept. ``seed_everything: true`` chooses one at random.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True):
        args = sys.argv[1:] if args is None else args
        self._command = args[0] if args else ""
        super().__init__(
            model_class=PreferenceObjective,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=1,
            trainer_defaults={"default_root_dir": "runs", "logger": False},  # the report keeps metrics.csv
            parser_class=AlignParser,
            auto_configure_optimizers=False,  # objectives configure their own: the policy is not built yet here
            args=args,
            run=run,
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:  # `ckpt_path` and such, so that what fit takes and saves is read here too
            self.parser.add_method_arguments(Trainer, "fit", skip={*self.subcommands()["fit"]})
            _add_fresh(self.parser)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        subcommands = parser._subcommands_action
        assert subcommands is not None
        for name, command in COMMANDS.items():
            if command.module:  # for the help alone: `main` runs them
                subcommands.add_subcommand(name, AlignParser(), help=command.help)
        for choice in subcommands._choices_actions:
            choice.help = COMMANDS[choice.dest].help

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != self._command:  # its options would take a tenth of a second, and are not looked at
            return AlignParser()
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"{program()} {subcommand} [--config X.yaml ...] [--KEY=VALUE ...]"
        parser.description = (
            f"{COMMANDS[subcommand].help} --KEY.help=CLASS lists the options of a class: --model.help=DPO"
        )
        for key, group in (parser.groups or {}).items():
            group.title = TITLES.get(key, group.title)
        if subcommand == "fit":
            _add_fresh(parser)
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        header = [f"lit_align=={__version__}, lightning=={lightning.__version__}"]
        kwargs = {"description": DESCRIPTION, "usage": f"{program()} COMMAND [OPTIONS]"} | kwargs
        return super().init_parser(prog=program(), allow_abbrev=False, dump_header=header, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in NAMED_CALLBACKS.items():
            parser.add_subclass_arguments(callback, key, required=False)
            parser.callback_keys.append(key)
        parser.set_defaults({"checkpoint": CHECKPOINT, "drift": {"class_path": "lit_align.callbacks.Drift"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(arguments_in_order(args))
        # jsonargparse takes null for "not given" and passes it to a float; this second check takes it for a value
        set_parsing_settings(unset_sentinel=True)
        try:
            parser.validate(self.config)
        except (TypeError, KeyError) as error:
            parser.error(str(error), error)
        finally:
            set_parsing_settings(unset_sentinel=False)
        if self._given.trainer is None:
            raise UserError("trainer=null must be options (key: value). Leave trainer out to use the defaults.")
        check_values(self._given)
        write_out_enums(self._given)
        refuse_options_of_another_objective(self._given, args)
        own_folder_in_a_sweep(self._given)
        configure_wandb(self._given)
        if self._given.get("seed_everything") is True and not self._given.get("fresh"):
            self._given.seed_everything = seed_to_resume(self._given.trainer.default_root_dir) or True

    @property
    def _given(self) -> Namespace:
        """The options of the command; without a command, all options."""
        return self.config.get(str(self.config.get("subcommand")), self.config)

    def before_instantiate_classes(self) -> None:
        if path := self._given.get("ckpt_path"):
            check_ckpt_path(path, sharded=bool(self._given.get("fsdp_sharding")))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor's error is wrapped in the report of a value that fits no type
            raise_constructor_error(error)
            check_groups(self._given)
            raise
        if self._given.get("ckpt_path") == "last":
            check_last(self.trainer)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: Sequence[Callback | None]) -> Trainer:
        if config.get("fast_dev_run"):
            raise UserError(
                f"trainer.fast_dev_run={config['fast_dev_run']} is refused because it would overwrite the results in "
                f"{config['default_root_dir']}. Use: {program()} doctor --config X.yaml"
            )
        config["enable_model_summary"] = bool(config.get("enable_model_summary"))  # the report's header shows it
        minutes = self.datamodule.wait_minutes if isinstance(self.datamodule, PairsDataModule) else 60.0
        try:
            trainer = super()._instantiate_trainer(config, all_callbacks(config, callbacks, minutes))
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:  # an unknown strategy
            raise UserError(f"trainer: {first_line(error)}.") from error
        except RuntimeError as error:
            if message := explained(error):
                raise message from error
            raise
        check_features(trainer)
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # the user has set no other
            strategy.checkpoint_io = HashedCheckpointIO()
        if isinstance(strategy, DDPStrategy | ModelParallelStrategy) and strategy._timeout == default_pg_timeout:
            strategy._timeout = timedelta(minutes=minutes)  # a timeout of the user's own stays
        trainer.callbacks = in_order(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        given: Any = self.config_init[subcommand]
        if subcommand == "test" and given.get("win_rate") and not given.get("ckpt_path"):
            last = f"{self.trainer.default_root_dir}/checkpoints/last.ckpt"
            raise UserError(
                "test: ckpt_path is not set, so the start would be compared with itself, and that verdict replace the "
                f"run's. Name a checkpoint: --ckpt_path={last}"
            )
        if subcommand == "test" and given.get("win_rate"):
            check_verdict_is_ours(given.ckpt_path, self.trainer.default_root_dir)
        if subcommand != "fit":
            self._run_explained(subcommand)
            return
        with hold(self.trainer.default_root_dir) if self.trainer.is_global_zero else nullcontext():
            self._continue_run()
            self._run_explained(subcommand)

    def _run_explained(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if message := explained(error):
                raise message from error
            raise

    def _continue_run(self) -> None:
        """Resume the run that the folder holds, if there is one."""
        given: Any = self.config_init["fit"]
        if not given.fresh:
            check_config_is_ours(Path(self.trainer.default_root_dir))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunReport):
                callback.named_checkpoint = given.get("ckpt_path") or ""
        config = yaml.safe_load(self._parser("fit").dump(self._given, skip_unset=False))
        path = checkpoint_to_resume(self.trainer, config, fresh=given.fresh)
        given.ckpt_path = None if path is None else str(path)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyperparameters override the configuration."""


def all_callbacks(config: dict[str, Any], given: Sequence[Callback | None], minutes: float) -> list[Callback]:
    """The callbacks of a run: those of its configuration, and those that every run has.

    Args:
        config: Options of the trainer.
        given: Callbacks of the configuration; None where a named one is off.
        minutes: How long processes wait for each other.
    """
    ours: list[Callback] = [MonitorCheck(), RunReport(), PeerWatching(minutes), Interruption()]
    if config.get("enable_progress_bar") is not False:
        ours.append(PhaseProgress())
    if not any(isinstance(callback, WandbReport) for callback in given):
        ours.append(WandbReport())
    saves = config.get("enable_checkpointing") is not False
    kept = [each for each in given if each is not None and (saves or not isinstance(each, ModelCheckpoint))]
    for callback in kept:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = os.path.join(config["default_root_dir"], "checkpoints")
    return [*kept, *ours]


def _add_fresh(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="Start from nothing. Without it, a fit continues the unfinished run in its folder, and a finished run is "
        "not overwritten; with it, the files of that run move to FOLDER-1, FOLDER-2, ...",
    )
