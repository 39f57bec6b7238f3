"""Checkpoints of objectives: the run's position, its identity, and the weights that cannot be loaded from elsewhere."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from itertools import chain
from typing import Any, Protocol, Self, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn

from lit_align import provenance
from lit_align.arguments import CheckedArguments
from lit_align.console import print_line
from lit_align.errors import UserError
from lit_align.lightning_features import check_features
from lit_align.objectives._checks import check_state_dict
from lit_align.objectives.schedule import renew_learning_rates
from lit_align.policy import LoRAConfig, is_adapter_weight
from lit_align.position import KEY, Position, end_when_over
from lit_align.reference.build import belongs_to_reference
from lit_align.saved_state import (
    check_callbacks,
    check_like,
    check_optimizer,
    check_weight_numbers,
    continue_saving,
    name_checkpoint_in_errors,
    restoring,
)

# Options that say where the base model is; its weights identify it.
LOCATIONS = ("model.policy.path", "model.policy.revision", "model.lora.adapter", "model.accept_changes")

MONITORED = "callback_metrics"
"""Entry of a checkpoint: the last values that callbacks can monitor, for those that read them before the next step."""


@runtime_checkable
class StatesIdentity(Protocol):
    """A data module or a callback that states what determines its numbers; other projects' need not."""

    def identity(self) -> provenance.Table: ...


