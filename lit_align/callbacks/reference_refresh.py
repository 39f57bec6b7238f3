"""The trust region: the reference follows the policy (arXiv 2404.09656, §3).

    reference ← alpha·policy + (1−alpha)·reference      every tau optimizer steps, or every tau rounds

The callback composes with every objective that has a reference: TR-DPO is DPO with this callback. A checkpoint holds
the moved reference, its rule and the number of refreshes; another rule resumes only with `accept_change`.

| metric | formula |
|---|---|
| reference/refreshes | number of refreshes so far |
"""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import print_line
from lit_align.errors import UserError, amount, counted
from lit_align.objectives import AnchoredObjective, PreferenceObjective
from lit_align.reference.base import Reference
from lit_align.reference.config import RefreshRule
from lit_align.reference.mixing import mix_modules


class ReferenceRefresh(AlignCallback):
    """Move the reference toward the policy, softly or all at once.

    Args:
        alpha: Weight of the policy in reference ← alpha·policy + (1−alpha)·reference; 1 replaces the reference. The
            paper's best values are 0.5 to 0.6 with tau 1, and 1 with tau 512.
        tau: Optimizer steps (or rounds) from one refresh to the next.
        unit: Unit of tau. A round is one epoch over newly sampled pairs; the refresh is at its end.
        accept_change: Resume from a checkpoint that was made with another rule.

    Works with any LightningModule that has two networks of the same shape, `policy` and `reference`: on one device,
    under DDP, or in shards (`FSDPSharding`).
    """

    option_name = "reference_refresh"
    order = Order.REFERENCE
    in_dry_run = DryRun.ACT

    def __init__(
        self, alpha: float, tau: int = 1, unit: Literal["step", "round"] = "step", accept_change: bool = False
    ):
        self.rule = RefreshRule(alpha, tau, unit, accept_change)
        self.count = 0
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_step == 0:  # an earlier trainer's; a checkpoint's are loaded after this
            self.count = self.last_step = 0
        if isinstance(pl_module, AnchoredObjective):
            if pl_module.beta == 0:
                raise UserError(
                    "reference_refresh has no effect because model.beta=0 gives the reference no weight. Set beta "
                    "above 0, or leave the callback out (--reference_refresh=null)."
                )
            pl_module.set_refresh_rule(self.rule)
        elif isinstance(pl_module, PreferenceObjective):
            raise UserError(
                f"reference_refresh: {type(pl_module).__name__} has no reference to refresh. Leave the callback out "
                "(--reference_refresh=null), or use an objective with a reference."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PreferenceObjective):
            return
        networks = [getattr(pl_module, name, None) for name in ("policy", "reference")]
        if not all(isinstance(network, nn.Module) for network in networks):
            raise UserError(
                f"reference_refresh: {type(pl_module).__name__} needs two networks, `policy` and `reference`. Use "
                "these names, or leave the callback out."
            )
        half = [w for w in networks[1].parameters() if w.dtype.itemsize < 4]  # type: ignore[union-attr]
        if half and self.rule.alpha < 0.1:
            raise UserError(
                f"reference_refresh.alpha={self.rule.alpha}: a reference in {half[0].dtype} would round such small "
                "steps to nothing. Keep it in float32, or use alpha ≥ 0.1."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due(trainer):
            self.refresh(pl_module)
            self.count += 1
            self.last_step = trainer.global_step
        pl_module.log("reference/refreshes", float(self.count))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.count == 0:
            tau, unit, steps = self.rule.tau, self.rule.unit, trainer.global_step
            print_line(
                f"reference_refresh: the reference did not move because the run ended after {amount(steps, 'steps')}, "
                f"before tau={amount(tau, f'{unit}s')}."
            )

    def refresh(self, pl_module: Any) -> None:
        """Move the reference now."""
        if isinstance(pl_module.reference, Reference):
            pl_module.reference.mix(pl_module.policy, self.rule.alpha)
        else:
            mix_modules(pl_module.reference, pl_module.policy, self.rule.alpha)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether a refresh follows the optimizer step, or the end of the round, that has just been reached."""
        if trainer.global_step == self.last_step:  # the first batches of an accumulation
            return False
        if self.rule.unit == "round":
            return trainer.is_last_batch and (trainer.current_epoch + 1) % self.rule.tau == 0
        return trainer.global_step % self.rule.tau == 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = counted("count", state_dict["count"])
        self.last_step = counted("last_step", state_dict["last_step"])
