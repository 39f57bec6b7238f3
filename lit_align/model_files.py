"""Files of models, but for their weights: where they are, and what configuration and tokenizer they hold.

A model is a hub name, a folder, a GGUF file, or a GGUF file in a package.
"""

import importlib.metadata
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from lit_align.errors import UserError, first_line
from lit_align.model_options import PolicyConfig

_STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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


def read_architecture(config: PolicyConfig, option: str = "model.policy.path") -> PretrainedConfig:
    """The model's config.json, or a GGUF file's head, without its weights.

    Args:
        option: Name of the option in messages.

    Raises:
        UserError: the model does not exist, or it has no configuration that can be read.
    """
    where = locate_model(config)
    with naming_errors(f"{option}: cannot load {config.path!r}"):
        return AutoConfig.from_pretrained(**where)


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
    return getattr(read_architecture(config).get_text_config(), "max_position_embeddings", None)
