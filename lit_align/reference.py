"""The reference policy: what the policy is held near, and how it moves.

    soft refresh    θ_ref ← α·θ + (1−α)·θ_ref      every τ optimizer steps or rounds
    hard refresh    the same with α = 1

Gorbatovski et al., Learn Your Reference Model (arXiv 2404.09656), §3. The paper's settings are soft with τ = 1 and
α ≈ 0.6, or hard with τ ≈ 512. A refresh composes with every objective that has a reference.

Two forms: `CopiedReference`, a frozen plain model, which mixes whole weights (under LoRA those of the merged policy, so
that soft mixing is exact), and `AdapterReference`, which costs next to nothing: the policy's own weights with another
adapter slot, or with none. bfloat16 keeps 8 bits, so a small α would round to nothing: a soft-mixed copy of half
precision accumulates in float32 beside the weights it runs with.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch, response_logps
from lit_align.policy import Dtype, LoRAConfig, Policy, PolicyConfig, fingerprint


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
                f"reference_refresh.alpha={self.alpha} must lie in (0, 1]: reference ← alpha·policy + "
                "(1−alpha)·reference. For a reference that never moves leave the refresh out "
                "(--reference_refresh=null); 1 replaces it."
            )
        if self.tau < 1:
            raise UserError(f"reference_refresh.tau={self.tau} must be at least 1 {self.unit} between two refreshes.")

    def __str__(self) -> str:
        every = f"every {self.unit}" if self.tau == 1 else f"every {self.tau} {self.unit}s"
        return (
            f"← policy, {every}"
            if self.alpha == 1
            else f"← {self.alpha:g}·policy + {1 - self.alpha:g}·reference, {every}"
        )

    def state(self) -> dict[str, Any]:
        """What identifies the rule in a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key != "accept_change"}


@dataclass
class ReferenceConfig:
    """What the policy is held near.

    Args:
        form: copy is a frozen second model; adapter runs the policy's own weights with its adapter as it was (LoRA
            only, and no soft refresh). auto takes the adapter where it is right.
        dtype: Type of a copy's weights; auto is the policy's, for which margins are exactly 0 at the start.
        path: Another model to hold the policy near; None is the policy as it starts.
    """

    form: Literal["auto", "copy", "adapter"] = "auto"
    dtype: Dtype = "auto"
    path: str | None = None


class Reference(Protocol):
    """What an objective and a refresh ask of a reference."""

    def logps(self, batch: PreferenceBatch) -> Tensor:
        """log π_ref(y|x) of every response, [B, K], without gradient and without dropout."""
        ...

    def mix(self, policy: Policy, alpha: float) -> None:
        """reference ← alpha·policy + (1−alpha)·reference."""
        ...

    def fingerprint(self) -> str: ...

    def __str__(self) -> str: ...


class CopiedReference(nn.Module):
    """A frozen plain model beside the policy.

    Args:
        policy: Copied, its adapter merged.
        dtype: Type of the copy's weights; None is the policy's.
        accumulate: Keep a float32 copy of the weights for soft mixing, where `dtype` is half precision.
    """

    def __init__(self, policy: Policy, *, dtype: torch.dtype | None = None, accumulate: bool = False):
        super().__init__()
        self.model = policy.merged_copy(dtype)
        half = (dtype or policy.dtype).itemsize < 4
        self.shared_prefix = policy.shared_prefix
        self.temperature = policy.temperature
        self.accumulator = policy.merged_copy(torch.float32) if accumulate and half else None

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> Tensor:
        return response_logps(self.model, batch, shared_prefix=self.shared_prefix, temperature=self.temperature)

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        target = self.model if self.accumulator is None else self.accumulator
        mix_weights(dict(target.named_parameters()), dict(policy.full_weights()), alpha)
        if self.accumulator is not None:
            mix_weights(dict(self.model.named_parameters()), dict(self.accumulator.named_parameters()), 1.0)
        if alpha == 1:
            buffers = dict(policy.model.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])

    def train(self, mode: bool = True) -> "CopiedReference":
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)

    def fingerprint(self) -> str:
        return fingerprint(self.model.named_parameters())

    def __str__(self) -> str:
        dtype = str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        beside = " with a float32 accumulator" if self.accumulator is not None else ""
        return f"frozen copy, {dtype}{beside}"


