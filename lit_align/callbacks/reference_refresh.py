"""The trust region: the reference follows the policy (arXiv 2404.09656, §3).

    reference ← alpha·policy + (1−alpha)·reference      every tau optimizer steps, or every tau rounds

Composes with every objective that has a reference: TR-DPO is DPO beside this callback. The moved reference, its rule
and the count of refreshes are in the checkpoint; a run that resumes with another rule stops and says so.
"""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_align.errors import UserError
from lit_align.reference import RefreshRule


class ReferenceRefresh(Callback):
    """Move the reference toward the policy, softly or at once.

    Args:
        alpha: Weight of the policy in reference ← alpha·policy + (1−alpha)·reference; 1 replaces the reference. The
            paper's best: 0.5 to 0.6 with tau 1, or 1 with tau 512.
        tau: Optimizer steps (or rounds) from one refresh to the next.
        unit: What tau counts; a round is one epoch over freshly sampled pairs, and the refresh comes at its end.
        accept_change: Go on from a checkpoint that was made with another rule.

    The module must offer `policy`, `reference` with `mix(policy, alpha)`, and read `refresh_rule` when it builds the
    reference. Logs `reference/refreshes`, the count so far.
    """

    def __init__(
        self, alpha: float, tau: int = 1, unit: Literal["step", "round"] = "step", accept_change: bool = False
    ):
        self.rule = RefreshRule(alpha, tau, unit, accept_change)
        self.count = 0
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "refresh_rule"):
            raise UserError(
                f"reference_refresh: {type(pl_module).__name__} has no reference to refresh. Take the callback out "
                "(--reference_refresh=null), or an objective with a reference."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("reference_refresh: sharded models are not supported yet; use one device or DDP.")
        pl_module.refresh_rule = self.rule  # type: ignore[assignment]  # any module that offers the contract above

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due(trainer):
            pl_module.reference.mix(pl_module.policy, self.rule.alpha)  # type: ignore[union-attr, operator]
            self.count += 1
            self.last_step = trainer.global_step
        pl_module.log("reference/refreshes", float(self.count))

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the optimizer has just made the step, or the round its last step, that a refresh follows."""
        if trainer.global_step == self.last_step:  # the first batches of an accumulation
            return False
        if self.rule.unit == "round":
            return trainer.is_last_batch and (trainer.current_epoch + 1) % self.rule.tau == 0
        return trainer.global_step % self.rule.tau == 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.last_step = state_dict["last_step"]
