"""The base class of data modules: held-out pairs, streams of texts, loaders that resume."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_line
from lit_align.data.batches import Example
from lit_align.data.cache import TokenCache
from lit_align.data.examples import ExampleMaker, Examples, Selection, Source, digest_of_examples
from lit_align.data.formats.rows import Kind, Turns
from lit_align.data.given_rows import reading_rows
from lit_align.data.loader import ExampleLoader, Mixture
from lit_align.data.pairing import BestWorst, PairingRule, check_pairing
from lit_align.data.rounds.recorder import Recorder
from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import sampling_copy
from lit_align.data.table import ExampleTable
from lit_align.data.texts import TextStreams
from lit_align.data.tokenization import in_place
from lit_align.data.tokenizing_module import TokenizingDataModule
from lit_align.errors import UserError, amount, check_number
from lit_align.policy import Policy
from lit_align.provenance import VALIDATION, Table


class PairsDataModule(TokenizingDataModule):
    r"""Base class of the data modules: validation pairs, streams of texts, loaders that resume.

    Args:
        validation: Preference pairs whose loss and margins are logged as val/...; the same sources as for training. A
            number below 1 holds out that share of the training prompts (OfflinePairs).
        validation_split: Split of a saved or hub data set.
        test: Preference pairs whose loss and margins `python train.py test` reports as test/....
        test_split: Split of a saved or hub data set.
        batch_size: Prompts per batch and process.
        columns: Source of each column: a column's name, a dotted path (answers.0.text), or a template
            ("{instruction}\n{input}"). For training, validation and test.
        ignore_columns: Columns that are left out although they may belong to the prompt.
        turns: In chats to imitate, train on all of the assistant's turns or only on the last.
        sft: Texts to imitate, trained on together with the preferences: one batch per batch of preferences, repeated if
            needed. Their weight is the objective's. Prompts with a response, chats, preferences (the better response),
            or plain texts. A path, or a source with its own columns.
        sft_split: Split of a saved or hub data set.
        pretraining: Pre-training texts, used in the same way.
        pretraining_split: Split of a saved or hub data set.
        text_batch_size: Texts of each kind per batch and process; None is batch_size.
        group_by_length: Train on batches of examples of similar length, for less padding in attention and less waiting
            between processes. Otherwise the order is random.
        wait_minutes: How long a process waits for the others, and how long one may be silent before all end.
        cache_dir: Folder of tokenized data, which later starts and other processes read. None is $LIT_ALIGN_CACHE, or
            lit_align in $HF_HOME, $XDG_CACHE_HOME or ~/.cache.
        seed: Seed of the order of examples; None is seed_everything's.
    """

    argument_conversions = reading_rows("validation", "test", "sft", "pretraining")
    trains_on_files = False
    """Whether the training pairs come from files, so that a share can be held out."""

    def __init__(
        self,
        *,
        validation: float | str | None = None,
        validation_split: str | None = None,
        test: str | None = None,
        test_split: str | None = None,
        batch_size: int = 8,
        columns: dict[str, str] | None = None,
        ignore_columns: list[str] | None = None,
        turns: Turns = "all",
        sft: str | Source | None = None,
        sft_split: str | None = None,
        pretraining: str | Source | None = None,
        pretraining_split: str | None = None,
        text_batch_size: int | None = None,
        group_by_length: bool = False,
        wait_minutes: float = 60,
        cache_dir: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_number("data.batch_size", batch_size, least=1)
        check_number("data.text_batch_size", text_batch_size, least=1)
        if isinstance(validation, float | int):
            _check_share(validation, validation_split, self.trains_on_files, type(self).__name__)
        for name, path, split in (("validation", validation, validation_split), ("test", test, test_split)):
            if path is None and split is not None:
                raise UserError(f"data.{name}_split={split} has no effect without data.{name}. Leave it out.")
        check_number("data.seed", seed, least=0, most=2**32 - 1)  # as seed_everything
        self.validation = validation
        self.validation_split = validation_split
        self.test = test
        self.test_split = test_split
        self.batch_size = batch_size
        self.columns = columns
        self.ignore_columns = ignore_columns
        self.turns: Turns = turns
        self.texts = TextStreams({"sft": (sft, sft_split), "pretraining": (pretraining, pretraining_split)})
        if text_batch_size is not None and not self.texts.sources:
            raise UserError(
                f"data.text_batch_size={text_batch_size} has no effect without data.sft or data.pretraining. Leave it "
                "out."
            )
        self.text_batch_size = text_batch_size
        self.group_by_length = group_by_length
        check_number("data.wait_minutes", wait_minutes, above=0)
        self.wait_minutes = wait_minutes
        self.cache_dir = cache_dir
        self.given_seed = seed
        self._validation_read: ExampleTable | None = None
        self._validation_examples: ExampleTable | None = None  # with log π_ref, if it is recorded

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._validation_examples = None  # log π_ref is of another reference in each run

    @property
    def seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.given_seed is None else self.given_seed

    @property
    def recorder(self) -> Recorder:
        return Recorder(self.module, self.batch_size, self.wait_minutes)

    def sampling_with(self, policy: Policy, longest: int) -> AbstractContextManager[Sampler]:
        """Within this context, a sampler with a policy's weights, to look at its responses; every process must call it.

        Args:
            longest: Most tokens of a prompt and its response.
        """
        return sampling_copy(policy)

    def record_reference(self, examples: ExampleTable) -> ExampleTable:
        """Examples of a file with log π_ref, if model.reference records it; computed once, kept in the run's folder."""
        assert self.trainer is not None
        if not self.needs.reads_recorded_reference:
            return examples
        return self.recorder.with_stored_reference(Path(self.trainer.default_root_dir, "reference"), examples)

    def val_dataloader(self) -> ExampleLoader | list[Any]:
        if self.validation is None:
            if self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
                raise UserError("validate needs pairs to validate on. Name some: --data.validation=PATH.")
            return []
        if self._validation_examples is None:
            self._validation_examples = self._held_out("validation", str(self.validation), self.read_validation())
        return self._loader(self._validation_examples, shuffle=False)

    def read_validation(self) -> ExampleTable:
        """The examples of data.validation, which is set; read once."""
        if self._validation_read is None:
            given = self.validation
            if isinstance(given, str):
                made = self.tokenize(self.source(given, self.validation_split), self.needs.data_kind)
            else:
                made = self.share_of_training()
            self._validation_read = made.examples
        return self._validation_read

    def share_of_training(self) -> Examples:
        """The pairs that `data.validation`, a number, holds out of the training data."""
        raise NotImplementedError

    def _held_out(self, name: str, path: str, examples: ExampleTable) -> ExampleTable:
        """The pairs of data.validation or data.test; prints how many of them fill no batch for every process."""
        loader = self._loader(examples, shuffle=False)
        if not len(loader):
            raise UserError(
                f"data.{name}={path}: its {amount(len(examples), 'examples')} cannot fill a batch for every process. "
                f"Lower data.batch_size={self.batch_size} or the number of processes."
            )
        if loader.dropped:
            print_line(
                f"  left out: {amount(loader.dropped, 'pairs')} of data.{name}, too few for a batch of every process."
            )
        return self.record_reference(examples)

    def test_dataloader(self) -> ExampleLoader | range:
        if self.test is None:
            if not self._has_callback("on_test_end"):
                raise UserError("test: there is nothing to test. Name pairs (--data.test=PATH), or configure win_rate.")
            return range(1)  # a dummy batch: without batches Lightning calls no hook, and `WinRate` needs one
        made = self.tokenize(self.source(self.test, self.test_split), self.needs.data_kind)
        return self._loader(self._held_out("test", self.test, made.examples), shuffle=False)

    def predict_dataloader(self) -> range:
        if not self._has_callback("on_predict_end"):
            raise UserError("predict needs prompts to answer. Name some: --predictions.prompts=PATH.")
        return range(1)  # a dummy batch: without batches Lightning calls no hook, and `Predictions` needs one

    def _has_callback(self, hook: str) -> bool:
        """Whether a callback does something in a hook of Lightning's."""
        callbacks = self.trainer.callbacks if self.trainer is not None else []  # type: ignore[attr-defined]
        return any(getattr(type(each), hook) is not getattr(Callback, hook) for each in callbacks)

    @property
    def records_sampler(self) -> bool:
        """Whether training examples carry log π_s."""
        return False

    def source(self, path: str, split: str | None = None) -> Source:
        """A file of preferences, read with this module's options."""
        return Source(path, split=split, columns=self.columns, ignore_columns=self.ignore_columns, turns=self.turns)

    def tokenize(
        self, source: Source, kind: Kind, pairing: PairingRule | None = None, selection: Selection | None = None
    ) -> Examples:
        """Tokenized examples of a source, from the cache; made first if they are not there.

        Args:
            pairing: Chooses from the responses of rows that have rewards; None is the best against the worst.
            selection: The rows that are meant; None is all rows of the source.
        """
        mismatched = self.needs.needs_mismatched and kind != "texts"
        maker = ExampleMaker(self.preference_tokenizer, pairing or BestWorst(), mismatched, self.seed)
        selection = selection or Selection(lambda: source.read(kind), [source], {})
        return maker.cached(TokenCache.at(self.cache_dir), source.path, kind, selection)

    def _loader(
        self, examples: ExampleTable, *, shuffle: bool, seed: int | None = None, mixture: Mixture | None = None
    ) -> ExampleLoader:
        trainer = self.trainer
        assert trainer is not None
        return ExampleLoader(
            examples,
            self.batch_size,
            seed=self.seed if seed is None else seed,
            shuffle=shuffle,
            group_by_length=self.group_by_length,
            epoch=lambda: trainer.current_epoch,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            mixture=mixture,
            pins=trainer.strategy.root_device.type == "cuda",
        )

    def _training_loader(
        self, examples: ExampleTable, seed: int | None = None, mixture: Mixture | None = None
    ) -> ExampleLoader:
        loader = self._loader(examples, shuffle=True, seed=seed, mixture=mixture)
        if not len(loader):
            raise UserError(
                f"{amount(len(examples), 'examples')} to train on cannot fill a batch for every process. Lower "
                f"data.batch_size={self.batch_size} or the number of processes."
            )
        return loader

    def check_needs(self, pairing: PairingRule, *, sampled: bool = False) -> None:
        """Check that the examples of a pairing rule have what the objective reads, log π_s included.

        Args:
            sampled: The rule selects from a round's responses.

        Raises:
            UserError: they do not.
        """
        name = type(self.module).__name__
        if self.needs.reads_sampler and not self.records_sampler:
            raise UserError(
                f"{name}, as configured, reads log π_s of each response (model.proximal, SPPO's "
                f"model.estimate_baseline), which {type(self).__name__} as configured does not record. Use "
                "OnPolicyPairs with record_sampler=true, or leave these options out."
            )
        check_pairing(pairing, self.needs, name, sampled=sampled)

    def read_beside(self) -> None:
        """Read the streams of texts that are trained on together with the preferences, and the validation pairs."""
        assert self.trainer is not None
        self.texts.read(self.module, lambda source: self.tokenize(source, "texts"))
        if self.validation is not None and self.trainer.limit_val_batches:
            self.read_validation()

    def with_texts(self, loader: ExampleLoader) -> ExampleLoader | CombinedLoader:
        """The loader of the preferences, combined with a loader of equal length for each stream of texts."""
        assert self.trainer is not None
        return self.texts.beside(loader, self.trainer, self.text_batch_size or self.batch_size)

    def identity(self) -> Table:
        """Everything that determines the batches; a resumed run must have the same."""
        assert self.trainer is not None
        validation = {} if self._validation_read is None else {VALIDATION: digest_of_examples(self._validation_read)}
        return (
            self.texts.identity()
            | validation
            | {
                "data": type(self).__name__,
                "data.seed": self.seed,
                "data.batch_size": self.batch_size * self.trainer.world_size,  # of all processes together
                "data.group_by_length": self.group_by_length,
                "data.max_prompt_length": self.max_prompt_length,
                "data.max_response_length": self.max_response_length,
                "data.long_prompts": self.long_prompts,
            }
        )

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header."""
        yield from self.texts.describe()
        yield from super().describe()


def data_module_of(trainer: Trainer) -> PairsDataModule | None:
    """The trainer's data module, if it is one of lit_align's."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, PairsDataModule) else None


def describe_example(tokenizer: Any, example: Example) -> Iterator[tuple[str, str]]:
    """Header lines with one decoded example, special tokens included, exactly as the model reads it."""
    K = len(example.response_ids) - example.mismatched
    several = ["chosen", "rejected"] if K == 2 else [f"response {k}" for k in range(K)]
    names = [*(several if K > 1 else ["response"]), "mismatched"]
    yield "prompt", f"{_shown(tokenizer.decode(example.prompt_ids))}│"
    for name, ids in zip(names, example.response_ids, strict=False):
        yield name, f"│{_shown(in_place(tokenizer, example.prompt_ids, ids))}│"


def _shown(text: str, width: int = 300) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


def _check_share(share: float, split: str | None, trains_on_files: bool, name: str) -> None:
    """Check that a share of the training data can be held out."""
    if not trains_on_files:
        raise UserError(
            f"data.validation={share} has no effect: a share is held out of data.train, which {name} does not have. "
            "Name a file of pairs."
        )
    if not 0 < share < 1:
        raise UserError(f"data.validation={share} must be above 0 and below 1, or a file. Change it.")
    if split is not None:
        raise UserError(f"data.validation_split={split} has no effect on a share. Leave it out.")