class AdapterReference:
    """The policy's own weights with an adapter slot of the reference's, or with no adapter at all.

    Args:
        policy: Carries a LoRA adapter.
        snapshot: Keep the adapter as it is now in a slot of its own. Without, the reference is the plain model: right
            for a fresh adapter and a reference that never moves.
    """

    SLOT = "reference"

    def __init__(self, policy: Policy, *, snapshot: bool):
        self.policy = policy
        self.slots = [self.SLOT] if snapshot else []
        if snapshot:
            self._add_slot()

    def _add_slot(self) -> None:
        adapter = self.policy.adapter
        assert adapter is not None
        config = type(adapter.peft_config["default"])(
            **{**adapter.peft_config["default"].to_dict(), "lora_dropout": 0.0}
        )
        adapter.add_adapter(self.SLOT, config)
        for name, parameter in self.policy.model.named_parameters():
            if f".{self.SLOT}." in name:
                parameter.requires_grad_(False)
        self.mix(self.policy, 1.0)

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> Tensor:
        model = self.policy.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with self.policy.adapters(self.slots):
                return self.policy(batch)
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        if alpha != 1 or not self.slots:
            raise ValueError(
                "an adapter's factors can be replaced, not mixed: the mean of BA is not the product of means"
            )
        weights = dict(policy.model.named_parameters())
        ours = {name: weight for name, weight in weights.items() if f".{self.SLOT}." in name}
        mix_weights(ours, {name: weights[name.replace(f".{self.SLOT}.", ".default.")] for name in ours}, 1.0)

    def fingerprint(self) -> str:
        weights = self.policy.model.named_parameters()
        return fingerprint((n, w) for n, w in weights if ".lora_" not in n or (self.slots and f".{self.SLOT}." in n))

    def __str__(self) -> str:
        return "the adapter as it was, in a slot of its own" if self.slots else "the model without its adapter"


def make_reference(
    policy: Policy,
    policy_config: PolicyConfig,
    lora: LoRAConfig | None,
    config: ReferenceConfig,
    rule: RefreshRule | None,
) -> CopiedReference | AdapterReference:
    """Build the cheapest reference that is right.

    Raises:
        UserError: the form asked for cannot do what the rule needs.
    """
    soft = rule is not None and rule.alpha < 1
    if config.form == "adapter":
        if lora is None:
            raise UserError("model.reference.form=adapter needs an adapter: set model.lora, or form=copy.")
        if soft:
            raise UserError(
                f"model.reference.form=adapter cannot be mixed softly ({rule}): the mean of two products BA "
                "is no product of mean factors. Use form=copy (or auto), or alpha=1."
            )
        if config.path is not None or config.dtype != "auto":
            raise UserError("model.reference: form=adapter runs the policy's own weights: leave path and dtype out.")
    plain = config.path is None and config.dtype == "auto"
    if config.form == "adapter" or (config.form == "auto" and lora is not None and plain and not soft):
        assert lora is not None
        return AdapterReference(policy, snapshot=rule is not None or lora.adapter is not None)
    origin = policy
    if config.path is not None:
        dtype = policy_config.dtype if config.dtype == "auto" else config.dtype
        origin = Policy.load(PolicyConfig(**{**asdict(policy_config), "path": config.path, "dtype": dtype}))
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    return CopiedReference(origin, dtype=dtype, accumulate=soft)


@torch.no_grad()
def mix_weights(target: Mapping[str, Tensor], source: Mapping[str, Tensor], alpha: float) -> None:
    """target ← alpha·source + (1−alpha)·target in place, paired by name.

    Raises:
        ValueError: a name or a shape differs; nothing has been changed then.
    """
    if target.keys() != source.keys():
        raise ValueError(f"weights without a partner of the same name: {sorted(target.keys() ^ source.keys())[:5]}")
    for name, weight in target.items():
        if weight.shape != source[name].shape:
            raise ValueError(f"{name}: shapes {tuple(weight.shape)} and {tuple(source[name].shape)} differ")
    for name, weight in target.items():
        if alpha == 1:
            weight.copy_(source[name])
        else:
            weight.lerp_(source[name].to(weight.dtype), alpha)
