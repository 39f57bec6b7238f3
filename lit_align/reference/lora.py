"""References under LoRA: the policy's own weights with past adapters, or with their dense sum."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lit_align.errors import counted
from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy, fingerprint, is_adapter_weight, weights_of
from lit_align.reference.base import Reference
from lit_align.sharding import full_tensor, local_shard, reshard, write_rows


class AdapterReference(Reference):
    """The policy's own weights with past adapters in place of the current one, or without an adapter.

    A reference mixed softly is a sum of past updates, each with its weight:

        ΔW_ref = (1−α)^T ΔW_0 + Σ_k α(1−α)^(T−k) ΔW_k        ΔW_k = B_k A_k, the policy's at the k-th refresh

    The past adapters are blocks of one adapter of rank blocks·r, whose B columns are scaled by the weights. A refresh
    scales all blocks by 1−α and overwrites the oldest with the current adapter. With `ring_size` blocks, the
    overwritten update is below float32's rounding. A hard refresh (α = 1) needs one block.

    Args:
        policy: A policy with a LoRA adapter.
        blocks: Number of past adapters kept. With 0 the reference is the plain model, which is correct for a fresh
            adapter and a reference that never moves.
    """

    SLOT = "reference"

    def __init__(self, policy: Policy, *, blocks: int):
        self.policy = policy
        self.blocks = blocks
        self.written = 0
        if blocks:
            self._add_slot()
            self.mix(policy, 1.0)

    @staticmethod
    def owns(name: str) -> bool:
        return is_adapter_weight(name) and AdapterReference.SLOT in name.split(".")

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype

    @property
    def computes_as_policy(self) -> bool:
        return self.blocks <= 1

    def can_follow(self, alpha: float) -> bool:
        return self.blocks >= ring_size(alpha)

    def _add_slot(self) -> None:
        adapter = self.policy.adapter
        assert adapter is not None
        config = adapter.peft_config["default"]
        assert isinstance(config, LoraConfig)
        wider = {"r": self.blocks * config.r, "lora_dropout": 0.0}
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
            # in both, B is sharded along its rows; A is sharded along its rank, so its few rows are gathered
            local_shard(past_B)[:, block * r : (block + 1) * r] = alpha * local_shard(B)
            write_rows(past_A, block * r, full_tensor(A))
        self.written += 1

    def state(self) -> dict[str, int]:
        return {"written": self.written}

    def load_state(self, state: Mapping[str, int]) -> None:
        # missing if saved by another form, whose weights do not fit
        self.written = counted("written", state.get("written", self.written))

    def fingerprint(self) -> str:
        reshard(self.policy)
        return fingerprint(weights_of(self.policy.model, self.SLOT))

    def __str__(self) -> str:
        if not self.blocks:
            return "the model without its adapter"
        kept = "the adapter as it was" if self.blocks == 1 else f"the last {self.blocks} adapters, weighted"
        return f"{kept}, {_megabytes(ring_bytes(self.policy, self.blocks))}"


class DeltaReference(Reference):
    """The policy's own weights with a dense float32 update per adapted layer, ΔW_ref ← α·BA + (1−α)·ΔW_ref.

    Used for a small α, for which past adapters would need more memory than the dense updates. Not used for a hard
    refresh, after which it would differ from the policy by rounding; one past adapter agrees exactly.

    Args:
        policy: A policy with a LoRA adapter on linear layers.
    """

    NAME = "lora_reference"

    def __init__(self, policy: Policy):
        self.policy = policy
        self._active = False
        for layer in adapted_layers(policy.model):
            layer.register_parameter(self.NAME, nn.Parameter(self._update(layer), requires_grad=False))
            layer.register_forward_hook(self._add)

    @staticmethod
    def owns(name: str) -> bool:
        return DeltaReference.NAME in name.split(".")

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype

    def can_follow(self, alpha: float) -> bool:
        return alpha < 1

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


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that carry an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def factors(layer: Any, slot: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of one slot of a layer; for an embedding, `in` is the vocabulary size."""
    if slot in layer.lora_A:
        return layer.lora_A[slot].weight, layer.lora_B[slot].weight
    return layer.lora_embedding_A[slot], layer.lora_embedding_B[slot]


def ring_size(alpha: float) -> int:
    """Number of past adapters to keep so that a dropped one has a weight below 2⁻²⁴, float32's rounding."""
    return 1 if alpha == 1 else math.ceil(24 * math.log(2) / -math.log1p(-alpha))


def ring_bytes(policy: Policy, blocks: int) -> int:
    """Memory of past adapters, in bytes."""
    each = [factor for layer in adapted_layers(policy.model) for factor in factors(layer, "default")]
    return blocks * sum(factor.numel() * factor.element_size() for factor in each)


def delta_bytes(policy: Policy) -> int:
    """Memory of dense float32 updates of all adapted layers, in bytes."""
    pairs = (factors(layer, "default") for layer in adapted_layers(policy.model))
    return sum(4 * A.shape[1] * B.shape[0] for A, B in pairs)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
