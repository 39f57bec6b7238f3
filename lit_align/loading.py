"""Loading of weights and of LoRA adapters."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lit_align.dtypes import fast_dtype
from lit_align.errors import UserError, first_line
from lit_align.lora_linear import beyond_plain_lora, keep_updates_in_cache
from lit_align.model_files import gguf_options, locate_model, naming_errors, stored_type
from lit_align.model_options import LoRAConfig, PolicyConfig
from lit_align.quantization import holds_quantized, keep_layout, quantization_config
from lit_align.sharding import are_lazy, convert_later, types_shown

disable_progress_bar()  # loading weights is quick, and its bar would interrupt ours


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, config: PolicyConfig) -> None:
    """Check that the model has an embedding for each token.

    Raises:
        UserError: another tokenizer was set, and it has more tokens.
    """
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if config.tokenizer is not None and len(tokenizer) > rows:
        raise UserError(
            f"data.tokenizer={config.tokenizer} must be a tokenizer of this model: it has {len(tokenizer)} tokens, but "
            f"{config.path!r} has {rows} embeddings. Use one that fits."
        )


def resolve_dtype(config: PolicyConfig, lora: LoRAConfig | None) -> torch.dtype:
    """The type in which the model's weights are loaded."""
    if config.dtype == "auto":
        return fast_dtype(torch.bfloat16) if lora else torch.float32
    return getattr(torch, config.dtype)


def load_weights(kind: Any, config: PolicyConfig, lora: LoRAConfig | None, **options: Any) -> Any:
    """A transformers model with its weights, as `from_pretrained` returns it; lazy ones within `lazy_weights`.

    Args:
        kind: One of transformers' Auto classes.
        options: More arguments of `from_pretrained`.

    Raises:
        UserError: the model does not exist or cannot be read.
    """
    where = locate_model(config)
    dtype = resolve_dtype(config, lora)
    options |= {"dtype": dtype, "attn_implementation": config.attention, **gguf_options(where)}
    if config.quantize is not None:
        if "gguf_file" in where:
            raise UserError(
                f"model.policy.quantize={config.quantize} cannot be used with the GGUF file {config.path!r}: its "
                "weights are unpacked when it is loaded. Give the model's folder or hub name."
            )
        # on the CPU; Lightning moves the packed weights to the device
        options |= {"quantization_config": quantization_config(dtype), "device_map": {"": "cpu"}}
    may_wait = are_lazy() and config.quantize is None and "gguf_file" not in where
    with naming_errors(f"model.policy.path: cannot load {config.path!r}"):
        stored = stored_type(where) if may_wait else None
        loaded = kind.from_pretrained(**where, **options | {"dtype": stored or dtype})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if stored not in (None, dtype) and keeps_some_in_float32(model):  # in half precision alone
            return kind.from_pretrained(**where, **options)
    if stored not in (None, dtype):
        model.config.dtype = dtype
        for weight in model.parameters():
            convert_later(weight, dtype)
    keep_layout(model)  # the first forward pass may be next
    return loaded


def keeps_some_in_float32(model: PreTrainedModel) -> bool:
    """Whether some weights of a model stay in float32 where the others are in half precision."""
    return bool(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict)


def check_trainable(model: PreTrainedModel, config: PolicyConfig, lora: LoRAConfig | None) -> None:
    """Check that quantized weights stay frozen.

    Raises:
        UserError: there is no adapter to train.
    """
    if lora is None and holds_quantized(model):
        raise UserError(
            f"model.policy.path={config.path}: weights of 4 bits cannot be trained themselves. Train an adapter (set "
            "model.lora), or leave model.policy.quantize out."
        )


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off dropout modules, and the rates that other modules keep (`attention_dropout`, `resid_pdrop`, …)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_adapter(model: PreTrainedModel, lora: LoRAConfig, task: str | None = "CAUSAL_LM") -> PeftModel:
    """Add a new adapter to a model, or a saved one; only the adapter's weights are trained then.

    Args:
        task: peft's name of the model's task.

    Raises:
        UserError: the saved adapter cannot be read or is not a plain one, no layer has the name of a target, or an
            embedding and an output head that share weights would be adapted.
    """
    if lora.adapter is not None:
        with naming_errors(f"model.lora.adapter: cannot load {lora.adapter!r}"), types_shown(model):
            adapter = PeftModel.from_pretrained(model, lora.adapter, is_trainable=True)
        config = adapter.peft_config["default"]
        if found := beyond_plain_lora(config):
            raise UserError(
                f"model.lora.adapter: {lora.adapter!r} is not a plain LoRA adapter ({found}). Merge it into the model "
                "and start from that."
            )
    else:
        config = LoraConfig(
            task_type=task,  # type: ignore[arg-type]  # peft takes the name of its enum
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore  # peft wants an int and works with any number
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            use_rslora=lora.rslora,
        )
        try:
            with types_shown(model):
                adapter = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"model.lora.targets={lora.targets!r}: {first_line(error)}.") from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied and any(isinstance(layer, BaseTunerLayer) for layer in (embedding, head)):
        given = f"targets={lora.targets!r}" if lora.adapter is None else f"adapter={lora.adapter!r}"
        raise UserError(
            f"model.lora.{given}: the embedding of this model shares its weights with the output head, so that an "
            "update of only one of them cannot be merged. Leave both out."
        )
    keep_updates_in_cache(model)
    return adapter  # type: ignore[return-value]


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass."""
    # the name has changed between releases of transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
