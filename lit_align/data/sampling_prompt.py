"""The end of a prompt in sampling: the same as in training.

A chat template has a generation prompt, which ends a prompt in sampling. Most templates render the same text before an
answer. Some do not: the generation prompt of a thinking model opens a block of thoughts, which an answer without
thoughts does not have. Training then reads the prompt as it is rendered before the answer, and sampling reads it, too:
the chat template is changed so that this is its generation prompt, and is saved with the model.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from lit_align.data.rendering import PromptEnd, Rendering, around
from lit_align.errors import UserError

OPTION = "data.sampling_prompt"
SamplingPrompt = Literal["auto", "generation", "answer"]


class SeenEnd(NamedTuple):
    """The first row of a source whose prompt ends in one way in training."""

    end: str  # a PromptEnd
    source: str
    sampling: str  # the end of the prompt as in sampling; empty if it is the same
    training: str

    @classmethod
    def of(cls, source: str, rendering: Rendering) -> "SeenEnd":
        assert rendering.end is not None
        sampled, trained = rendering.generation_prompt, rendering.prompt
        place = len(os.path.commonprefix([sampled, trained]))  # noqa: RUF071
        return cls(rendering.end, source, around(sampled, place, 30), around(trained, place, 30))

    @property
    def differs(self) -> bool:
        """Whether it is not the chat template's generation prompt."""
        return self.end != PromptEnd.GENERATION


def settle(seen: Sequence[SeenEnd], *, samples: bool) -> PromptEnd:
    """How prompts end in sampling: as in training.

    Args:
        seen: How prompts end in training, by rows of all sources.
        samples: Whether there are rounds, whose prompts end in training as in sampling.

    Raises:
        UserError: the prompts that are trained on end in different ways.
    """
    different = next((each for each in seen if each.differs), None)
    if different is None:
        return PromptEnd.GENERATION
    other = next((each for each in seen if each.end != different.end), None)
    if different.end == PromptEnd.ANSWER and other is None and not samples:
        return PromptEnd.ANSWER
    unlike = f", unlike before that of {other.source}" if other else ", unlike in the rounds" if samples else ""
    raise UserError(
        f"{different.source}: the chat template ends the prompt before this row's response in another way than in "
        f"sampling{unlike}:\n  sampling: {different.sampling}\n  training: {different.training}\n"
        f"Choose one for sampling: {OPTION}=generation (the template's generation prompt) or answer (the prompt as it "
        "is rendered before an answer)."
    )


def without_effect(given: SamplingPrompt, reason: str) -> UserError:
    """The error for an option that has no effect."""
    return UserError(f"{OPTION}={given} has no effect because {reason}. Leave it out.")


def describe(end: PromptEnd | None, seen: Iterable[SeenEnd]) -> Iterator[tuple[str, str]]:
    """Lines of the run's header, if prompts do not all end with the chat template's generation prompt.

    Args:
        end: How prompts end in sampling.
        seen: How they end in training.
    """
    different = next((each for each in seen if each.differs), None)
    if end is PromptEnd.ANSWER:
        yield "sampling prompt", "as the chat template renders a prompt before an answer; saved with the model"
    elif different is not None:
        yield "sampling prompt", "the chat template's generation prompt, unlike in training"
    if different is not None:
        yield "  generation prompt", different.sampling
        yield "  in training", different.training
