"""A reference with weights of its own: kept beside the policy, or loaded only to record log π_ref."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.compilation import compile_blocks, is_compiled
from lit_align.dtypes import dtype_name
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch, response_logps
from lit_align.policy import Policy, fingerprint
from lit_align.reference.base import Reference
from lit_align.reference.mixing import copy_buffers, mix_weights
from lit_align.sharding import reshard, type_of


class CopiedReference(nn.Module, Reference):
    """A frozen plain model beside the policy.

    Args:
        policy: The policy to copy, with its adapter merged.
        dtype: Type of the copy's weights; None is the policy's.
        accumulate: Keep a float32 copy of the weights for soft mixing if `dtype` is half precision.
        offload: Keep the weights in CPU memory; a layer's weights are on the device while it computes.
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
        if is_compiled(policy.model) and not offload:
            compile_blocks(self.model)
        if offload:
            for layer in self.model.modules():
                if any(True for _ in layer.parameters(recurse=False)):
                    layer.register_forward_pre_hook(self._fetch)
                    layer.register_forward_hook(self._put_back)

    @staticmethod
    def owns(name: str) -> bool:
        return name.startswith("reference.")

    @property
    def is_separate(self) -> bool:
        return True

    def can_follow(self, alpha: float) -> bool:
        return alpha == 1 or self.dtype.itemsize >= 4 or self.accumulator is not None

    def adapt_state(self, saved: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Start a missing accumulator from the weights, and leave out an accumulator that is not needed."""
        model, accumulator = "reference.model.", "reference.accumulator."
        both = {name.replace(model, accumulator): weight for name, weight in saved.items()} | dict(saved)
        wanted = {n: weight for n, weight in both.items() if n in ours or not n.startswith(accumulator)}
        return super().adapt_state(wanted, ours)

    def before_sharding(self) -> None:
        if self.offload:
            raise UserError(
                "model.reference.form=offload keeps the whole reference in CPU memory, but fsdp_sharding shards it. "
                "Use form=auto, with fsdp_sharding.cpu_offload=true to keep its shards in CPU memory."
            )

    def _fetch(self, layer: Any, args: Any) -> None:
        """Move a layer's own weights to the device."""
        layer.home = [weight.data for weight in layer.parameters(recurse=False)]
        for weight in layer.parameters(recurse=False):
            weight.data = weight.data.to(self._device, non_blocking=True)

    @staticmethod
    def _put_back(layer: Any, args: Any, output: Any) -> None:
        for weight, home in zip(layer.parameters(recurse=False), layer.home, strict=True):
            weight.data = home

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the enclosing module between devices, unless the weights stay in CPU memory."""
        return self if self.offload else super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        return type_of(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]

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
        """Stay in eval mode, regardless of the enclosing module."""
        return super().train(False)

    def fingerprint(self) -> str:
        reshard(self)
        return fingerprint(self.model.named_parameters())

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype)
        beside = " with a float32 accumulator" if self.accumulator is not None else ""
        where = " in CPU memory" if self.offload else ""
        return f"frozen copy{where}, {dtype}{beside}"


class RecordedReference(Reference):
    """No reference model in memory; its log-probabilities are computed once and stored with the data.

    Args:
        load: Within its context, the reference is loaded beside the policy, to record log π_ref.
        dtype: Type of its weights.
    """

    def __init__(self, load: Callable[[], AbstractContextManager[CopiedReference]], dtype: torch.dtype):
        self.load = load
        self._dtype = dtype
        self._fingerprint: str | None = None

    @staticmethod
    def owns(name: str) -> bool:
        return False

    @property
    def is_separate(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @contextmanager
    def present(self) -> Iterator[Reference]:
        with self.load() as present:
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
            "model.reference.form=recorded needs log π_ref recorded with the data. Use lit_align's OfflinePairs or "
            "OnPolicyPairs, or form=auto."
        )

    def __str__(self) -> str:
        return "not in memory; its log-probabilities are recorded with the data"
