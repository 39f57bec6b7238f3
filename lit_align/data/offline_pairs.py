"""Preference pairs that exist already: files, saved data sets, the hub."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L

from lit_align.console import say
from lit_align.data.collate import Encoder, Example, ExampleLoader, LongPrompts
from lit_align.data.formats import Row, read_rows
from lit_align.data.pairing import BestWorst, PairingRule
from lit_align.errors import UserError


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
        long_prompts: What happens to a longer prompt: an error, drop the row, or cut its beginning (left).
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
        seed: int | None = None,
    ):
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
        }.items():
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1.")
        self.validation = validation
        self.validation_split = validation_split
        self.test = test
        self.test_split = test_split
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.long_prompts: LongPrompts = long_prompts
        self.given_seed = seed
        self._encoder: Encoder | None = None
        self._validation_examples: list[Example] | None = None

    @property
    def seed(self) -> int:
        import os

        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.given_seed is None else self.given_seed

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        assert self.trainer is not None
        return self.trainer.lightning_module.tokenizer

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder(
                self.tokenizer,
                max_prompt_length=self.max_prompt_length,
                max_response_length=self.max_response_length,
                long_prompts=self.long_prompts,
            )
        return self._encoder

    def val_dataloader(self) -> ExampleLoader | list[Any]:
        if self.validation is None:
            return []
        if self._validation_examples is None:
            self._validation_examples, _ = self.read_pairs(self.validation, self.validation_split, BestWorst())
        return self._loader(self._validation_examples, shuffle=False)

    def test_dataloader(self) -> ExampleLoader | range:
        if self.test is None:
            return range(1)  # a batch that is none: without any Lightning calls no hook, and `WinRate` needs one
        examples, _ = self.read_pairs(self.test, self.test_split, BestWorst())
        return self._loader(examples, shuffle=False)

    def predict_dataloader(self) -> Any:
        raise UserError(
            "predict: not offered yet. The trained model is in the run's folder under model/, in transformers format: "
            "load it with `AutoModelForCausalLM.from_pretrained` and call its `generate`."
        )

    def read_pairs(self, path: str, split: str | None, pairing: PairingRule) -> tuple[list[Example], str]:
        """Examples of a source of preferences, and one line that says what it was."""
        rows = read_rows(path, split=split, kind="preferences")
        counts = Counter(rows.skipped)
        self.encoder.counts.clear()
        examples: list[Example] = []
        for row in rows:
            found, reasons = self._examples(row, pairing)
            examples += found
            counts.update(reasons)
        counts.update(self.encoder.counts)
        if not examples:
            raise UserError(f"{path}: no pair is left to train on: {_listing(counts)}.")
        line = f"{len(examples)} pairs from {path}: {rows.description}"
        return examples, line + (f"; {_listing(counts)}" if counts else "")

    def _examples(self, row: Row, pairing: PairingRule) -> tuple[list[Example], Counter[str]]:
        prompt_ids = self.encoder.prompt(row.prompt, row.source)
        if prompt_ids is None:
            return [], Counter()
        chat = not isinstance(row.prompt, str)
        responses = [self.encoder.response(text, chat=chat) for text in row.responses]
        group = Example(prompt_ids, responses, row.source, rewards=list(row.rewards) if row.rewards else None)
        if group.rewards is not None and len(responses) > 2:
            pairs = pairing([group])
            return pairs.examples, pairs.counts
        chosen, *rejected = responses
        rewards = group.rewards
        different = [ids for ids in rejected if ids != chosen]
        return (
            [Example(prompt_ids, [chosen, ids], row.source, rewards=rewards) for ids in different],
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
            epoch=lambda: trainer.current_epoch,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header."""
        yield from ()

    def _describe_example(self, example: Example) -> Iterator[tuple[str, str]]:
        """One decoded example, special tokens included: what the model really sees."""
        names = ["chosen", "rejected"] if len(example.response_ids) == 2 else [f"response {k}" for k in range(99)]
        yield "prompt", _shown(self.tokenizer.decode(example.prompt_ids))
        for name, ids in zip(names, example.response_ids, strict=False):
            yield name, _shown(self.tokenizer.decode(ids))


class OfflinePairs(PairsDataModule):
    """Preference pairs from a file, a saved data set or the hub; prompts explicit or shared, text or chat.

    Args:
        train: A .jsonl, .json or .parquet file, a folder saved by `datasets`, or a hub name.
        train_split: Split of a saved or hub data set.
        pairing: Which pair is made of a row with more than two rewarded responses.
    """

    def __init__(
        self, train: str, *, train_split: str | None = None, pairing: PairingRule | None = None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.train = train
        self.train_split = train_split
        self.pairing = pairing or BestWorst()
        self._examples_read: list[Example] | None = None
        self._line = ""

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._examples_read is None:
            self._examples_read, self._line = self.read_pairs(self.train, self.train_split, self.pairing)

    def train_dataloader(self) -> ExampleLoader:
        assert self._examples_read is not None
        loader = self._loader(self._examples_read, shuffle=True)
        if not len(loader):
            raise UserError(
                f"{self.train}: {len(self._examples_read)} pairs make no full batch for every process; lower "
                f"data.batch_size={self.batch_size} or the number of processes."
            )
        if loader.dropped:
            say(f"  {loader.dropped} pairs of each epoch are left out: they fill no batch for every process.")
        return loader

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "data", self._line
        if self._examples_read:
            yield from self._describe_example(self._examples_read[0])


def _listing(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none was skipped"


def _shown(text: str, width: int = 300) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
