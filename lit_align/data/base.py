"""What data modules of preferences share: tokenization, held-out pairs, texts beside them, loaders that resume."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_line
from lit_align.data.batches import Example
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Kind, Row, Rows, answer_text
from lit_align.data.loader import ExampleLoader
from lit_align.data.pairing import BestWorst, PairingRule, with_labels, with_mismatched
from lit_align.data.rounds.record import Recorder, check_cache
from lit_align.data.rounds.store import RoundStore
from lit_align.data.tokenization import LongPrompts, PreferenceTokenizer, listing
from lit_align.errors import UserError
from lit_align.needs import DataNeeds, needs_of
from lit_align.objectives import PreferenceObjective
from lit_align.provenance import Table, digest_of
from lit_align.reference.copied import CopiedReference, RecordedReference


class PairsDataModule(L.LightningDataModule):
    """What data modules of preferences share: tokenization, validation pairs, loaders that resume.

    Args:
        validation: Preference pairs whose loss and margins are logged as val/...; the same sources as for training.
        validation_split: Split of a saved or hub data set.
        test: Preference pairs whose loss and margins `python train.py test` reports as test/....
        test_split: Split of a saved or hub data set.
        batch_size: Prompts per batch and process.
        max_prompt_length: Longest prompt, in tokens.
        max_response_length: Longest response in tokens, its end included; longer ones are cut, and counted.
        long_prompts: What happens to a longer prompt: an error, drop the row, or cut its beginning (truncate_left).
        sft: Texts to imitate, trained on together with the preferences: as many batches, over and over. Their weight is
            the objective's. Prompts with a response, chats, preferences (the better response), or plain texts.
        sft_split: Split of a saved or hub data set.
        pretraining: Texts as before pre-training's end, likewise.
        pretraining_split: Split of a saved or hub data set.
        text_batch_size: Texts of each kind per batch and process; None is batch_size.
        group_by_length: Train on batches of examples of like length, for less padding in attention and processes that
            wait less for one another; the order stays random otherwise.
        wait_minutes: With several processes, how long one waits for the others where something is computed once and
            stored (samples, scores, log-probabilities).
        seed: Of the order of examples; None takes seed_everything's.
    """

    def __init__(
        self,
        *,
        validation: str | None = None,
        validation_split: str | None = None,
        test: str | None = None,
        test_split: str | None = None,
        batch_size: int = 8,
        max_prompt_length: int = 512,
        max_response_length: int = 512,
        long_prompts: LongPrompts = "error",
        sft: str | None = None,
        sft_split: str | None = None,
        pretraining: str | None = None,
        pretraining_split: str | None = None,
        text_batch_size: int | None = None,
        group_by_length: bool = False,
        wait_minutes: float = 60,
        seed: int | None = None,
    ):
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
            "text_batch_size": text_batch_size,
        }.items():
            if value is not None and not value >= 1:  # nan is not, either
                raise UserError(f"data.{name}={value} must be at least 1.")
        self.validation = validation
        self.validation_split = validation_split
        self.test = test
        self.test_split = test_split
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.long_prompts: LongPrompts = long_prompts
        given = {"sft": (sft, sft_split), "pretraining": (pretraining, pretraining_split)}
        for name, (path, split) in given.items():
            if path is None and split is not None:
                raise UserError(f"data.{name}_split={split} has no effect without data.{name}.")
        self.texts = {name: (path, split) for name, (path, split) in given.items() if path is not None}
        self.text_batch_size = text_batch_size
        self.group_by_length = group_by_length
        if not wait_minutes > 0:
            raise UserError(f"data.wait_minutes={wait_minutes} must be above 0.")
        self.wait_minutes = wait_minutes
        self.given_seed = seed
        self._preference_tokenizer: PreferenceTokenizer | None = None
        self._validation_examples: list[Example] | None = None
        self._text_examples: dict[str, list[Example]] = {}
        self._text_lines: dict[str, str] = {}

    @property
    def seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.given_seed is None else self.given_seed

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        assert self.trainer is not None
        return self.trainer.lightning_module.tokenizer

    @property
    def preference_tokenizer(self) -> PreferenceTokenizer:
        if self._preference_tokenizer is None:
            self._preference_tokenizer = PreferenceTokenizer(
                self.tokenizer,
                max_prompt_length=self.max_prompt_length,
                max_response_length=self.max_response_length,
                long_prompts=self.long_prompts,
                wraps_prompts=self.needs.wraps_prompt_as_chat and bool(self.tokenizer.chat_template),
            )
        return self._preference_tokenizer

    @property
    def recorder(self) -> Recorder:
        assert self.trainer is not None
        return Recorder(self.trainer.lightning_module, self.batch_size, self.wait_minutes)  # type: ignore[arg-type]

    def record_reference(self, examples: list[Example]) -> list[Example]:
        """Examples of a file with log π_ref, computed once and kept in the run's folder, where model.reference says so.

        Raises:
            UserError: what is kept are not the reference's.
        """
        assert self.trainer is not None
        reference = getattr(self.trainer.lightning_module, "reference", None)
        if not isinstance(reference, RecordedReference):
            return examples
        cache = RoundStore(Path(self.trainer.default_root_dir, "reference"), 0, {"reference": reference.fingerprint()})
        examples = self.recorder.with_reference(cache, examples)
        first = examples[0]
        with reference.present() as present:
            assert isinstance(present, CopiedReference)
            (again,) = self.recorder.logps(present.logps, [first])
        bound = 1e-3 if present.dtype.itemsize >= 4 else 1.0
        check_cache(first.reference_logps or [], again, bound, str(cache.path))
        return examples

    def val_dataloader(self) -> ExampleLoader | list[Any]:
        if self.validation is None:
            if self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
                raise UserError("validate: there are no pairs to validate on. Name some: --data.validation=PATH.")
            return []
        if self._validation_examples is None:
            self._validation_examples = self._held_out("validation", self.validation, self.validation_split)
        return self._loader(self._validation_examples, shuffle=False)

    def _held_out(self, name: str, path: str, split: str | None) -> list[Example]:
        """The pairs of data.validation or data.test; says how many of them fill no batch for every process."""
        examples, _ = self.read_pairs(path, split, BestWorst())
        loader = self._loader(examples, shuffle=False)
        if not len(loader):
            raise UserError(
                f"data.{name}={path}: its {len(examples)} examples make no full batch for every process; lower "
                f"data.batch_size={self.batch_size} or the number of processes."
            )
        if loader.dropped:
            print_line(f"  {loader.dropped} pairs of data.{name} are left out: they fill no batch for every process.")
        return self.record_reference(examples)

    def test_dataloader(self) -> ExampleLoader | range:
        if self.test is None:
            callbacks = self.trainer.callbacks if self.trainer is not None else []  # type: ignore[attr-defined]
            if all(type(callback).on_test_end is Callback.on_test_end for callback in callbacks):
                raise UserError("test: there is nothing to test. Name pairs (--data.test=PATH), or configure win_rate.")
            return range(1)  # a batch that is none: without any Lightning calls no hook, and `WinRate` needs one
        return self._loader(self._held_out("test", self.test, self.test_split), shuffle=False)

    def predict_dataloader(self) -> range:
        callbacks = self.trainer.callbacks if self.trainer is not None else []  # type: ignore[attr-defined]
        if all(type(callback).on_predict_end is Callback.on_predict_end for callback in callbacks):
            raise UserError("predict: there are no prompts to answer. Name some: --predictions.prompts=PATH.")
        return range(1)  # a batch that is none: without any Lightning calls no hook, and `Predictions` needs one

    @property
    def needs(self) -> DataNeeds:
        """What the trained module needs from its data."""
        assert self.trainer is not None
        return needs_of(self.trainer.lightning_module)

    @property
    def records_sampler(self) -> bool:
        """Whether training examples carry log π_s."""
        return False

    def check_sampler(self) -> None:
        """Make sure that training examples carry log π_s where the objective reads it.

        Raises:
            UserError: they do not.
        """
        assert self.trainer is not None
        if self.needs.reads_sampler and not self.records_sampler:
            raise UserError(
                f"{type(self.trainer.lightning_module).__name__}, as it is configured, reads log π_s of each response "
                f"(model.proximal, SPPO's model.estimate_baseline), which {type(self).__name__} as it is configured "
                "does not record. Use OnPolicyPairs with record_sampler=true, or leave these options out."
            )

    def read_pairs(
        self, path: str, split: str | None, pairing: PairingRule, kind: Kind | None = None
    ) -> tuple[list[Example], str]:
        """Examples of a source of preferences, or of what the objective takes instead, and a line that tells of it.

        Args:
            kind: What the rows are for, where it is not the objective that says it.

        Raises:
            UserError: nothing is left, only some rows have rewards or labels, or none has rewards that the rule needs.
        """
        asked: Kind = self.needs.data_kind
        rows = read_rows(path, split=split, kind=kind or asked)
        _check_alike(rows)
        if rows[0].rewards is None and not pairing.is_default:
            raise UserError(
                f"data.pairing={type(pairing).__name__} has no effect, for a rule chooses by rewards, and no row of "
                f"{path} gives any to {kind or asked}. Leave it out, or give rewards (columns score_chosen and "
                "score_rejected, or responses and rewards)."
            )
        counts = Counter(rows.skipped)
        self.preference_tokenizer.counts.clear()
        examples: list[Example] = []
        for row in rows:
            found, reasons = self._examples(row, pairing)
            examples += found
            counts.update(reasons)
        counts.update(self.preference_tokenizer.counts)
        sizes = Counter(len(example.response_ids) for example in examples)
        if len(sizes) > 1:  # a batch is of one K
            K, most = sizes.most_common(1)[0]
            counts[f"groups of other than {K} responses"] += sizes.total() - most
            examples = [example for example in examples if len(example.response_ids) == K]
        if not examples:
            raise UserError(f"{path}: nothing is left to train on: {listing(counts)}.")
        if kind is None and self.needs.needs_mismatched:
            examples = with_mismatched(with_labels(examples))
        names = {"preferences": "groups", "labelled": "labelled responses"}
        K = len(examples[0].response_ids) - examples[0].mismatched
        what = "pairs" if K == 2 else names.get(kind or asked, "texts")
        line = f"{len(examples)} {what} from {path}: {rows.description}"
        return examples, line + (f"; {listing(counts)}" if counts else "")

    def _examples(self, row: Row, pairing: PairingRule) -> tuple[list[Example], Counter[str]]:
        tokens = self.preference_tokenizer.row(row)
        if tokens is None:
            return [], Counter()
        prompt_ids, responses = tokens
        texts = [answer_text(answer) for answer in row.responses]
        rewards = list(row.rewards) if row.rewards else None
        group = Example(prompt_ids, responses, row.source, rewards=rewards, texts=texts)
        if len(responses) == 1:
            labels = [float(label) for label in row.labels] if row.labels else None
            return [replace(group, labels=labels)], Counter()
        if group.rewards is not None:
            pairs = pairing([group])
            return pairs.examples, pairs.counts + pairs.partial_drops
        chosen, *rejected = responses
        different = [ids for ids in rejected if ids != chosen]
        return (
            [Example(prompt_ids, [chosen, ids], row.source) for ids in different],
            Counter(
                {"equal after truncation": len(rejected) - len(different)} if len(different) < len(rejected) else {}
            ),
        )

    def _loader(self, examples: list[Example], *, shuffle: bool, seed: int | None = None) -> ExampleLoader:
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
        )

    def _training_loader(self, examples: list[Example], seed: int | None = None) -> ExampleLoader:
        loader = self._loader(examples, shuffle=True, seed=seed)
        if not len(loader):
            raise UserError(
                f"{len(examples)} examples to train on make no full batch for every process; lower data.batch_size="
                f"{self.batch_size} or the number of processes."
            )
        return loader

    def check_pairing(self, pairing: PairingRule) -> None:
        """Make sure that the objective can train on what the rule makes.

        Raises:
            UserError: it needs the other kind.
        """
        assert self.trainer is not None
        name = type(self.trainer.lightning_module).__name__
        if pairing.gives_groups and not self.needs.takes_groups:
            raise UserError(
                f"data.pairing={type(pairing).__name__}: {name}, as it is set, compares two responses. Take "
                "BestWorst, or learn from rewards (model.reward_temperature of DPO and EXO)."
            )
        if pairing.gives_labels and not self.needs.takes_labels:
            raise UserError(
                f"data.pairing={type(pairing).__name__}: soft labels (labels=soft, ties=half) do nothing for {name}, "
                "as it is set. Leave them out, or take DPO, IPO, CPO, ORPO or MPO."
            )
        if self.needs.needs_whole_groups and not pairing.gives_groups:
            raise UserError(
                f"data.pairing={type(pairing).__name__}: {name}'s constant is estimated from all responses that were "
                "sampled. Take Listwise, or leave model.estimate_baseline out."
            )

    def read_texts(self) -> None:
        """Read the streams of texts that are trained on together with the preferences."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if isinstance(module, PreferenceObjective):
            module.check_texts(self.texts)
        elif self.texts:
            raise UserError(
                f"data.{next(iter(self.texts))} needs a lit_align objective, which weighs texts beside preferences."
            )
        for name, (path, split) in self.texts.items():
            if name not in self._text_examples:
                self._text_examples[name], self._text_lines[name] = self.read_pairs(path, split, BestWorst(), "texts")

    def with_texts(self, loader: ExampleLoader) -> ExampleLoader | CombinedLoader:
        """The loader of the preferences, together with one of as many batches for each stream of texts."""
        trainer = self.trainer
        assert trainer is not None
        loaders = {"preferences": loader}
        for number, (name, examples) in enumerate(self._text_examples.items(), 1):
            loaders[name] = ExampleLoader(
                examples,
                self.text_batch_size or self.batch_size,
                seed=loader.seed + 7919 * number,
                epoch=lambda: trainer.current_epoch,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                length=len(loader),
            )
            if not loaders[name].share:
                raise UserError(
                    f"data.{name}: {len(examples)} texts make no full batch for every process; lower "
                    "data.text_batch_size or the number of processes."
                )
        return CombinedLoader(loaders, "min_size") if len(loaders) > 1 else loader

    def identity(self) -> Table:
        """All that determines the training batches; a resumed run must have the same."""
        assert self.trainer is not None
        texts = {f"data.{name}": digest_of_examples(examples) for name, examples in self._text_examples.items()}
        return texts | {
            "data": type(self).__name__,
            "data.seed": self.seed,
            "data.batch_size": self.batch_size * self.trainer.world_size,  # of all processes together
            "data.group_by_length": self.group_by_length,
            "data.max_prompt_length": self.max_prompt_length,
            "data.max_response_length": self.max_response_length,
            "data.long_prompts": self.long_prompts,
        }

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header."""
        yield from self._text_lines.items()

    def _describe_example(self, example: Example) -> Iterator[tuple[str, str]]:
        """One decoded example, special tokens included: what the model really sees."""
        K = len(example.response_ids) - example.mismatched
        several = ["chosen", "rejected"] if K == 2 else [f"response {k}" for k in range(K)]
        names = [*(several if K > 1 else ["response"]), "mismatched"]
        yield "prompt", _shown(self.tokenizer.decode(example.prompt_ids))
        for name, ids in zip(names, example.response_ids, strict=False):
            yield name, _shown(self.tokenizer.decode(ids))


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Identifies the tokens of examples."""
    return digest_of([[example.prompt_ids, *example.response_ids] for example in examples])


def _check_alike(rows: Rows) -> None:
    """Make sure that all rows have rewards and labels, or none: a batch has a number for each response, or for none."""
    for row in rows:
        for name in ("rewards", "labels"):
            has, first_has = (getattr(each, name) is not None for each in (row, rows[0]))
            if has != first_has:
                raise UserError(
                    f"{row.source}: the row has {name if has else f'no {name}'}, but {rows[0].source} has "
                    f"{'some' if first_has else 'none'}. Give {name} to every row, or to none."
                )


def _shown(text: str, width: int = 300) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
