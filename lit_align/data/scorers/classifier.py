"""Reward models and classifiers in transformers' format as scorers."""

import itertools
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_align.data.formats.rows import Message, Text
from lit_align.data.scorers.base import Scorer, fingerprint_of, joined
from lit_align.dtypes import is_fast
from lit_align.errors import UserError, check_number, first_line
from lit_align.model_files import naming_errors


class SequenceClassificationScorer(Scorer):
    """A sequence-classification model of transformers: a reward model, or any classifier.

    With one output, the reward is its logit. With several, the reward is the log-odds of `label`, log p/(1−p), whose
    differences do not shrink near p = 1 as those of p do; where `problem_type` is regression, it is the output itself.
    The weights are loaded at the first score.

    Args:
        model: Folder saved by `save_pretrained`, or a hub name.
        batch_size: Most texts per forward pass.
        dtype: Type of the weights. auto is the type that they are saved in, but float32 on CPUs that multiply that
            type slowly.
        device: auto is the GPU if there is one; or cpu, cuda, cuda:1, mps.
        template: The model's input, such as "Q: {prompt} A: {response}"; a chat's messages are joined by blank lines.
            None is the tokenizer's chat template, with a plain prompt as the user's message; if there is none, the
            response follows the prompt directly.
        last_line: Read only the last line of a plain prompt, which the response continues, without the examples above.
        label: Output that gives the reward, for models with several outputs, counted from 0.
        max_length: Longest text in tokens; longer texts lose their beginning and are counted (`truncated`). None is the
            model's limit.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 32,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str = "auto",
        template: str | None = None,
        last_line: bool = False,
        label: int | None = None,
        max_length: int | None = None,
    ):
        check_number("scorer.batch_size", batch_size, least=1)
        check_number("scorer.max_length", max_length, least=1)
        self.model = model
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self.template = template
        self.last_line = last_line
        self.label = label
        self.config, self.tokenizer = _load_config(model)
        self._pad_id = _pad_id(self.config, self.tokenizer)
        self.max_length = self._limit(max_length)
        self.truncated = 0  # texts shortened so far
        self._loaded: PreTrainedModel | None = None
        options = {
            "dtype": None if dtype == "auto" else dtype,
            "template": template,
            "last_line": last_line or None,
            "label": label,
            "max_length": max_length,
        }
        self._options = "".join(f" {name}={value!r}" for name, value in options.items() if value is not None)
        if template is not None:
            _check_template(template)
        _check_label(model, self.config, label)

    @property
    def identity(self) -> str:
        """Name, version, and the options that change scores."""
        return f"{self.model}@{self._version}{self._options}"

    @cached_property
    def _version(self) -> str:
        """Fingerprint of a folder's files, or the hub's commit."""
        folder = Path(self.model)
        if not folder.is_dir():
            return str(getattr(self.config, "_commit_hash", None))[:16]
        return fingerprint_of(sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}))

    def start(self) -> None:
        self._loaded = self._loaded or self._load()

    def release(self) -> None:
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        model = self._loaded = self._loaded or self._load()
        texts = [self._text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        logits_NL = model(**self._padded(self._token_ids(texts), model)).logits.float()
        return self._rewards(logits_NL).tolist()

    def _padded(self, ids: list[list[int]], model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's inputs. Decoders read the last token that is not padding."""
        pad = self._pad_id
        if pad is None:  # any number that ends no text
            ends = {each[-1] for each in ids if each}
            pad = next(number for number in itertools.count() if number not in ends)
        config: Any = model.config.get_text_config()
        config.pad_token_id = pad
        side = "left" if self.config.model_type == "xlnet" else "right"  # XLNet reads the last place
        rows = [torch.tensor(each, device=model.device, dtype=torch.long) for each in ids]
        return {
            "input_ids": pad_sequence(rows, True, pad, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, side),
        }

    def _rewards(self, logits_NL: Tensor) -> Tensor:
        """Logit or log-odds, [N]."""
        if self.label is None:
            return logits_NL[:, 0]
        if self.config.problem_type in ("multi_label_classification", "regression"):  # each output stands for itself
            return logits_NL[:, self.label]
        others = [k for k in range(logits_NL.shape[1]) if k != self.label]
        return logits_NL[:, self.label] - logits_NL[:, others].logsumexp(-1)

    def _text(self, prompt: Text, response: str) -> str:
        """The model's input."""
        if self.last_line and isinstance(prompt, str):
            prompt = prompt.rpartition("\n")[2]
        if self.template is not None:
            return self.template.format(prompt=joined(prompt), response=response)
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*chat, {"role": "assistant", "content": response}]
            return str(self.tokenizer.apply_chat_template(_with_joined_answer(chat), tokenize=False))
        continues = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
        return joined(prompt) + ("" if continues else "\n\n") + response

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text; a text that is too long loses its beginning."""
        # a chat template has already inserted the special tokens
        special = self.template is not None or not self.tokenizer.chat_template
        encode = partial(self.tokenizer, add_special_tokens=special, verbose=False)
        ids = encode(texts).input_ids
        long = [place for place, each in enumerate(ids) if len(each) > self.max_length]
        if long and not self.truncated:
            rank_zero_warn(
                f"scorer {self.model}: a text of {len(ids[long[0]])} tokens is longer than "
                f"max_length={self.max_length} and is scored without its beginning. Further such texts are only "
                "counted. Raise max_length if the model allows it, or shorten the prompts."
            )
        self.truncated += len(long)
        for place in long:
            ids[place] = encode(texts[place], truncation=True, max_length=self.max_length).input_ids
        return ids

    def _limit(self, max_length: int | None) -> int:
        """Most tokens of a text."""
        positions = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        if max_length is None:
            return min(positions, self.tokenizer.model_max_length)
        if max_length > positions:
            raise UserError(
                f"scorer.max_length={max_length} must be at most {positions}, the limit of {self.model!r}. Lower it."
            )
        return max_length

    def _load(self) -> PreTrainedModel:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        unchanged = torch.random.fork_rng(devices=[])  # loading must not change training's random numbers
        with naming_errors(f"scorer.model={self.model!r} cannot be loaded"), unchanged:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.model, dtype=dtype, output_loading_info=True
            )
        if report["missing_keys"]:
            raise UserError(
                f"scorer.model={self.model!r} has no weights for {', '.join(sorted(report['missing_keys']))}, so its "
                "scores would be random. Give a model trained for sequence classification."
            )
        for name, module in model.named_modules():  # RoBERTa counts positions from the padding token's number
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                self.max_length = min(self.max_length, module.num_embeddings - module.padding_idx - 1)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if self.dtype == "auto" and not is_fast(model.dtype):
            model = model.float()
        return model.eval().requires_grad_(False).to(device)


def _load_config(model: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    path = Path(model)
    is_path = model.startswith(("/", ".", "~")) or len(path.parts) > 2
    is_path |= len(path.parts) == 2 and path.parent.is_dir()  # it looks like a hub name, but its folder is here
    if is_path and not path.is_dir():
        raise UserError(f"scorer.model={model!r} does not exist. {_MODELS}")
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"scorer.model={model!r} is not a folder with a model and its tokenizer, and the hub has no model of that "
            f"name ({first_line(error)}). {_MODELS}"
        ) from error
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(
            f"scorer.model={model!r} must be a sequence classifier, but is "
            f"{', '.join(config.architectures or ['of no stated kind'])}. Give a model trained to give scores."
        )
    tokenizer.truncation_side = "left"  # the response matters most
    return config, tokenizer


def _pad_id(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of the padding token; None if neither tokenizer nor model has one."""
    number = tokenizer.pad_token_id
    if number is None:
        number = getattr(config.get_text_config(), "pad_token_id", None)
    return number if isinstance(number, int) and number >= 0 else None


