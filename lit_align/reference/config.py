"""Options of a reference: how it is held, and how it moves."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_align.arguments import CheckedArguments
from lit_align.errors import UserError
from lit_align.model_options import Dtype


@dataclass(frozen=True)
class RefreshRule:
    """reference ← alpha·policy + (1−alpha)·reference, every tau units."""

    alpha: float
    tau: int
    unit: Literal["step", "round"] = "step"
    accept_change: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(
                f"reference_refresh.alpha={self.alpha} must be in (0, 1]: reference ← alpha·policy + "
                "(1−alpha)·reference. Use 1 to replace the reference, or leave the refresh out for a reference that "
                "never moves (--reference_refresh=null)."
            )
        if self.tau < 1:
            raise UserError(
                f"reference_refresh.tau={self.tau} must be at least 1 {self.unit} between two refreshes. Raise it."
            )

    def __str__(self) -> str:
        every = f"every {self.unit}" if self.tau == 1 else f"every {self.tau} {self.unit}s"
        mixture = "policy" if self.alpha == 1 else f"{self.alpha:g}·policy + {1 - self.alpha:g}·reference"
        return f"← {mixture}, {every}"

    def state(self) -> dict[str, Any]:
        """The fields that identify the rule in a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key != "accept_change"}


@dataclass
class ReferenceConfig(metaclass=CheckedArguments):
    """The model that the policy is held near.

    Args:
        form: copy is a frozen second model. offload is a copy whose weights stay in CPU memory and move to the device
            layer by layer. adapter uses the policy's own weights with past adapters (LoRA only). recorded keeps no
            second model in memory: log π_ref is computed once and stored with the data (no refresh). auto is adapter
            under LoRA, otherwise copy.
        dtype: Type of a copy's weights; auto is the policy's, which makes margins exactly 0 at the start.
        path: Another model as the reference; None is the policy's start.
    """

    form: Literal["auto", "copy", "adapter", "offload", "recorded"] = "auto"
    dtype: Dtype = "auto"
    path: str | None = None

    @property
    def is_start(self) -> bool:
        """Whether it begins with the policy's own weights, in the same type."""
        return self.path is None and self.dtype == "auto"
