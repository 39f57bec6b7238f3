"""What every reference offers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy


class Reference(ABC):
    """What the policy is held near."""

    @abstractmethod
    def logps(self, batch: PreferenceBatch) -> Tensor:
        """log π_ref(y|x) of every response, [B, K], without gradient and without dropout."""

    def mix(self, policy: Policy, alpha: float) -> None:
        """reference ← alpha·policy + (1−alpha)·reference."""
        raise ValueError(f"this reference cannot follow the policy: {self}")

    def fingerprint(self) -> str:
        """Identifies its present weights."""
        raise NotImplementedError

    def present(self) -> AbstractContextManager["Reference"]:
        """Itself, or what it loads for as long as it is asked."""
        return nullcontext(self)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it beside weights."""
        return {}

    def load_state(self, state: Mapping[str, int]) -> None:  # noqa: B027  # most have none
        """Take over what `state` gave."""
