"""What gives a response its reward: a Python function, or a sequence-classification model.

`score` is the one place where the package calls a scorer; it batches, and lets no missing or non-finite score through.
"""

import functools
import hashlib
import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_align.data.formats import Text
from lit_align.errors import UserError


class ScorerError(UserError):
    """A scorer that failed, or gave something that is no score for each response."""


class Scorer(ABC):
    """Gives each response a reward; the higher, the better.

    Args:
        batch_size: Responses that are scored at once.
    """

    def __init__(self, batch_size: int = 64):
        if batch_size < 1:
            raise UserError(f"scorer.batch_size={batch_size} must be at least 1.")
        self.batch_size = batch_size

    @property
    @abstractmethod
    def identity(self) -> str:
        """Name and version, recorded with each score."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        """The reward of each response to its prompt."""

    def release(self) -> None:
        """Give memory back until the next call."""


class FunctionScorer(Scorer):
    """A Python function `(prompts, responses) -> rewards`.

    Args:
        function: Where it is: package.module.function, or path/to/file.py:function.
        batch_size: Responses that are scored at once.
    """

    def __init__(self, function: str, batch_size: int = 256):
        super().__init__(batch_size)
        self.name = function
        self.function, self._file = _find(function)

    @property
    def identity(self) -> str:
        """The function's name with a fingerprint of its file."""
        code = Path(self._file).read_bytes() if self._file else b""
        return f"{self.name} @{hashlib.sha256(code).hexdigest()[:8]}"

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        return self.function(prompts, responses)


def _find(function: str) -> tuple[Callable[..., Any], str | None]:
    """The function, and the file it is in."""
    place, colon, name = function.rpartition(":") if ".py:" in function else (*function.rpartition(".")[:2], function.rpartition(".")[2])
    try:
        if colon == ":":
            if not Path(place).is_file():
                raise UserError(f"scorer.function={function!r}: there is no file {place!r}.")
            module = _module_of(str(Path(place).resolve()))
        else:
            module = importlib.import_module(place)
    except ImportError as error:
        raise UserError(
            f"scorer.function={function!r}: cannot import {place!r} ({error}). Give package.module.function, or "
            "path/to/file.py:function."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"scorer.function={function!r}: {place!r} has no function {name!r}.")
    return found, getattr(module, "__file__", None)


@functools.cache
def _module_of(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SequenceClassificationScorer(Scorer):
    """A reward model: any transformers model for sequence classification.

    Args:
        model: Folder or hub name.
        label: Which output is the reward, as a log-probability, of a model with several; one with a single output
            gives that itself.
        template: How prompt and response are put together, such as "{prompt}{response}"; None takes the model's chat
            template if it has one, else that.
        last_line: Of a plain prompt only its last line is scored: the beginning of what the response goes on with.
        max_length: Longest text in tokens; its beginning is cut. None is what the tokenizer states.
        batch_size: Responses that are scored at once.
        dtype: Type of the weights.
        device: Where it runs; None is a GPU if there is one.
    """

    def __init__(
        self,
        model: str,
        *,
        label: int | None = None,
        template: str | None = None,
        last_line: bool = False,
        max_length: int | None = None,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str | None = None,
    ):
        super().__init__(batch_size)
        if ("/" in model or model.startswith(".")) and model.count("/") != 1 and not Path(model).is_dir():
            raise UserError(f"scorer.model: there is no folder {model!r}. Give a folder saved by `save_pretrained`.")
        if template is not None and "{response}" not in template:
            raise UserError(f"scorer.template={template!r} must contain {{response}}, and as a rule {{prompt}}.")
        self.path = model
        self.label = label
        self.template = template
        self.last_line = last_line
        self.max_length = max_length
        self.dtype = dtype
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[Any, Any] | None = None

    @property
    def identity(self) -> str:
        """The model's path, for a folder with a fingerprint of its weights (of pieces of each file)."""
        digest = hashlib.sha256()
        for file in sorted(Path(self.path).glob("*.safetensors")):
            size = file.stat().st_size
            with file.open("rb") as weights:
                for place in range(0, size, max(1, size // 16)):
                    weights.seek(place)
                    digest.update(weights.read(1 << 16))
        return f"{self.path} @{digest.hexdigest()[:8]}" if Path(self.path).is_dir() else self.path

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        model, tokenizer = self._load()
        texts = [self._text(prompt, response, tokenizer) for prompt, response in zip(prompts, responses, strict=True)]
        inputs = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=self.template is not None or not tokenizer.chat_template,
            return_tensors="pt",
        ).to(self.device)
        with torch.inference_mode():
            logits = model(**inputs).logits.float()
        return (logits[:, 0] if self.label is None else logits.log_softmax(-1)[:, self.label]).tolist()

    def _text(self, prompt: Text, response: str, tokenizer: Any) -> str:
        if self.template is None and tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": response}], tokenize=False)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if self.last_line:
            text = text.rpartition("\n")[2]
        return (self.template or "{prompt}{response}").format(prompt=text, response=response)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.path, truncation_side="left")
                model = AutoModelForSequenceClassification.from_pretrained(self.path, dtype=getattr(torch, self.dtype))
            except (OSError, ValueError) as error:
                raise UserError(f"scorer.model: cannot load {self.path!r}: {str(error).splitlines()[0]}") from error
            if (model.config.num_labels > 1) != (self.label is not None):
                raise UserError(
                    f"scorer.label={self.label}: {self.path!r} has {model.config.num_labels} outputs; "
                    + ("say which is the reward." if self.label is None else "leave label out.")
                )
            self._loaded = model.eval().to(self.device), tokenizer
        return self._loaded

    def release(self) -> None:
        self._loaded = None


def score(
    scorer: Scorer,
    prompts: Sequence[Text],
    responses: Sequence[str],
    advance: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """The reward of each response to its prompt.

    Args:
        advance: Told how many responses have been scored, batch by batch.

    Raises:
        ScorerError: the scorer raised, gave another number of scores than responses, or one that is no finite number.
    """
    scores: list[float] = []
    for start in range(0, len(responses), scorer.batch_size):
        some_prompts = prompts[start : start + scorer.batch_size]
        some = responses[start : start + scorer.batch_size]
        try:
            given = list(scorer(some_prompts, some))
        except UserError:
            raise
        except Exception as error:
            raise ScorerError(
                f"the scorer {scorer.identity} failed on responses {start} to {start + len(some) - 1} "
                f"({type(error).__name__}: {error}). What is sampled is stored: mend it and run again."
            ) from error
        if len(given) != len(some):
            raise ScorerError(f"the scorer {scorer.identity} gave {len(given)} scores for {len(some)} responses.")
        for offset, value in enumerate(given):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise ScorerError(
                    f"the scorer {scorer.identity} gave {value!r}, which is no finite number, for response "
                    f"{start + offset}: {_short(some[offset])} to the prompt {_short(some_prompts[offset])}."
                )
            scores.append(number)
        advance(len(some))
    return scores


def _short(text: Text, width: int = 80) -> str:
    shown = repr(text if isinstance(text, str) else text[-1].get("content", ""))
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"
