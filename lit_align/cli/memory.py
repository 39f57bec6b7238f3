"""`lit-align doctor --memory --config X.yaml [OPTIONS]`: a run's memory, from its configuration alone.

The model is built from its config.json on torch's meta device, where weights take no memory. So a model of any size is
computed anywhere, without its weights and its data.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.callbacks import ReferenceRefresh
from lit_align.cli.app import AlignCLI
from lit_align.console import print_field
from lit_align.dtypes import dtype_name, is_fast
from lit_align.errors import UserError
from lit_align.loading import resolve_dtype
from lit_align.model_files import read_architecture
from lit_align.objectives import PreferenceObjective
from lit_align.objectives.anchored import AnchoredObjective
from lit_align.objectives.memory import listed_memory, memory_parts
from lit_align.objectives.reward_model import Scored
from lit_align.policy import LoRAConfig, Policy, PolicyConfig, is_adapter_weight
from lit_align.quantization import packed_bytes
from lit_align.reference import Reference
from lit_align.reference.build import make_reference, own_weights


def show_memory(args: list[str]) -> None:
    """Print the memory of weights, gradients, optimizer, reference, sampling and activations.

    Raises:
        UserError: the configuration is wrong, or the model has no config.json.
    """
    cli = AlignCLI(args, run=False)
    module: Any = cli.model
    if not isinstance(module, PreferenceObjective):
        raise UserError(
            f"doctor --memory knows the objectives of lit_align, not {type(module).__name__}. Leave --memory out."
        )
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ReferenceRefresh):
            callback.setup(cli.trainer, module, "fit")
    with torch.device("meta"):
        module.policy = weightless_policy(module)
        if isinstance(module, AnchoredObjective):
            module.reference = weightless_reference(module)
        module.configure_model()
    for name, text in describe_memory(module):
        print_field(name, text)


def weightless_policy(module: PreferenceObjective) -> Policy:
    """The policy on the device on which it is built, with weights that hold nothing.

    Raises:
        UserError: the model has no config.json.
    """
    kinds = (Policy, AutoModelForCausalLM)
    if not module.data_needs().gives_logps:
        kinds = (Scored, AutoModelForSequenceClassification)
    return _weightless(*kinds, module.policy_config, module.lora, "model.policy.path")


def _weightless(policy: type[Policy], kind: Any, config: PolicyConfig, lora: LoRAConfig | None, option: str) -> Policy:
    shape = read_architecture(config, option)
    if policy is Scored:
        shape.num_labels = 1
    shape.dtype = resolve_dtype(config, lora)  # also of the model within a classifier
    model = kind.from_config(shape, dtype=shape.dtype, attn_implementation=config.attention)
    adapter: Any = None if lora is None else policy.add_adapter(model, lora)
    return policy(model if adapter is None else adapter.get_base_model(), None, adapter).train()  # type: ignore[arg-type]


def weightless_reference(module: AnchoredObjective) -> Reference | None:
    """The reference with the shape of another model, if that is loaded beside the policy."""
    config = module.reference_config
    if config.path is None or config.form in ("adapter", "recorded"):
        return None  # `configure_model` builds these without weights of their own
    assert module.policy is not None
    dtype = dtype_name(module.policy.dtype)
    origin = replace(module.policy_config, path=config.path, dtype=dtype, revision=None, quantize=None)
    other = _weightless(Policy, AutoModelForCausalLM, origin, None, "model.reference.path")
    return make_reference(other, origin, None, replace(config, path=None), module.refresh_rule)


def describe_memory(module: PreferenceObjective) -> list[tuple[str, str]]:
    """Lines with a name each, of a module whose model may have no weights."""
    policy, config = module.policy, module.policy_config
    assert policy is not None
    parts = memory_parts(module)
    if config.quantize is not None:
        parts["policy"] = packed_policy_bytes(policy)
    numbers = sum(weight.numel() for name, weight in policy.named_parameters() if not is_adapter_weight(name))
    itemsize, shape = policy.dtype.itemsize, policy.model.config.get_text_config()
    activations = "come on top; `doctor` without --memory measures them"
    if config.gradient_checkpointing:
        kept = 1000 * shape.num_hidden_layers * shape.hidden_size * itemsize
        activations = f"{kept / 1e9:.2f} GB more for 1,000 tokens of a batch, and those of one layer (checkpointing)"
    lines = [("model", f"{config.path}: {numbers / 1e9:.2f} billion weights")]
    if config.dtype == "auto" and module.lora is not None and not is_fast(torch.bfloat16):
        lines.append(("type", "float32, as auto means on this CPU; for a GPU, add --model.policy.dtype=bfloat16"))
    return [
        *lines,
        ("training", listed_memory(parts)),
        (
            "sampling",
            f"{numbers * itemsize / 1e9:.2f} GB more while a plain copy samples (rounds, verdict) or is saved",
        ),
        ("activations", activations),
    ]


def packed_policy_bytes(policy: Policy) -> int:
    """Bytes of the policy's weights if the linear layers are kept in 4 bits, except for adapter and head."""
    head = policy.model.get_output_embeddings()
    packed = {
        f"{name}.weight"
        for name, layer in policy.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and "score" not in name.split(".")
    }
    own = {id(weight) for weight in own_weights(policy)}
    return sum(
        packed_bytes(weight.numel())
        if name in packed and not is_adapter_weight(name)
        else weight.numel() * weight.element_size()
        for name, weight in policy.named_parameters()
        if id(weight) in own
    )
