"""The interface of all references."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy


class Reference(ABC):
    """A model that the policy is held near."""

    @abstractmethod
    def logps(self, batch: PreferenceBatch) -> Tensor:
        """log π_ref(y|x) of every response, [B, K], without gradient and without dropout."""

    @staticmethod
    @abstractmethod
    def owns(name: str) -> bool:
        """Whether a weight, by its name in the objective, belongs to a reference of this form."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the model's weights."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of its current weights."""

    @property
    def computes_as_policy(self) -> bool:
        """Whether equal weights give exactly the policy's log-probabilities, even after the adapter was trained."""
        return False

    @property
    def is_separate(self) -> bool:
        """Whether it is a model of its own. If it does not move, recorded log-probabilities can replace it."""
        return False

    def can_follow(self, alpha: float) -> bool:
        """Whether `mix` with this weight of the policy is right in this form."""
        return False

    def mix(self, policy: Policy, alpha: float) -> None:
        """reference ← alpha·policy + (1−alpha)·reference."""
        raise ValueError(f"this reference cannot follow the policy: {self}")

    def present(self) -> AbstractContextManager["Reference"]:
        """Within this context, the reference in memory: itself, or a model loaded for the purpose."""
        return nullcontext(self)

    def state(self) -> dict[str, int]:
        """State that a checkpoint keeps in addition to weights."""
        return {}

    def load_state(self, state: Mapping[str, int]) -> None:  # noqa: B027  # most have none
        """Restore the result of `state`."""

    def adapt_state(self, saved: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Convert weights saved under another refresh rule to this reference's form; None if they do not fit.

        Args:
            saved: The saved reference's weights, by their names in the objective; empty if it had never moved.
            ours: This reference's initial weights.
        """
        adapted = dict(saved or ours)
        shapes = ({name: weight.shape for name, weight in weights.items()} for weights in (adapted, ours))
        return adapted if next(shapes) == next(shapes) else None

    def before_sharding(self) -> None:  # noqa: B027  # most can
        """Check that the weights can be sharded (FSDP2).

        Raises:
            UserError: this form cannot be sharded.
        """
