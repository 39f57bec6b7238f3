"""The reference policy: what the policy is held near, and how it moves.

    soft refresh    θ_ref ← α·θ + (1−α)·θ_ref      every τ optimizer steps or rounds
    hard refresh    the same with α = 1

Gorbatovski et al., Learn Your Reference Model (arXiv 2404.09656), §3. The paper's settings are soft with τ = 1 and
α ≈ 0.6, or hard with τ ≈ 512. A refresh composes with every objective that has a reference.

Under LoRA the reference is the policy's own weights with adapters of the past: none, one, a ring of weighted ones
(`AdapterReference`), or their dense sum (`DeltaReference`); so soft mixing is exact, though the mean of two products BA
is no product of mean factors. Else it is a frozen plain model (`CopiedReference`), or none at all where log π_ref is
recorded with the data (`RecordedReference`). bfloat16 keeps 8 bits, so a small α would round to nothing: a soft-mixed
copy of half precision accumulates in float32 beside the weights it runs with. All of it works on shards (FSDP2).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch, response_logps
from lit_align.policy import Dtype, LoRAConfig, Policy, PolicyConfig, fingerprint, weights_of
from lit_align.sharding import local, reshard, whole, write_rows


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
        form: copy is a frozen second model; offload is one whose weights stay in CPU memory and pass the device layer
            by layer; adapter runs the policy's own weights with adapters of the past (LoRA only); recorded holds no
            second model, for log π_ref is computed once and stored with the data (no refresh). auto takes the adapter
            where there is one, else the copy.
        dtype: Type of a copy's weights; auto is the policy's, for which margins are exactly 0 at the start.
        path: Another model to hold the policy near; None is the policy as it starts.
    """

    form: Literal["auto", "copy", "adapter", "offload", "recorded"] = "auto"
    dtype: Dtype = "auto"
    path: str | None = None


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