# the files that hold weights, configuration and tokenizer; logs and metrics may be next to them
_MODEL_FILES = [
    "*.safetensors",
    "pytorch_model*.bin",
    "config.json",
    "token*.*",
    "*tokens*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
]
_MODELS = "Give a folder saved by `save_pretrained`, or a hub name."


def _check_template(template: str) -> None:
    try:
        filled = template.format(prompt="", response="\0")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"scorer.template={template!r} cannot be filled in ({type(error).__name__}: {error}). Use {{prompt}} and "
            "{response}, and double any other brace."
        ) from error
    if "\0" not in filled:
        raise UserError(f"scorer.template={template!r} must contain {{response}}. Add it.")


def _check_label(model: str, config: PretrainedConfig, label: int | None) -> None:
    count = config.num_labels or 1
    if count == 1 and label is not None:
        raise UserError(f"scorer.label={label} has no effect: {model!r} has one output. Leave it out.")
    if count > 1 and (label is None or not 0 <= label < count):
        names = ", ".join(f"{number} {name}" for number, name in (config.id2label or {}).items())
        raise UserError(f"scorer.label={label} must be one of the outputs of {model!r}: {names}. Set it.")


def _with_joined_answer(chat: list[Message]) -> list[Message]:
    """The chat with its answer joined to the assistant's message before it, which the answer continues."""
    *before, begun, answer = chat
    if begun["role"] != "assistant":
        return chat
    return [*before, {**begun, "content": (begun["content"] or "") + answer["content"]}]