class ResumableModule(L.LightningModule, metaclass=CheckedArguments):
    """A module whose checkpoints resume only the same run, at its position.

    A subclass sets the attributes below, and builds its networks in `configure_model`.
    """

    lora: LoRAConfig | None
    optimizer: OptimizerCallable
    accept_changes: Sequence[str] = ()
    base_fingerprint: str = ""
    """Identifies the weights of the base model; set when the model is built."""
    _resumed_at: Position | None = None
    _loaded_step: int | None = None

    def setup(self, stage: str) -> None:
        name_checkpoint_in_errors(self.trainer)
        if stage == "fit":
            self._resumed_at = None  # of an earlier fit
            check_features(self.trainer)
            end_when_over(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the position, and the hyperparameters as plain values that can be read without our classes."""
        if KEY not in checkpoint:  # `Interruption` may know better
            Position.of_run(self.trainer).save(checkpoint)
        provenance.save(checkpoint, self.identity(), self.accept_changes)
        monitored = self.trainer.callback_metrics.items()
        checkpoint[MONITORED] = {name: torch.as_tensor(value).clone() for name, value in monitored}
        hyperparameters = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in hyperparameters.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint.get("global_step")
        if not self._is_fitting:
            return
        self.adapt_checkpoint(checkpoint)
        check_like(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop.state_dict(), "fit_loop")
        callbacks, states = self.trainer.callbacks, checkpoint.get("callbacks", {})  # type: ignore[attr-defined]
        check_callbacks(callbacks, states)
        self._monitored = checkpoint.get(MONITORED, {})
        self._saved_schedules = len(checkpoint.get("lr_schedulers", []))
        self._resumed_at = Position.load(checkpoint)
        continue_saving(callbacks, states, self.trainer.ckpt_path or "", self._resumed_at.step)
        self._resumed_at.write_loops(checkpoint)
        self._resumed_at.stop_again(self.trainer)

    @property
    def weights_step(self) -> int | None:
        """The optimizer step that the weights are of; outside a fit, None if no checkpoint is loaded."""
        return self.trainer.global_step if self._is_fitting else self._loaded_step

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def adapt_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a run may resume from a checkpoint, and take out of it what does not fit accepted changes.

        A sharded strategy calls it before it loads weights and optimizer states itself, and without them when
        Lightning loads the rest.

        Raises:
            UserError: a run did not write it, it holds weights alone, or its run had other options or data.
        """
        if not self._is_fitting:
            return
        if missing := [key for key in (provenance.KEY, KEY) if not checkpoint.get(key)]:
            raise UserError(
                f"the checkpoint was not written by a run of lit_align: it has no entry {missing[0]!r}. Name another."
            )
        is_whole = checkpoint.get("loops") and checkpoint.get("optimizer_states") and "lr_schedulers" in checkpoint
        if "state_dict" in checkpoint and not is_whole:
            raise UserError(
                "the checkpoint holds weights, but not the state of the optimizer, so no run can resume from it. Name "
                "another, and save with checkpoint.save_weights_only=false."
            )
        then, now, ours = checkpoint[provenance.KEY], self.identity(), self.state_dict()
        weights = checkpoint.get("state_dict", ours)
        networks = {name for name in weights.keys() ^ ours.keys() if "." in name and not belongs_to_reference(name)}
        defaults = provenance.default_options("model", type(self)) | provenance.of_trainer(self.trainer)
        provenance.check(then, now, self.accept_changes, defaults, fits=not networks)
        if then.get("model") != now["model"] and weights is not ours:  # an accepted change
            _start_own_state(weights, ours)
        if then.get("model.optimizer") != now["model.optimizer"] and checkpoint.get("optimizer_states") != []:
            print_line(f"{now['model.optimizer']} starts without the state of the checkpoint's optimizer")
            checkpoint["optimizer_states"] = []
        for saved in checkpoint.get("optimizer_states", []):  # those of a folder of shards are not in it
            check_weight_numbers(saved)

    @property
    def ends_resumed_epoch(self) -> bool:
        """Whether the run has resumed after an epoch's last step: nothing more is trained in this epoch."""
        at = self._resumed_at
        return at is not None and at.at_epochs_end and at.epoch == self.current_epoch

    def on_fit_start(self) -> None:
        provenance.check_processes(self.identity())
        self._own_schedules = [dict(each.scheduler.state_dict()) for each in self.trainer.lr_scheduler_configs]
        self._own_options = [
            [{name: value for name, value in group.items() if name != "params"} for group in each.param_groups]
            for each in self.trainer.optimizers
        ]

    def on_train_start(self) -> None:
        if self._resumed_at is not None:
            with restoring(self.trainer):
                self._check_restored()
                self._apply_accepted_options()
                monitored = {name: value.to(self.device).reshape(()) for name, value in self._monitored.items()}
                self.trainer.callback_metrics.update(monitored)
            renew_learning_rates(self.trainer)
            self._resumed_at.settle(self.trainer)

    def _check_restored(self) -> None:
        """Check what optimizers and schedules have taken from a checkpoint.

        Raises:
            KeyError, TypeError: names an entry that is missing, or has another form than a run writes.
        """
        for optimizer in self.trainer.optimizers:
            check_optimizer(optimizer)
        if self._saved_schedules != len(self._own_schedules):  # Lightning restores as many as there are
            raise KeyError("lr_schedulers")
        for config, own in zip(self.trainer.lr_scheduler_configs, self._own_schedules, strict=True):
            check_like(config.scheduler.state_dict(), own, "lr_schedulers")

    def _apply_accepted_options(self) -> None:
        """Give optimizers this run's values of the options in which it may differ from its checkpoint."""
        accepted = {name.removeprefix("model.optimizer.") for name in self.accept_changes}
        for optimizer, groups in zip(self.trainer.optimizers, self._own_options, strict=True):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group |= {name: own[name] for name in accepted & own.keys()}
        for config, own in zip(self.trainer.lr_scheduler_configs, self._own_schedules, strict=True):
            if "lr" in accepted and "base_lrs" in own:
                config.scheduler.base_lrs = own["base_lrs"]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Make a step. The first one after a resume shows whether the optimizer's state fits."""
        if self._resumed_at is None or self._resumed_at.step != self.trainer.global_step or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        has_gradients = False

        def compute_gradients() -> Any:
            nonlocal has_gradients
            loss = optimizer_closure()
            has_gradients = True
            return loss

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, compute_gradients)
        except Exception:
            if not has_gradients:
                raise
            with restoring(self.trainer):
                raise

    def _is_saved(self, name: str) -> bool:
        """Whether a checkpoint holds this weight: under LoRA, weights that the policy's path gives are left out."""
        return self.lora is None or not name.startswith("policy.") or is_adapter_weight(name)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """The weights that a checkpoint holds.

        Args:
            prefix: Begins their names, if the module is part of another one.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in [name for name in state if name.startswith(prefix)]:
            if not self._is_saved(name.removeprefix(prefix)):
                del state[name]
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Give the weights that a checkpoint leaves out their present values, if the module is part of another one."""
        if prefix:
            present = super().state_dict(prefix=prefix)
            state_dict |= {name: value for name, value in present.items() if name not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.configure_model()
        if self._trainer is not None:  # Lightning converts after it has loaded, so that 64-true would lose digits
            self._trainer.precision_plugin.convert_module(self)
        if strict:
            self.check_state_dict(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint holds exactly this module's weights.

        Raises:
            UserError: a weight is missing, unknown, or has another shape.
        """
        check_state_dict(self.state_dict(), state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy for weight averaging; it shares the optimizer's factory, which may hold the whole configuration."""
        memo[id(self.optimizer)] = self.optimizer
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def identity(self) -> provenance.Table:
        """Everything that determines the numbers of the run; a resumed run must have the same."""
        parts = [self.trainer.datamodule, *self.trainer.callbacks]  # type: ignore[attr-defined]
        stated = [part.identity() for part in parts if isinstance(part, StatesIdentity)]
        return {
            "model": type(self).__name__,
            provenance.BASE_MODEL: self.base_fingerprint,
            "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            **provenance.of_options("model", dict(self.hparams), leave_out=LOCATIONS),
            **provenance.of_optimizer(self.optimizer),
            **provenance.of_trainer(self.trainer),
            **dict(chain.from_iterable(table.items() for table in stated)),
        }


def _start_own_state(weights: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Replace what another objective has beside its networks by what ours has at the start, such as KTO's z0.

    Args:
        weights: The checkpoint's weights, changed in place.
        ours: This module's weights.
    """
    for name in [name for name in weights if "." not in name]:
        del weights[name]
    started = {name: value for name, value in ours.items() if "." not in name}
    if started:
        print_line(f"{', '.join(started)} of the new objective begins as at the start of a run")
    weights |= started