class CopiedReference(nn.Module, Reference):
    """A frozen plain model beside the policy.

    Args:
        policy: Copied, its adapter merged.
        dtype: Type of the copy's weights; None is the policy's.
        accumulate: Keep a float32 copy of the weights for soft mixing, where `dtype` is half precision.
        offload: Keep the weights in CPU memory; each layer's are on the device while it computes.
    """

    def __init__(
        self, policy: Policy, *, dtype: torch.dtype | None = None, accumulate: bool = False, offload: bool = False
    ):
        super().__init__()
        self.model = policy.merged_copy(dtype)
        half = (dtype or policy.dtype).itemsize < 4
        self.temperature = policy.temperature
        self.accumulator = policy.merged_copy(torch.float32) if accumulate and half else None
        self.offload = offload
        self._device = torch.device("cpu")  # where it computes
        if offload:
            for layer in self.model.modules():
                if any(True for _ in layer.parameters(recurse=False)):
                    layer.register_forward_pre_hook(self._fetch)
                    layer.register_forward_hook(self._put_back)

    def _fetch(self, layer: Any, args: Any) -> None:
        """Have a layer's own weights on the device."""
        layer.home = [weight.data for weight in layer.parameters(recurse=False)]
        for weight in layer.parameters(recurse=False):
            weight.data = weight.data.to(self._device, non_blocking=True)

    @staticmethod
    def _put_back(layer: Any, args: Any, output: Any) -> None:
        for weight, home in zip(layer.parameters(recurse=False), layer.home, strict=True):
            weight.data = home

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the module around it from device to device, unless the weights are to stay."""
        return self if self.offload else super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[return-value]

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> Tensor:
        if self.offload and self._device != batch.prompt_ids.device:
            self._device = batch.prompt_ids.device
            for buffer in self.model.buffers():  # few and small
                buffer.data = buffer.data.to(self._device)
        return response_logps(self.model, batch, temperature=self.temperature)

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        reshard(self)
        reshard(policy)
        target = self.model if self.accumulator is None else self.accumulator
        mix_weights(dict(target.named_parameters()), dict(policy.full_weights()), alpha)
        if self.accumulator is not None:
            mix_weights(dict(self.model.named_parameters()), dict(self.accumulator.named_parameters()), 1.0)
        if alpha == 1:
            copy_buffers(self.model, policy.model)

    def train(self, mode: bool = True) -> "CopiedReference":
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)

    def fingerprint(self) -> str:
        reshard(self)
        return fingerprint(self.model.named_parameters())

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        beside = " with a float32 accumulator" if self.accumulator is not None else ""
        where = " in CPU memory" if self.offload else ""
        return f"frozen copy{where}, {dtype}{beside}"


class AdapterReference(Reference):
    """The policy's own weights with past adapters of its own in place of the present one, or with none at all.

    A reference mixed softly is a sum of past updates, each with its weight:

        ΔW_ref = (1−α)^T ΔW_0 + Σ_k α(1−α)^(T−k) ΔW_k        ΔW_k = B_k A_k, the policy's at the k-th refresh

    They lie side by side as blocks of one adapter of rank blocks·r, B's columns scaled by the weights. A refresh fades
    all of them by 1−α and writes the present one over the oldest. With as many blocks as `ring_size` says what is
    overwritten is below float32's rounding; a hard refresh (α = 1) needs one.

    Args:
        policy: Carries a LoRA adapter.
        blocks: Past adapters that are kept. 0: the reference is the plain model, right for a fresh adapter and a
            reference that never moves.
    """

    SLOT = "reference"

    def __init__(self, policy: Policy, *, blocks: int):
        self.policy = policy
        self.blocks = blocks
        self.written = 0
        if blocks:
            self._add_slot()
            self.mix(policy, 1.0)

    def _add_slot(self) -> None:
        adapter = self.policy.adapter
        assert adapter is not None
        config = adapter.peft_config["default"]
        assert isinstance(config, LoraConfig)
        wider = {"r": self.blocks * config.r, "lora_dropout": 0.0, "inference_mode": True}
        wider["rank_pattern"] = {name: self.blocks * r for name, r in (config.rank_pattern or {}).items()}
        with torch.random.fork_rng(devices=[]):
            adapter.add_adapter(self.SLOT, LoraConfig(**{**config.to_dict(), **wider}))
        for layer in adapted_layers(self.policy.model):
            layer.scaling[self.SLOT] = layer.scaling["default"]
            for factor in factors(layer, self.SLOT):
                factor.requires_grad_(False).zero_()

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> Tensor:
        with self.policy.evaluating(), self.policy.adapters([self.SLOT] if self.blocks else []):
            return self.policy(batch)

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        if not self.blocks:
            super().mix(policy, alpha)
        reshard(policy)
        block = self.written % self.blocks
        for layer in adapted_layers(policy.model):
            (A, B), (past_A, past_B) = factors(layer, "default"), factors(layer, self.SLOT)
            r = A.shape[0]
            past_B.mul_(1 - alpha)
            # B is sharded along its rows in both, A along its rank: its few rows are gathered
            local(past_B)[:, block * r : (block + 1) * r] = alpha * local(B)
            write_rows(past_A, block * r, whole(A))
        self.written += 1

    def state(self) -> dict[str, int]:
        return {"written": self.written}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.written = state.get("written", self.written)  # none of another form, whose weights will not fit

    def fingerprint(self) -> str:
        reshard(self.policy)
        return fingerprint(weights_of(self.policy.model, self.SLOT))

    def __str__(self) -> str:
        if not self.blocks:
            return "the model without its adapter"
        kept = "the adapter as it was" if self.blocks == 1 else f"the last {self.blocks} adapters, weighted"
        return f"{kept}, {_megabytes(ring_bytes(self.policy, self.blocks))}"


class DeltaReference(Reference):
    """The policy's own weights with a dense update per adapted layer, ΔW_ref ← α·BA + (1−α)·ΔW_ref, in float32.

    For a small α, where a ring of past adapters would be larger than the updates themselves. After a hard refresh it
    would differ from the policy by rounding; one past adapter does not.

    Args:
        policy: Carries a LoRA adapter on linear layers.
    """

    NAME = "lora_reference"

    def __init__(self, policy: Policy):
        self.policy = policy
        self._active = False
        for layer in adapted_layers(policy.model):
            layer.register_parameter(self.NAME, nn.Parameter(self._update(layer), requires_grad=False))
            layer.register_forward_hook(self._add)

    @staticmethod
    @torch.no_grad()
    def _update(layer: LoraLayer) -> Tensor:
        """The policy's ΔW, [out, in] in float32."""
        A, B = factors(layer, "default")
        return layer.scaling["default"] * (B.float() @ A.float())

    def _add(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._active:
            return output
        x, delta = args[0], getattr(layer, self.NAME)
        return output + nn.functional.linear(x, delta.to(x.dtype))

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> Tensor:
        self._active = True
        try:
            with self.policy.evaluating(), self.policy.adapters([]):
                return self.policy(batch)
        finally:
            self._active = False

    @torch.no_grad()
    def mix(self, policy: Policy, alpha: float) -> None:
        reshard(policy)
        for layer in adapted_layers(policy.model):
            getattr(layer, self.NAME).lerp_(self._update(layer), alpha)

    def fingerprint(self) -> str:
        reshard(self.policy)
        return fingerprint(weights_of(self.policy.model, self.NAME))

    def __str__(self) -> str:
        return f"dense updates of the adapted layers, {_megabytes(delta_bytes(self.policy))}"


class RecordedReference(Reference):
    """A reference that is not held: its log-probabilities come with the data, which had them computed once.

    Args:
        load: Builds it, on the policy's device.
    """

    def __init__(self, load: Callable[[], CopiedReference]):
        self.load = load
        self._fingerprint: str | None = None

    @contextmanager
    def present(self) -> Iterator[Reference]:
        present = self.load()
        self._fingerprint = present.fingerprint()
        yield present

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            with self.present():
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def logps(self, batch: PreferenceBatch) -> Tensor:
        raise UserError(
            "model.reference.form=recorded needs log π_ref recorded with the data: take lit_align's OfflinePairs or "
            "OnPolicyPairs, or form=auto."
        )

    def __str__(self) -> str:
        return "not held; its log-probabilities are recorded with the data"


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that carry an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def factors(layer: Any, slot: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of one slot of a layer; of an embedding, in is the vocabulary."""
    if slot in layer.lora_A:
        return layer.lora_A[slot].weight, layer.lora_B[slot].weight
    return layer.lora_embedding_A[slot], layer.lora_embedding_B[slot]


def ring_size(alpha: float) -> int:
    """Past adapters to keep so that what is dropped weighs less than 2⁻²⁴, float32's rounding."""
    return 1 if alpha == 1 else math.ceil(24 * math.log(2) / -math.log1p(-alpha))


def ring_bytes(policy: Policy, blocks: int) -> int:
    """Memory of a ring of past adapters."""
    each = [factor for layer in adapted_layers(policy.model) for factor in factors(layer, "default")]
    return blocks * sum(factor.numel() * factor.element_size() for factor in each)


def delta_bytes(policy: Policy) -> int:
    """Memory of a dense float32 update for each adapted layer."""
    pairs = (factors(layer, "default") for layer in adapted_layers(policy.model))
    return sum(4 * A.shape[1] * B.shape[0] for A, B in pairs)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def make_reference(
    policy: Policy,
    policy_config: PolicyConfig,
    lora: LoRAConfig | None,
    config: ReferenceConfig,
    rule: RefreshRule | None,
) -> Reference:
    """Build the cheapest reference that is right.

    Raises:
        UserError: the form asked for cannot do what the rule needs.
    """
    plain = config.path is None and config.dtype == "auto"
    if config.form == "adapter" and lora is None:
        raise UserError("model.reference.form=adapter needs an adapter: set model.lora, or form=copy.")
    if config.form == "adapter" and not plain:
        raise UserError("model.reference: form=adapter runs the policy's own weights: leave path and dtype out.")
    if config.form == "adapter" or (config.form == "auto" and lora is not None and plain):
        assert lora is not None
        return _adapter_form(policy, lora, rule)
    if config.form == "recorded" and rule is not None:
        raise UserError(
            f"model.reference.form=recorded computes log π_ref once, but this reference moves ({rule}). Take "
            "form=auto, or leave the refresh out (--reference_refresh=null)."
        )

    dtype = str(policy.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    origin = PolicyConfig(**{**asdict(policy_config), "path": config.path or policy_config.path, "dtype": dtype})
    if config.form == "recorded":
        adapter = lora if config.path is None else None
        return RecordedReference(lambda: CopiedReference(Policy.load(origin, adapter).to(policy.device)))
    to = None if config.dtype == "auto" else getattr(torch, config.dtype)
    soft = rule is not None and rule.alpha < 1
    source = policy if config.path is None else Policy.load(origin)
    return CopiedReference(source, dtype=to, accumulate=soft, offload=config.form == "offload")


def _adapter_form(policy: Policy, lora: LoRAConfig, rule: RefreshRule | None) -> Reference:
    if rule is None:
        return AdapterReference(policy, blocks=1 if lora.adapter else 0)
    blocks = ring_size(rule.alpha)
    linear = all("default" in layer.lora_A for layer in adapted_layers(policy.model))
    if blocks > 1 and linear and delta_bytes(policy) < ring_bytes(policy, blocks):
        return DeltaReference(policy)
    return AdapterReference(policy, blocks=blocks)


@torch.no_grad()
def mix_modules(target: nn.Module, source: nn.Module, alpha: float) -> None:
    """`mix_weights` of all parameters, shard by shard; at α = 1 buffers are copied too."""
    reshard(target)
    reshard(source)
    mix_weights(dict(target.named_parameters()), dict(source.named_parameters()), alpha)
    if alpha == 1:
        copy_buffers(target, source)


@torch.no_grad()
def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """target's buffers ← source's, by name."""
    theirs = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(theirs[name])


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
            weight.lerp_(source[name].to(device=weight.device, dtype=weight.dtype), alpha)
