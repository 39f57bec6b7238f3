"""The start beside a trained policy."""

import pytest
import torch

from lit_align.data.batches import Example, collate
from lit_align.evaluation.start import Start
from lit_align.objectives import SFT
from lit_align.policy import LoRAConfig, Policy, PolicyConfig

LORA = LoRAConfig(r=4)


def trained(path: str, lora: LoRAConfig | None, dtype: str) -> SFT:
    """An objective whose policy has moved."""
    module = SFT(PolicyConfig(path, dtype=dtype), lora=lora)  # type: ignore[arg-type]
    module.configure_model()
    assert module.policy is not None
    for _, weight in module.policy.trainable_weights():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "LoRA"])
def test_the_start_is_the_policy_before_training_to_the_bit(tiny_model, lora, dtype):
    module = trained(tiny_model, lora, dtype)
    policy, batch = module.policy, collate([Example([5, 6], [[7, 8], [9]], "")], [0])
    assert policy is not None
    fresh = Policy.load(PolicyConfig(tiny_model, dtype=dtype), lora)  # type: ignore[arg-type]
    after, start = policy(batch), Start(module)
    with start.present() as before:
        assert torch.equal(before(batch), fresh(batch))
        copied = before.merged_copy(torch.bfloat16).state_dict()
        assert (before is policy) == (lora is not None), "under a fresh adapter no model is loaded"
    for name, weight in fresh.merged_copy(torch.bfloat16).state_dict().items():
        assert torch.equal(copied[name], weight)
    assert torch.equal(policy(batch), after)
    assert not torch.equal(after, fresh(batch))


def test_an_adapter_that_training_continues_belongs_to_the_start(tiny_model, tmp_path):
    first = trained(tiny_model, LORA, "float32")
    assert first.policy is not None
    assert first.policy.adapter is not None
    first.policy.adapter.save_pretrained(tmp_path)
    module = trained(tiny_model, LoRAConfig(adapter=str(tmp_path)), "float32")
    assert module.policy is not None
    batch = collate([Example([5, 6], [[7, 8], [9]], "")], [0])
    torch.nn.init.zeros_(next(weight for name, weight in module.policy.trainable_weights() if "lora_B" in name))
    with Start(module).present() as before:
        assert torch.equal(before(batch), first.policy(batch))
    assert not torch.equal(module.policy(batch), first.policy(batch))
