"""The reference: the model that the policy is held near, and how it moves.

    soft refresh    θ_ref ← α·θ + (1−α)·θ_ref      every τ optimizer steps or rounds
    hard refresh    the same with α = 1

Gorbatovski et al., Learn Your Reference Model (arXiv 2404.09656), §3. The paper's settings are soft with τ = 1 and
α ≈ 0.6, or hard with τ ≈ 512. A refresh composes with every objective that has a reference.

Under LoRA the reference is the policy's own weights with past adapters: none, one, several weighted ones
(`AdapterReference`), or their dense sum (`DeltaReference`). This keeps soft mixing exact, although the mean of two
products BA is not the product of the mean factors. Otherwise the reference is a frozen plain model (`CopiedReference`),
or it is not in memory because log π_ref is recorded with the data (`RecordedReference`). bfloat16 keeps 8 bits, so an
update with a small α would round to nothing: a soft-mixed copy in half precision accumulates in float32 beside the
weights it computes with. All forms but offload work on shards (FSDP2).
"""

from lit_align.reference.base import Reference
from lit_align.reference.build import make_reference
from lit_align.reference.config import ReferenceConfig, RefreshRule
from lit_align.reference.copied import CopiedReference, RecordedReference
from lit_align.reference.lora import AdapterReference, DeltaReference
from lit_align.reference.mixing import mix_modules

__all__ = [
    "AdapterReference",
    "CopiedReference",
    "DeltaReference",
    "RecordedReference",
    "Reference",
    "ReferenceConfig",
    "RefreshRule",
    "make_reference",
    "mix_modules",
]
