"""Talk to a model in the terminal, or to two at once: `lit-align chat MODEL [--against START]`.

A model with a chat template is talked to in turns, and each keeps its own history; one without goes on with what is
typed. `/reset` begins anew, `/quit` or Ctrl-D ends.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.text import Text as Styled

from lit_align.console import say
from lit_align.data.collate import Encoder
from lit_align.data.formats import Message
from lit_align.data.sampling import Sampling, sample_responses
from lit_align.policy import Policy, PolicyConfig


class Speaker:
    """A model and what was said so far.

    Args:
        path: A folder in transformers' format, a run's folder (its model/), an adapter's folder, or a hub name.
    """

    def __init__(self, path: str, sampling: Sampling, seed: int = 0):
        run_model = Path(path) / "model"
        path = str(run_model) if run_model.is_dir() else path
        policy = Policy.load(PolicyConfig(path))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = path
        self.tokenizer = policy.tokenizer
        self.model = policy.to(device).eval().model
        self.sampling = sampling
        self.seed = seed
        self.encoder = Encoder(self.tokenizer, max_prompt_length=1 << 20, max_response_length=1 << 20)
        self.turns: list[Message] = []
        self.asked = 0

    def answer(self, words: str) -> str:
        self.turns.append({"role": "user", "content": words})
        chats = bool(self.tokenizer.chat_template)
        ids = self.encoder.prompt(self.turns if chats else words, "chat")
        assert ids is not None
        key = ("chat", self.seed, self.asked)
        drawn = sample_responses(self.model, self.tokenizer, [ids], [key], 1, self.sampling, self.encoder.end_ids())
        self.asked += 1
        text = drawn[0][0].text
        self.turns.append({"role": "assistant", "content": text})
        return text

    def reset(self) -> None:
        self.turns.clear()


def chat(speakers: list[Speaker], read: Callable[[str], str] = input) -> None:
    """Read lines, and let every speaker answer, until there are no more."""
    say("/reset begins anew, /quit or Ctrl-D ends")
    names = [speaker.name for speaker in speakers]
    while True:
        try:
            words = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say()
            return
        if words == "/quit":
            return
        if words == "/reset":
            for speaker in speakers:
                speaker.reset()
        elif words:
            for name, speaker in zip(names, speakers, strict=True):
                if len(speakers) > 1:
                    say(Styled(name, style="bold"))
                say(Styled(speaker.answer(words)))
