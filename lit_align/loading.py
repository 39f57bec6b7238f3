"""Loading of models, tokenizers and LoRA adapters: hub names, folders, GGUF files."""

import importlib.metadata
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from lit_align.arguments import CheckedArguments
from lit_align.dtypes import fast_dtype
from lit_align.errors import UserError, check_number, first_line
from lit_align.lora_linear import beyond_plain_lora, keep_updates_in_cache
from lit_align.quantization import Quantization, holds_quantized, keep_layout, quantization_config
from lit_align.sharding import are_lazy, convert_later, types_shown

_STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

disable_progress_bar()  # loading weights is quick, and its bar would interrupt ours

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


@contextmanager
def naming_errors(what: str, fix: str = "") -> Iterator[None]:
    """Turn an error of reading a model's or an adapter's files into a message that begins with what cannot be read.

    Args:
        fix: A sentence at the message's end.

    Raises:
        UserError: a file is missing or damaged, does not fit the others, or would run code.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{what}: its weights are a pickle that is damaged or would run code. {fix}".strip()) from error
    except Exception as error:  # damaged files can raise anything
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{first_line(error)}. {fix}".strip()) from error


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or another one, with its chat template or another.

    Raises:
        UserError: the model or the chat template does not exist, or the model has no tokenizer.
    """
    path = config.tokenizer or config.path
    option = "model.policy.path" if config.tokenizer is None else "data.tokenizer"
    try:
        where = locate_model(config if config.tokenizer is None else replace(config, path=path, revision=None))
    except UserError as error:
        raise UserError(str(error).replace("model.policy.path", option)) from error
    here = "" if Path(path).exists() else ": this folder does not exist, and as a hub name"
    fix = "Check the name" + (", or set data.tokenizer." if config.tokenizer is None else ".")
    with naming_errors(f"{option}: no tokenizer for {path!r}{here}", fix):
        tokenizer = AutoTokenizer.from_pretrained(**where)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    return tokenizer


def read_template(given: str) -> str:
    """The text of a chat template, which is given itself or by its file.

    Raises:
        UserError: it is neither a template nor an existing file.
    """
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")  # editors may put a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template={given} must be a file, or a template's text with {{{{ … }}}}: {first_line(error)}. "
            "Change it."
        ) from error


def load_positions(config: PolicyConfig) -> int | None:
    """The most tokens that the model reads, without loading it; None where it does not say, or is a GGUF file."""
    if config.path.endswith(".gguf"):
        return None  # its head is read together with its weights only
    with naming_errors(f"model.policy.path: cannot load {config.path!r}"):
        model = AutoConfig.from_pretrained(**locate_model(config))
    return getattr(model.get_text_config(), "max_position_embeddings", None)


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


def locate_model(config: PolicyConfig) -> dict[str, Any]:
    """`from_pretrained`'s arguments for a hub name, a folder, a GGUF file, or a GGUF file in a package.

    Raises:
        UserError: the file, the folder or the package does not exist, or it has a revision.
    """
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision or "main"}
    if config.revision is not None and (config.path.endswith(".gguf") or Path(config.path).exists()):
        raise UserError(
            f"model.policy.revision={config.revision} has no effect because {config.path!r} is not a hub name. Leave "
            "it out."
        )
    if config.path.endswith(".gguf"):
        package, colon, file = config.path.rpartition(":")
        path = Path(file)
        if colon:
            path = _file_of_package(package, file)
        if not path.is_file():
            raise UserError(f"model.policy.path: the GGUF file {str(path)!r} does not exist. Give another.")
        return options | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    looks_local = Path(config.path).is_absolute() or config.path.startswith(".") or config.path.count("/") != 1
    if looks_local and "/" in config.path and not Path(config.path).is_dir():
        raise UserError(
            f"model.policy.path: there is no folder {config.path!r}. Give a folder saved by `save_pretrained`, a hub "
            "name such as HuggingFaceTB/SmolLM2-135M, or a GGUF file."
        )
    return options | {"pretrained_model_name_or_path": config.path}


def _file_of_package(package: str, file: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"model.policy.path: the package {package!r} is not installed. Install it.") from error
    for entry in files:
        if entry.name == Path(file).name:
            return Path(str(entry.locate()))
    raise UserError(f"model.policy.path: the package {package!r} ships no file {file!r}. Give another.")


def gguf_options(where: dict[str, Any]) -> dict[str, Any]:
    """Unpack GGUF weights: packed ones can be neither trained nor saved (transformers ≥ 5.20 keeps them packed)."""
    if "gguf_file" not in where:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def stored_type(where: Mapping[str, Any]) -> torch.dtype | None:
    """The type of all weights in a model's safetensors files; None if there are several, or no such files.

    Args:
        where: `from_pretrained`'s arguments, from `locate_model`.
    """
    path, revision = where["pretrained_model_name_or_path"], where["revision"]
    index, whole = (
        cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in ("model.safetensors.index.json", "model.safetensors")
    )
    files = [whole] if whole else []
    if not whole and index:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [cached_file(path, name, revision=revision) for name in names]
    types = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            types |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  # not a dict
    return _STORED_TYPES.get(types.pop()) if len(types) == 1 else None


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
