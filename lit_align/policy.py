"""The policy: the causal language model that every objective trains, and that samples its own responses.

It is loaded from a hub name, a folder or a GGUF file, and may carry a LoRA adapter. It gives the log-probabilities of a
batch's responses (`forward`) and a plain copy to sample from, and is saved in transformers' format.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lit_align.blocks import skip_unread_rows
from lit_align.compilation import compile_blocks
from lit_align.errors import UserError
from lit_align.files import writing
from lit_align.loading import (
    add_adapter,
    check_trainable,
    check_vocabulary,
    enable_checkpointing,
    load_weights,
    turn_off_dropout,
)
from lit_align.logprobs import PreferenceBatch, check_logits, enable_prefix_sharing, response_logps
from lit_align.model_files import load_tokenizer, read_architecture
from lit_align.model_options import LoRAConfig, PolicyConfig
from lit_align.quantization import scales_of, unpacked
from lit_align.row_norm import keep_norms_in_cache
from lit_align.sharding import frozen_copy, fsdp_modules, full_tensor, rank, reshard, settled, type_of

__all__ = [
    "LoRAConfig",
    "Policy",
    "PolicyConfig",
    "PolicyWithoutAdapter",
    "fingerprint",
    "is_adapter_weight",
    "weights_of",
]

CPU_CHUNK_ELEMENTS = 1 << 17
"""Words that a fingerprint reads at once, few enough for a processor's cache."""


