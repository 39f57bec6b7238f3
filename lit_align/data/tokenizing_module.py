"""The part of a data module that makes tokens of rows: its options, and the tokenizers of training and of sampling."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_align.arguments import CheckedArguments
from lit_align.data import sampling_prompt
from lit_align.data.examples import Examples
from lit_align.data.formats.rows import Row
from lit_align.data.rendering import PromptEnd
from lit_align.data.sampling_prompt import SamplingPrompt, SeenEnd
from lit_align.data.tokenization import LongPrompts, PreferenceTokenizer
from lit_align.errors import UserError, check_number
from lit_align.needs import DataNeeds, needs_of
from lit_align.objectives import PreferenceObjective


class TokenizingDataModule(L.LightningDataModule, metaclass=CheckedArguments):
    """Base class of data modules that make tokens of rows.

    Args:
        max_prompt_length: Longest prompt, in tokens.
        max_response_length: Longest response, in tokens, its end token included; longer ones are cut and counted.
        long_prompts: Treatment of a longer prompt, and of a row longer than the model's context: an error, drop the
            row, or cut the prompt's beginning (truncate_left).
        chat_template: Chat template in place of the tokenizer's: a file, or its text. It is saved with the model.
        template_args: Arguments of the chat template, such as enable_thinking; a row's own take precedence.
            strftime_now sets the date that a template takes from the clock.
        sampling_prompt: End of a prompt in sampling, where the chat template's generation prompt is not what it renders
            before an answer. auto: as in training, and an error if rows differ. generation: the generation prompt.
            answer: as before an answer; the chat template that is saved with the model then ends prompts so.
        tokenizer: Hub name or folder of a tokenizer in place of the model's. It is saved with the model.
        wrap_prompts_as_chat: Turn plain prompts into a user's turn. auto: if the objective needs it (RewardModel).
    """

    def __init__(
        self,
        *,
        max_prompt_length: int = 512,
        max_response_length: int = 512,
        long_prompts: LongPrompts = "error",
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
        sampling_prompt: SamplingPrompt = "auto",
        tokenizer: str | None = None,
        wrap_prompts_as_chat: Literal["auto"] | bool = "auto",
    ):
        super().__init__()
        check_number("data.max_prompt_length", max_prompt_length, least=1)
        check_number("data.max_response_length", max_response_length, least=1)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.long_prompts: LongPrompts = long_prompts
        self.chat_template = chat_template
        self.template_args = template_args or {}
        self.sampling_prompt: SamplingPrompt = sampling_prompt
        self.tokenizer_path = tokenizer
        self.wrap_prompts_as_chat: Literal["auto"] | bool = wrap_prompts_as_chat
        self._preference_tokenizer: PreferenceTokenizer | None = None
        self._read_for: tuple[object, ...] = ()  # the needs that rows have been read for
        self._prompt_tokenizer: PreferenceTokenizer | None = None
        self._prompt_end = None if sampling_prompt == "auto" else PromptEnd(sampling_prompt)
        self._ends_seen: list[SeenEnd] = []

    def setup(self, stage: str) -> None:
        """Give the trained module the tokenizer and the chat template before it builds its model.

        Raises:
            UserError: rows have been read for an earlier run, of another tokenizer or kind of objective.
        """
        _set_tokenizer(self.module, self.tokenizer_path, self.chat_template)
        if self._preference_tokenizer is not None and not self._reads_as_before(self._preference_tokenizer.tokenizer):
            raise UserError(
                f"this {type(self).__name__} holds rows that were read for an earlier run, with another tokenizer or "
                "for another kind of objective. Make a new one for this run."
            )
        self._apply_prompt_end()

    def _reads_as_before(self, tokenizer: Any) -> bool:
        """Whether rows that were read with a tokenizer are what the trained module needs."""
        same_tokens = tokenizer is self.tokenizer or tokenizer.get_vocab() == self.tokenizer.get_vocab()
        return same_tokens and _rows_for(self.needs) == self._read_for

    @property
    def module(self) -> Any:
        """The trained module."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def needs(self) -> DataNeeds:
        """The needs of the trained module from its data."""
        return needs_of(self.module)

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.module.tokenizer

    @property
    def preference_tokenizer(self) -> PreferenceTokenizer:
        """Turns rows into tokens according to this run's options."""
        if self._preference_tokenizer is None:
            self._preference_tokenizer = self._make_tokenizer()
            self._read_for = _rows_for(self.needs)
        return self._preference_tokenizer

    @property
    def prompt_tokenizer(self) -> PreferenceTokenizer:
        """Turns prompts into tokens to sample from."""
        if self._prompt_end is not PromptEnd.ANSWER:
            return self.preference_tokenizer
        if self._prompt_tokenizer is None:
            self._prompt_tokenizer = self._make_tokenizer()
        return self._prompt_tokenizer

    def settle_sampling_prompt(
        self, trained: Sequence[Examples], sampled: Callable[[], Iterable[Row]] | None = None
    ) -> None:
        """Decide how prompts end in sampling, after the training data are tokenized.

        Args:
            trained: The examples of all sources.
            sampled: Reads the prompts whose responses are trained on; these prompts end as in sampling.

        Raises:
            UserError: data.sampling_prompt has no effect; or it is auto, and the prompts end in different ways.
        """
        if not isinstance(self.module, PreferenceObjective) or not self.needs.gives_logps:
            if self.sampling_prompt != "auto":
                reason = f"{type(self.module).__name__} gives no responses"
                raise sampling_prompt.without_effect(self.sampling_prompt, reason)
            return
        self._ends_seen = [end for part in trained for end in part.prompt_ends]
        if self.sampling_prompt == "auto":
            self._prompt_end = sampling_prompt.settle(self._ends_seen, samples=sampled is not None)
            self._apply_prompt_end()
            return
        tokenizer = self.preference_tokenizer
        if not self._ends_seen:  # in training
            rows = () if sampled is None else sampled()
            if all(isinstance(tokenizer.as_chat(row).prompt, str) for row in rows):
                raise sampling_prompt.without_effect(self.sampling_prompt, "no prompt is a chat")
        if not any(end.differs for end in self._ends_seen) and tokenizer.renderer.ends_alike:
            reason = "the chat template ends prompts alike in sampling and before an answer"
            raise sampling_prompt.without_effect(self.sampling_prompt, reason)

    def _apply_prompt_end(self) -> None:
        """Give the trained module the chat template whose generation prompt is used in sampling."""
        if self._prompt_end is PromptEnd.ANSWER and self.preference_tokenizer.tokenizer.chat_template:
            template = self.preference_tokenizer.renderer.template  # of the module's tokenizer before it is replaced
            _set_tokenizer(self.module, None, template.before_answer)

    def state_dict(self) -> dict[str, Any]:
        return {"sampling_prompt": str(self._prompt_end)} if self._prompt_end is PromptEnd.ANSWER else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sample as the checkpoint's run does, where no training data decide it."""
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING and self._prompt_end is None and "sampling_prompt" in state_dict:
            self._prompt_end = PromptEnd(state_dict["sampling_prompt"])
            self._apply_prompt_end()

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header."""
        yield from sampling_prompt.describe(self._prompt_end, self._ends_seen)

    def _make_tokenizer(self) -> PreferenceTokenizer:
        module = self.module
        return PreferenceTokenizer(
            self.tokenizer,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
            long_prompts=self.long_prompts,
            template_args=self.template_args,
            wraps_prompts=_wraps_prompts(self.wrap_prompts_as_chat, self.tokenizer, self.needs),
            positions=module.positions if isinstance(module, PreferenceObjective) else None,
            model_ends=module.model_ends if isinstance(module, PreferenceObjective) else tuple,
        )


def _rows_for(needs: DataNeeds) -> tuple[object, ...]:
    """The needs that decide what examples are made of rows."""
    return needs.data_kind, needs.wraps_prompt_as_chat, needs.needs_mismatched


def _wraps_prompts(given: Literal["auto"] | bool, tokenizer: Any, needs: DataNeeds) -> bool:
    """Whether plain prompts become a user's turn of a chat."""
    if given == "auto":
        return needs.wraps_prompt_as_chat and bool(tokenizer.chat_template)
    if given and not tokenizer.chat_template:
        raise UserError(
            "data.wrap_prompts_as_chat=true needs a chat template, and the tokenizer has none. Set one "
            "(data.chat_template)."
        )
    return given


def _set_tokenizer(module: object, path: str | None, chat_template: str | None) -> None:
    """Give a module another tokenizer or chat template, if one is given."""
    if path is None and chat_template is None:
        return
    if not isinstance(module, PreferenceObjective):
        raise UserError(
            f"data.{'chat_template' if path is None else 'tokenizer'} has no effect on {type(module).__name__}, which "
            "loads its own tokenizer. Set it there."
        )
    module.use_tokenizer(path, chat_template)
