"""Talk to a model in the terminal, or to two at once: `lit-align chat MODEL [--against START]`.

A model with a chat template answers in turns, and each model keeps its own history; a model without one continues the
text that is typed. A run's model is prompted as it was trained: with the run's template_args. When the history no
longer fits into the model's positions, the oldest turns are left out. `/reset` clears the history, Ctrl-C stops an
answer, and `/quit` or Ctrl-D ends the chat.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text as Styled

from lit_align.console import print_line
from lit_align.data.formats.rows import Message, Row
from lit_align.data.generation import sample_responses
from lit_align.data.sampling import SampleRequest, Sampling
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.dtypes import dtype_name, fast_dtype
from lit_align.errors import UserError, amount
from lit_align.export import configuration_of
from lit_align.model_files import locate_model, stored_type
from lit_align.policy import Policy, PolicyConfig

OPTIONS = {
    "data.chat_template": "--chat-template",
    "data.template_args": "--template-args",
    "data.tokenizer": "--tokenizer",
    "model.policy.path: ": "",
}
"""Options of a run that messages name, and what they are called here."""


@dataclass(frozen=True)
class Prompting:
    """How typed words become a prompt.

    Args:
        template_args: Arguments of the chat template; those of a run's data.template_args are added.
        chat_template: A file, or the text, of another chat template than the model's.
        tokenizer: Hub name or folder of another tokenizer than the model's.
        is_plain: Continue the words as plain text, without the chat template.
        is_second: It is the prompt of the model after --against.
    """

    template_args: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer: str | None = None
    is_plain: bool = False
    is_second: bool = False

    def message(self, error: UserError) -> str:
        """The message of an error, with the names that options have here."""
        message = str(error)
        for option, flag in OPTIONS.items():
            message = message.replace(option, flag)
        return message.replace("--template-args", "--against-template-args") if self.is_second else message


class Speaker:
    """A model and its history.

    Args:
        path: A folder in transformers' format, a run's folder (its model/), an adapter's folder, or a hub name.
    """

    def __init__(self, path: str, sampling: Sampling, seed: int = 0, prompting: Prompting | None = None):
        self.prompting = prompting = prompting or Prompting()
        run_model = Path(path) / "model"
        path = str(run_model) if run_model.is_dir() else path
        template_args = _template_args_of_run(path) | prompting.template_args
        try:
            config = PolicyConfig(path, tokenizer=prompting.tokenizer, chat_template=prompting.chat_template)
            dtype = fast_dtype(stored_type(locate_model(config)) or torch.float32)
            policy = Policy.load(replace(config, dtype=dtype_name(dtype)))
        except UserError as error:
            raise UserError(f"chat: {prompting.message(error)}") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = path
        self.tokenizer = policy.tokenizer
        self.model = policy.to(device).eval().model
        self.positions = policy.positions
        self.sampling = sampling
        self.seed = seed
        self.is_chat = bool(self.tokenizer.chat_template) and not prompting.is_plain
        self.preference_tokenizer = PreferenceTokenizer(
            self.tokenizer, template_args=template_args, model_ends=lambda: policy.ends
        )
        self.turns: list[Message] = []
        self.answered = 0

    def answer(self, words: str) -> str:
        """Sample the model's answer and add both turns to the history; an interrupted answer leaves no trace.

        Raises:
            UserError: `words` alone are too long for the model.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": words}]
        while len(ids := self._encode(turns)) + self.sampling.max_new_tokens > (self.positions or math.inf):
            if len(turns) == 1:
                raise UserError(
                    f"{amount(len(ids), 'tokens')} and up to {self.sampling.max_new_tokens} new ones exceed the "
                    f"{self.positions} positions of this model. Shorten the message, or lower --max-new-tokens."
                )
            turns = turns[2:]  # a question and its answer
        key = ("chat", self.seed, self.answered)
        end_ids = self.preference_tokenizer.end_ids()
        continued = () if self.is_chat else (key,)
        request = SampleRequest([ids], [key], 1, self.sampling, end_ids, continued)
        responses = sample_responses(self.model, self.tokenizer, request)
        self.answered += 1
        text = responses[0][0].text
        self.turns = [*turns, {"role": "assistant", "content": text}]
        return text

    def _encode(self, turns: list[Message]) -> list[int]:
        prompt = turns if self.is_chat else turns[-1]["content"]
        ids = self.preference_tokenizer.prompt_ids(Row(prompt, source="chat"))
        assert ids is not None
        return ids

    def reset(self) -> None:
        self.turns.clear()


def _template_args_of_run(path: str) -> dict[str, Any]:
    """The template_args of the run that the model belongs to; empty if it does not belong to a run."""
    run = Path(path).resolve().parent
    if Path(path).name != "model" or not (run / "config.yaml").is_file():
        return {}
    data = configuration_of(run).get("data", {})
    return data.get("init_args", {}).get("template_args") or {}


def chat(speakers: list[Speaker], read: Callable[[str], str] = input) -> None:
    """Read lines and print every speaker's answer, until the input ends."""
    print_line("/reset clears the history, Ctrl-C stops an answer, /quit or Ctrl-D ends the chat")
    while True:
        try:
            words = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print_line()
            return
        if words == "/quit":
            return
        if words == "/reset":
            for speaker in speakers:
                speaker.reset()
        elif words:
            _answer(speakers, words)


def _answer(speakers: list[Speaker], words: str) -> None:
    """Print every speaker's answer; Ctrl-C stops the present one and leaves the others out."""
    for speaker in speakers:
        if len(speakers) > 1:
            print_line(Styled(speaker.name, style="bold"))
        try:
            print_line(Styled(speaker.answer(words)))
        except UserError as error:
            print_line(Styled(speaker.prompting.message(error)))
        except KeyboardInterrupt:
            print_line("\ninterrupted")
            return