class Policy(nn.Module):
    """A causal language model with its tokenizer.

    `model` is the transformers model itself, with LoRA layers injected where there is an adapter; `adapter` is peft's
    wrapper around it in that case (not registered: its parameters are the model's).
    """

    model: PreTrainedModel
    adapter: PeftModel | None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: PeftModel | None = None):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.shares_prefix = enable_prefix_sharing(model)
        self.temperature = 1.0
        object.__setattr__(self, "adapter", adapter)

    @classmethod
    def load(
        cls,
        config: PolicyConfig,
        lora: LoRAConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Self:
        """Load the model and add the adapter. It is in training mode, and only trainable weights have `requires_grad`.

        Args:
            tokenizer: The model's, where it is loaded already.

        Raises:
            UserError: the model or adapter does not exist or cannot be read.
        """
        tokenizer = tokenizer or load_tokenizer(config)
        model = cls.load_model(config, lora, tokenizer)
        check_vocabulary(tokenizer, model, config)
        check_trainable(model, config, lora)
        keep_norms_in_cache(model)
        if not config.dropout:
            turn_off_dropout(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        adapter = cls.add_adapter(model, lora) if lora else None
        policy = cls(adapter.get_base_model() if adapter else model, tokenizer, adapter)  # type: ignore[arg-type]
        policy.temperature = config.temperature
        if config.compile:
            compile_blocks(policy.model)
        return policy.train()

    @staticmethod
    def load_model(
        config: PolicyConfig, lora: LoRAConfig | None, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """The transformers model, without the adapter.

        Raises:
            UserError: it cannot be read, or is a classifier, an encoder or an encoder-decoder model.
            NotImplementedError: see `check_logits`.
        """
        check_is_decoder(config)
        model = load_weights(AutoModelForCausalLM, config, lora)
        if any("SequenceClassification" in name for name in model.config.architectures or []):
            raise UserError(
                f"model.policy.path: {config.path!r} is a classifier or reward model, which gives no responses. It can "
                "score those of another: use it as a scorer (SequenceClassificationScorer)."
            )
        check_logits(model)
        return model

    @staticmethod
    def add_adapter(model: PreTrainedModel, lora: LoRAConfig) -> PeftModel:
        """Add a LoRA adapter to the model."""
        return add_adapter(model, lora)

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """log π(y|x) of every response, [B, K]."""
        return response_logps(self.model, batch, temperature=self.temperature)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's own weights (an adapter's may be wider)."""
        return type_of(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]

    @property
    def positions(self) -> int | None:
        """The most tokens that the model can read, if its configuration states it."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text by the model's generation config: <|user|> in GLM-4's."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every weight as if the adapter were merged: W + ΔW, accumulated in float32.

        Names are those of the plain transformers model. Tied weights appear once. Shards stay shards; quantized weights
        are unpacked.
        """
        for name, parameter in self.model.named_parameters():
            if is_adapter_weight(name):
                continue
            layer = self.model.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
            if self.adapter is not None and isinstance(layer, LoraLayer) and name.endswith(".base_layer.weight"):
                delta = sum(layer.get_delta_weight(slot).float() for slot in layer.active_adapters)  # type: ignore[operator]
                yield name.replace(".base_layer", ""), settled(unpacked(parameter)).float() + delta
            else:
                yield name.replace(".base_layer", ""), unpacked(parameter)

    def trainable_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the trained weights: all of them, or the adapter's factors."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def fingerprint(self) -> str:
        """Identifies the policy's present weights, the adapter's included."""
        reshard(self)
        return fingerprint(weights_of(self.model, None if self.adapter is None else "default"))

    def base_fingerprint(self) -> str:
        """Identifies the present weights of the model without its adapters."""
        reshard(self)
        return fingerprint(weights_of(self.model))

    @torch.no_grad()
    def merged_copy(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A frozen plain model with the policy's present weights, the adapter merged, in eval mode.

        Where the weights are sharded, every process must call it, and each gets the whole copy.

        Args:
            dtype: Type of its weights, the policy's by default; buffers keep theirs, since rotary frequencies do not
                survive bfloat16.
        """
        reshard(self)
        dtype = dtype or self.dtype
        config = copy.deepcopy(self.model.config)
        config.dtype = dtype
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            plain = type(self.model)(config)
        for name, value in self.full_weights():
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, frozen_copy(value, dtype))
        for name, value in self.model.named_buffers():
            parent, _, leaf = name.replace(".base_layer", "").rpartition(".")
            setattr(plain.get_submodule(parent), leaf, value.clone())
        plain.tie_weights()
        keep_norms_in_cache(plain)
        if self.shares_prefix:
            skip_unread_rows(plain)
        if (generation := getattr(self.model, "generation_config", None)) is not None:
            plain.generation_config = copy.deepcopy(generation)
        return plain.eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context, run without dropout."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def adapters(self, slots: Sequence[str]) -> Iterator[None]:
        """Within this context, run with these adapter slots active (none: the plain model).

        peft's own switches also toggle `requires_grad`, even of the trained slot; this one changes only the flags.
        """
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters, layer._active_adapter = not slots, list(slots)
            yield
        finally:
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in transformers' format, an adapter merged, in the type it was loaded in.

        Where the weights are sharded, every process must call it; rank 0 writes.

        Raises:
            UserError: the folder cannot be written.
        """
        model = self.model if self.adapter is None and not fsdp_modules(self) else self.merged_copy()
        if rank() == 0:
            with writing(folder):
                model.save_pretrained(folder)
                self.tokenizer_to_save().save_pretrained(folder)

    def tokenizer_to_save(self) -> PreTrainedTokenizerBase:
        """The tokenizer that goes with the saved model."""
        return self.tokenizer


class PolicyWithoutAdapter(Policy):
    """A policy's model without its adapter, over the same weights in memory; it only computes.

    It is the start of a policy whose adapter was fresh.
    """

    adapter = None

    def __init__(self, policy: Policy):
        nn.Module.__init__(self)
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.shares_prefix = policy.shares_prefix
        self.temperature = policy.temperature

    @property
    def model(self) -> PreTrainedModel:  # type: ignore[override]
        return self.policy.model

    def forward(self, batch: PreferenceBatch) -> Tensor:
        with self.policy.adapters([]):
            log_probabilities: Tensor = self.policy(batch)
        return log_probabilities


def is_adapter_weight(name: str) -> bool:
    """Whether a weight, by its name in a module, belongs to a LoRA adapter or to a reference in its place."""
    return ".lora_" in name


def weights_of(model: nn.Module, slot: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the model's own weights, the scales of quantized ones, and the weights of one adapter slot."""
    for name, weight in model.named_parameters():
        if not is_adapter_weight(name) or (slot is not None and slot in name.split(".")):
            yield name, weight
            yield from scales_of(name, weight)


@torch.no_grad()
def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits that identify weights by their bits.

    For each tensor they hash the sum modulo 2⁶⁴ of its 8-byte words, each times an odd number given by its position.
    """
    digest = hashlib.sha256()
    for name, shard in sorted(weights, key=lambda pair: pair[0]):
        weight = full_tensor(settled(shard))
        octets = weight.detach().contiguous().view(-1).view(torch.uint8)
        words = torch.nn.functional.pad(octets, (0, -octets.numel() % 8)).view(torch.int64)
        total = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, words.numel(), CPU_CHUNK_ELEMENTS):
            chunk = words[start : start + CPU_CHUNK_ELEMENTS]
            odd = torch.arange(2 * start + 1, 2 * (start + chunk.numel()), 2, device=weight.device)
            total += (chunk * odd).sum()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total.item()}\n".encode())
    return digest.hexdigest()[:16]


def check_is_decoder(config: PolicyConfig) -> None:
    """Check that a model is not one of those whose decoder transformers would load without its encoder.

    Raises:
        UserError: it is an encoder-decoder model, or an encoder.
    """
    if config.path.endswith(".gguf"):
        return  # these are decoders, and their head is read together with their weights only
    shape = read_architecture(config)
    encoders = [name for name in shape.architectures or [] if name.endswith("ForMaskedLM")]
    if shape.is_encoder_decoder or encoders:
        raise UserError(
            f"model.policy.path: {config.path!r} is an encoder{'' if encoders else '-decoder'} model. Name a causal "
            "language model."
        )
