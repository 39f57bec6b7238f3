"""Scorers: one number for each response to a prompt, the higher the better. `score` asks them, and checks."""

import hashlib
import importlib
import importlib.util
import math
import numbers
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_align.data.formats import Text
from lit_align.errors import UserError


class ScorerError(UserError):
    """A scorer failed. Names the scorer, the first prompt and response concerned, and the mend."""


class Labeller(ABC):
    """What both kinds of scorers share: they say who they are, and load and free what they need."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Name and version, recorded with each score: it changes whenever the scores may."""

    def start(self) -> None:  # noqa: B027  # not every scorer has something to load
        """Load what is needed to score; calling it again does nothing."""

    def release(self) -> None:  # noqa: B027
        """Free it, as between rounds, and tell what it has cost; the next score loads it again."""


class Scorer(Labeller):
    """Gives each response its reward. Subclass it, set `batch_size`, and say who you are."""

    batch_size: int  # most responses per call

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        """The reward of each response to the prompt of the same place, [N]; `Scores` if it has parts."""


class PairwiseScorer(Labeller):
    """Compares the responses to a prompt with each other: a preference model, which need not be transitive."""

    @abstractmethod
    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> Sequence[Any]:
        """P(y_i ≻ y_j) among each prompt's responses, [N, K, K]; the diagonal is not read."""


class Scores(list[float]):
    """Rewards, [N], and what they are made of: `parts[name]`, [N], is kept and logged with them."""

    def __init__(self, rewards: Iterable[float], parts: Mapping[str, Sequence[float]] | None = None):
        super().__init__(rewards)
        self.parts = {name: list(values) for name, values in (parts or {}).items()}


