"""Options of the model that is trained: `PolicyConfig` and `LoRAConfig`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from lit_align.arguments import CheckedArguments
from lit_align.errors import UserError, check_number
from lit_align.quantization import Quantization

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass
class PolicyConfig(metaclass=CheckedArguments):
    """The language model to train, and how it is loaded.

    Args:
        path: Hub name, folder, or GGUF file; `PACKAGE:FILE.gguf` is a file that an installed package ships.
        dtype: Type of the weights. auto: float32, so that small updates are not rounded away; bfloat16 under LoRA,
            whose frozen weights need no more (the adapter stays float32), but float32 on CPUs that multiply bfloat16
            slowly.
        attention: transformers' attention implementation: sdpa, eager, flash_attention_2, ...
        temperature: Train the tempered policy: log-probabilities of policy, reference and sampler alike come from
            logits divided by it. EXO's authors use the 0.8 at which they sample (sampling.temperature).
        dropout: Keep the model's own dropout during training. Without it, policy and reference agree exactly at the
            start.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the model's blocks with torch.compile, and a reference beside it: faster steps on GPUs after
            a minute of compilation.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Run code that the model's repository ships.
        tokenizer: Hub name or folder of another tokenizer than the model's; data.tokenizer sets it.
        chat_template: A file, or the text, of another chat template than the tokenizer's; data.chat_template sets it.
        quantize: nf4 keeps the frozen weights of linear layers in 4 bits under LoRA (QLoRA): a quarter of the memory.
            Sampling and export merge the adapter into unpacked weights of `dtype`.
    """

    path: str
    dtype: Dtype = "auto"
    attention: str = "sdpa"
    temperature: float = 1.0
    dropout: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    chat_template: str | None = None
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        check_number("model.policy.temperature", self.temperature, above=0)


T = TypeVar("T")


def from_fields(cls: type[T], value: T | Mapping[str, Any]) -> T:
    """The dataclass of a mapping of its fields, as checkpoints and command lines hold it; a dataclass is returned.

    Fields that the class does not know are left out.
    """
    if not isinstance(value, Mapping):
        return value
    return cls(**{field.name: value[field.name] for field in fields(cls) if field.name in value})  # type: ignore[arg-type]


@dataclass
class LoRAConfig(metaclass=CheckedArguments):
    """A low-rank adapter is trained and the model itself stays frozen (Hu et al., arXiv 2106.09685).

    Args:
        r: Rank of each update ΔW = (alpha / r)·BA.
        alpha: Scale of the update.
        dropout: Dropout on the adapter's input while training.
        targets: Names of the layers to adapt; all-linear is every linear layer but the output head.
        rslora: Scale by alpha / √r instead (arXiv 2312.03732).
        adapter: Folder of an existing adapter to continue training; it brings its own values of all other options.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_number("model.lora.r", self.r, least=1)
        check_number("model.lora.alpha", self.alpha, above=0)
        check_number("model.lora.dropout", self.dropout, least=0, most=0.99)
        if not self.targets:
            raise UserError("model.lora.targets must name at least one layer, or be all-linear. Name one.")
        for each in fields(self):
            value = getattr(self, each.name)
            if self.adapter is not None and each.name != "adapter" and value != each.default:
                raise UserError(
                    f"model.lora.{each.name}={value} has no effect because adapter={self.adapter} brings its own. "
                    "Leave it out."
                )