def score(
    scorer: Scorer,
    prompts: Sequence[Text],
    responses: Sequence[str],
    advance: Callable[[int], object] | None = None,
) -> Scores:
    """The reward of each response, [N], asked for in batches of like length, the longest first.

    Args:
        advance: Called with the number of responses of each finished batch.

    Raises:
        ScorerError: the scorer raises, or gives the wrong number of scores or parts, or one that is no finite number.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses: give one prompt per response.")
    order = sorted(range(len(responses)), key=lambda i: -len(_joined(prompts[i])) - len(responses[i]))
    scores = Scores([math.nan] * len(responses))
    for start in range(0, len(order), scorer.batch_size):
        places = order[start : start + scorer.batch_size]
        batch = _score_batch(scorer, [prompts[i] for i in places], [responses[i] for i in places])
        for i, value in zip(places, batch, strict=True):
            scores[i] = value
        for name, values in batch.parts.items():
            whole = scores.parts.setdefault(name, [math.nan] * len(responses))
            for i, value in zip(places, values, strict=True):
                whole[i] = value
        if advance is not None:
            advance(len(places))
    for name, whole in scores.parts.items():
        if (place := next((i for i, value in enumerate(whole) if math.isnan(value)), None)) is not None:
            raise ScorerError(
                f"scorer {scorer.identity} gave parts[{name!r}] for other batches, but not for the one with response "
                f"{_shown(responses[place])}. Return the same parts for each batch."
            )
    return scores


def compare(
    scorer: PairwiseScorer, prompts: Sequence[Text], responses: Sequence[Sequence[str]]
) -> list[list[list[float]]]:
    """P(y_i ≻ y_j) among each prompt's K responses, [N, K, K], with ½ on the diagonal.

    Raises:
        ScorerError: the scorer raises, or what it gives are no probabilities with P_ij + P_ji = 1.
    """

    def failed(what: str, mend: str, place: int = 0) -> ScorerError:
        prompt, first = _shown(_joined(prompts[place])), _shown(responses[place][0])
        return ScorerError(f"scorer {scorer.identity} {what} (prompt {prompt}, first response {first}). {mend}")

    try:
        matrices = [torch.as_tensor(P, dtype=torch.float64) for P in scorer.preferences(prompts, responses)]
    except UserError:
        raise
    except Exception as error:
        raise failed(f"raised {type(error).__name__}: {error}", "Mend the scorer and run again.") from error
    if len(matrices) != len(prompts):
        raise failed(f"gave {len(matrices)} matrices for {len(prompts)} prompts", "Return one K × K matrix for each.")
    compared = []
    for place, (matrix, group) in enumerate(zip(matrices, responses, strict=True)):
        K = len(group)
        if matrix.shape != (K, K):
            raise failed(f"gave a matrix of shape {[*matrix.shape]} for {K} responses", f"Return [{K}, {K}].", place)
        P = matrix.clone().fill_diagonal_(0.5)
        if not (((P >= 0) & (P <= 1)).all() and torch.allclose(P + P.T, torch.ones_like(P), atol=1e-4)):
            mend = "Return P[i][j] in [0, 1], the probability that response i beats j, and 1 minus it in P[j][i]."
            raise failed(f"gave {matrix.tolist()}, which are no preferences", mend, place)
        compared.append(P.tolist())
    return compared


def _score_batch(scorer: Scorer, prompts: list[Text], responses: list[str]) -> Scores:
    def failed(what: str, mend: str, place: int = 0) -> ScorerError:
        prompt, response = _shown(_joined(prompts[place])), _shown(responses[place])
        return ScorerError(f"scorer {scorer.identity} {what} (prompt {prompt}, response {response}). {mend}")

    try:
        values: Any = scorer(prompts, responses)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise failed("ran out of memory", f"Lower its batch_size={scorer.batch_size}.") from error
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}, on a batch of {len(responses)} that begins here"
        raise failed(what, "Mend the scorer and run again.") from error
    parts: dict[str, list[float]] = getattr(values, "parts", {})
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise failed(f"returned a {type(values).__name__}", "Return a list, one number per response.")
    for name, column in {"": values, **parts}.items():
        of = f" as parts[{name!r}]" if name else ""
        if len(column) != len(responses):
            what = "values" if name else "scores"
            raise failed(f"gave {len(column)} {what} for {len(responses)} responses{of}", "Return one per response.")
        for place, value in enumerate(column):
            if not isinstance(value, numbers.Real):
                raise failed(f"gave {value!r}{of}, which is no number", "Return one number per response.", place)
            if not math.isfinite(value):
                raise failed(f"gave {value}{of}", "Return a finite number, also where there is no answer.", place)
    return Scores(map(float, values), {name: [*map(float, column)] for name, column in parts.items()})


class FunctionScorer(Scorer):
    """A Python function, called as `function(prompts, responses)`, that returns one number per response.

    A prompt is a string, or a list of messages with `role` and `content`.

    Args:
        function: Where it is: package.module.function, or path/to/file.py:function.
        batch_size: Most responses per call.
    """

    def __init__(self, function: str, batch_size: int = 256):
        self.function = _import_function(function)
        self.batch_size = _at_least_one("batch_size", batch_size)
        file = getattr(sys.modules.get(self.function.__module__ or ""), "__file__", None)
        self._identity = f"{function}@{_fingerprint([Path(file)])}" if file else function

    @property
    def identity(self) -> str:
        """The import path and a fingerprint of the file behind it."""
        return self._identity

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        return self.function(prompts, responses)


class PairwiseFunctionScorer(PairwiseScorer):
    """A Python function, called as `function(prompt, responses)`, that gives [K, K]: how probably i beats j.

    Args:
        function: Where it is: package.module.function, or path/to/file.py:function.
    """

    def __init__(self, function: str):
        self._function = FunctionScorer(function)

    @property
    def identity(self) -> str:
        """The import path and a fingerprint of the file behind it."""
        return self._function.identity

    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> list[Any]:
        function: Any = self._function.function
        return [function(prompt, group) for prompt, group in zip(prompts, responses, strict=True)]


class EnsembleScorer(Scorer):
    """The weighted mean of several scorers, Σ w_m r_m / Σ w_m, and how far they disagree.

    Recorded with each reward, and logged by round: every member's own, and `disagreement`, their weighted standard
    deviation around the reward. Weights also bring scales together: members that differ in scale need them.

    Args:
        scorers: The members, by name.
        weights: Weight of each member by name; 1 for those without.
        batch_size: Most responses per call.
    """

    def __init__(self, scorers: dict[str, Scorer], weights: dict[str, float] | None = None, batch_size: int = 256):
        self.scorers = scorers
        self.weights = dict.fromkeys(scorers, 1.0) | (weights or {})
        self.batch_size = _at_least_one("batch_size", batch_size)
        if len(scorers) < 2:
            raise UserError(f"scorer.scorers: an ensemble needs 2 members or more, and has {len(scorers)}.")
        for name, weight in self.weights.items():
            if name not in scorers:
                raise UserError(f"scorer.weights.{name}={weight} has no member; members are {', '.join(scorers)}.")
            if not weight > 0:
                raise UserError(f"scorer.weights.{name}={weight} must be above 0; leave a member out instead.")
        if "disagreement" in scorers:
            raise UserError("scorer.scorers.disagreement: this name is that of their spread; take another.")

    @property
    def identity(self) -> str:
        """Those of the members, with their weights."""
        members = ", ".join(f"{self.weights[name]:g} {scorer.identity}" for name, scorer in self.scorers.items())
        return f"ensemble of {members}"

    def start(self) -> None:
        for scorer in self.scorers.values():
            scorer.start()

    def release(self) -> None:
        for scorer in self.scorers.values():
            scorer.release()

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
        parts = {name: score(scorer, prompts, responses) for name, scorer in self.scorers.items()}
        weights_M1 = torch.tensor([self.weights[name] for name in parts], dtype=torch.float64)[:, None]
        weights_M1 /= weights_M1.sum()
        rewards_MN = torch.tensor([*parts.values()], dtype=torch.float64)
        mean_N = (weights_M1 * rewards_MN).sum(0)
        spread_N = (weights_M1 * (rewards_MN - mean_N).square()).sum(0).sqrt()
        return Scores(mean_N.tolist(), parts | {"disagreement": spread_N.tolist()})


class SequenceClassificationScorer(Scorer):
    """A sequence-classification model of transformers: a reward model, or any classifier.

    With one output the reward is that logit. With several it is the log-odds of `label`, log p/(1−p): its
    differences do not shrink near p = 1 as those of p do. The weights are loaded at the first score.

    Args:
        model: Folder saved by `save_pretrained`, or a hub name.
        batch_size: Most texts per forward pass.
        dtype: Type of the weights; auto is the one they were saved in.
        device: auto is the GPU if there is one; or cpu, cuda, cuda:1, mps.
        template: What the model reads, such as "Q: {prompt} A: {response}"; a chat's messages are joined by
            blank lines. None is the tokenizer's chat template, where a plain prompt is the user's message; or
            without one, the response right behind the prompt.
        last_line: Read only the last line of a plain prompt: what the response goes on with, not the examples
            above it.
        label: Which output is the reward, for models with several, counted from 0.
        max_length: Longest text in tokens; longer ones lose their beginning and are counted (`truncated`).
            None is what the model allows.
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
        self.model = model
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.dtype = dtype
        self.device = device
        self.template = template
        self.last_line = last_line
        self.label = label
        self.config, self.tokenizer = _load_config(model)
        self.max_length = self._limit(max_length)
        self.truncated = 0  # texts cut so far
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
        return _fingerprint(sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}))

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
        inputs = self.tokenizer.pad({"input_ids": self._token_ids(texts)}, return_tensors="pt").to(model.device)
        logits_NL = model(**inputs).logits.float()
        return self._rewards(logits_NL).tolist()

    def _rewards(self, logits_NL: Tensor) -> Tensor:
        """Logit or log-odds, [N]."""
        if self.label is None:
            return logits_NL[:, 0]
        if self.config.problem_type == "multi_label_classification":  # each output is a log-odds by itself
            return logits_NL[:, self.label]
        others = [k for k in range(logits_NL.shape[1]) if k != self.label]
        return logits_NL[:, self.label] - logits_NL[:, others].logsumexp(-1)

    def _text(self, prompt: Text, response: str) -> str:
        """What the model reads."""
        if self.last_line and isinstance(prompt, str):
            prompt = prompt.rpartition("\n")[2]
        if self.template is not None:
            return self.template.format(prompt=_joined(prompt), response=response)
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*chat, {"role": "assistant", "content": response}]
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        return _joined(prompt) + ("" if isinstance(prompt, str) else "\n\n") + response

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without the beginning of those that are too long."""
        # a chat template has put the special tokens in already
        special = self.template is not None or not self.tokenizer.chat_template
        encode = partial(self.tokenizer, add_special_tokens=special, verbose=False)
        ids = encode(texts).input_ids
        long = [place for place, each in enumerate(ids) if len(each) > self.max_length]
        if long and not self.truncated:
            rank_zero_warn(
                f"scorer {self.model}: a text of {len(ids[long[0]])} tokens is longer than "
                f"max_length={self.max_length}, and is scored without its beginning. Further ones are only "
                "counted. Raise max_length if the model allows, or shorten the prompts."
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
            raise UserError(f"scorer.max_length={max_length}: {self.model!r} takes {positions} at most.")
        return _at_least_one("max_length", max_length)

    def _load(self) -> PreTrainedModel:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        try:
            with torch.random.fork_rng(devices=[]):  # loading must not move the numbers that training draws
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    self.model, dtype=dtype, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            raise UserError(f"scorer.model: cannot load {self.model!r}: {_first_line(error)}") from error
        if report["missing_keys"]:
            raise UserError(
                f"scorer.model: {self.model!r} has no weights for {', '.join(sorted(report['missing_keys']))}, so "
                "that its scores would be random. Give a model trained for sequence classification."
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders find a text's last token by it
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return model.eval().requires_grad_(False).to(device)


def _import_function(path: str) -> Callable[..., Sequence[float]]:
    """Import package.module.function, or path/to/file.py:function."""
    forms = "Give package.module.function, or path/to/file.py:function."
    place, _, name = path.rpartition(":" if ":" in path else ".")
    if not place or not name:
        raise UserError(f"scorer.function={path!r} is no path to a function. {forms}")
    if ":" in path and not Path(place).is_file():
        raise UserError(f"scorer.function={path!r}: there is no file {place!r}. {forms}")
    try:
        module = _import_file(Path(place)) if ":" in path else importlib.import_module(place)
    except Exception as error:  # whatever the user's file does
        raise UserError(
            f"scorer.function={path!r}: cannot import {place!r} ({type(error).__name__}: {error}). {forms}"
        ) from error
    function: Any = getattr(module, name, None)
    if function is None:
        raise UserError(f"scorer.function={path!r}: there is no {name!r} in {place!r}. {forms}")
    if not callable(function):
        raise UserError(f"scorer.function={path!r} is a {type(function).__name__}, not a function. {forms}")
    return function  # type: ignore[return-value]  # what it returns, `score` checks


def _import_file(path: Path) -> ModuleType:
    """Run a file once, as a module whose name hides no other."""
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_config(model: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    path = Path(model)
    is_path = model.startswith(("/", ".", "~")) or len(path.parts) > 2
    is_path |= len(path.parts) == 2 and path.parent.is_dir()  # it looks like a hub name, but its folder is here
    if is_path and not path.is_dir():
        raise UserError(f"scorer.model: there is no folder {model!r}. {_MODELS}")
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"scorer.model: {model!r} is no folder with a model and its tokenizer, and the hub gives none of "
            f"that name ({_first_line(error)}). {_MODELS}"
        ) from error
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(
            f"scorer.model: {model!r} is {', '.join(config.architectures or ['of no stated kind'])}, no "
            "sequence classifier. Give a model that was trained to give scores."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"  # the response is what counts
    return config, tokenizer


# what weights, configuration and tokenizer are read from; logs and metrics may lie next to them
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
            f"scorer.template={template!r} cannot be filled in ({type(error).__name__}: {error}). Put in "
            "{prompt} and {response}, and double any other brace."
        ) from error
    if "\0" not in filled:
        raise UserError(f"scorer.template={template!r} leaves the response out. Put in {{response}}.")


def _check_label(model: str, config: PretrainedConfig, label: int | None) -> None:
    count = config.num_labels or 1
    if count == 1 and label is not None:
        raise UserError(f"scorer.label={label} has no effect: {model!r} has one output. Leave it out.")
    if count > 1 and (label is None or not 0 <= label < count):
        names = ", ".join(f"{number} {name}" for number, name in (config.id2label or {}).items())
        raise UserError(f"scorer.label={label}: {model!r} has {count} outputs. Set it to one of: {names}.")


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"scorer.{name}={value} must be at least 1.")
    return value


def _fingerprint(files: Sequence[Path]) -> str:
    """16 hexadecimal digits that identify files by name and content."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _joined(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:60]!r} … {text[-40:]!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
