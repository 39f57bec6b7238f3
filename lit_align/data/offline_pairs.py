"""Preference pairs that exist already: files, saved data sets, the hub."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_line
from lit_align.data.base import PairsDataModule, describe_example
from lit_align.data.checks import check_fits, check_joinable
from lit_align.data.examples import Examples, Source, digest_of_examples
from lit_align.data.given_rows import as_files
from lit_align.data.holdout import HeldOutShare
from lit_align.data.loader import ExampleLoader, Mixture
from lit_align.data.pairing import BestWorst, PairingRule
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError, amount
from lit_align.objectives import PreferenceObjective
from lit_align.provenance import Table, of_options


class OfflinePairs(PairsDataModule):
    """Preference pairs from a file, a saved data set or the hub; prompts explicit or shared, text or chat.

    Args:
        train: A .jsonl, .json, .csv, .parquet or .arrow file, a folder saved by `datasets`, a run's folder with rounds
            (or one of them), or a hub name. Or a list of names or of {path, weight, split, columns, …}, where a weight
            is how often each row is trained on in an epoch. Preferences, labelled responses (KTO) or texts (SFT).
        train_split: Split of a saved or hub data set; for rounds with several scorers, a part of one scorer's name.
        pairing: Rule that makes pairs from a row whose responses have rewards; None is the best against the worst.
            Without rewards, each rejected response makes a pair with the chosen one.
    """

    argument_conversions = PairsDataModule.argument_conversions | {"train": as_files}
    trains_on_files = True

    def __init__(
        self,
        train: str | list[str | Source],
        *,
        train_split: str | None = None,
        pairing: PairingRule | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if train_split is not None and not isinstance(train, str):
            raise UserError(f"data.train_split={train_split} has no effect on several sources. Give each its split.")
        if not train:
            raise UserError("data.train must name a source. Give a file, a folder or a hub name.")
        self.train = train
        self.train_split = train_split
        self.pairing = pairing or BestWorst()
        self._sources = self._train_sources(train)
        self._parts: list[Examples] = []
        self._held_out_part: Examples | None = None
        self._examples_read: ExampleTable | None = None
        self._recorded: ExampleTable | None = None  # the same with log π_ref, if it is recorded

    def _train_sources(self, train: str | list[str | Source]) -> list[Source]:
        if isinstance(train, str):
            return [self.source(train, self.train_split)]
        shared = {"columns": self.columns, "ignore_columns": self.ignore_columns, "turns": self.turns}

        def complete(given: str | Source) -> Source:
            source = Source(given) if isinstance(given, str) else given
            missing = {name: value for name, value in shared.items() if getattr(source, name) is None}
            return replace(source, **missing)  # type: ignore[arg-type]

        return [complete(each) for each in train]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        self.check_needs(self.pairing)
        self._recorded = None
        if self._examples_read is None:
            self.read_beside()
            split = self._split
            self._parts = [
                self.tokenize(source, self.needs.data_kind, self.pairing, split and split.train(place))
                for place, source in enumerate(self._sources)
            ]
            if split is not None:
                self._held_out_part = self.share_of_training()
                split.forget()
            check_joinable(self._sources, [part.examples for part in self._parts])
            self._examples_read = ExampleTable.joined([part.examples for part in self._parts])
        self.settle_sampling_prompt([*self._parts, *self.texts.examples])

    @cached_property
    def _split(self) -> HeldOutShare | None:
        """The rows of all sources without those that are held out for validation, if a share is."""
        if not isinstance(self.validation, float):
            return None
        return HeldOutShare(self._sources, self.needs.data_kind, self.validation, self.seed)

    def share_of_training(self) -> Examples:
        if self._held_out_part is None:
            assert self._split is not None
            first = self._sources[0]
            self._held_out_part = self.tokenize(first, self.needs.data_kind, selection=self._split.held_out())
        return self._held_out_part

    def train_dataloader(self) -> ExampleLoader | CombinedLoader:
        assert self._examples_read is not None
        if isinstance(self.module, PreferenceObjective) and self.module.policy is not None:
            check_fits(self._examples_read, self.module.policy.positions)
        if self._recorded is None:
            self._recorded = self.record_reference(self._examples_read)
        counts = tuple(len(part.examples) for part in self._parts)
        mixture = Mixture(counts, tuple(source.weight for source in self._sources))
        loader = self._training_loader(self._recorded, mixture=mixture)
        if loader.dropped:
            print_line(
                f"  left out: {amount(loader.dropped, 'pairs')} of each epoch, too few for a batch of every process."
            )
        return self.with_texts(loader)

    @property
    def train_examples(self) -> ExampleTable:
        """All examples that are trained on."""
        assert self._examples_read is not None
        return self._examples_read

    @property
    def summary(self) -> str:
        """Description of the data that was read, one line per source."""
        return "\n".join(part.line for part in self._parts)

    def identity(self) -> Table:
        pairing = of_options("data.pairing", vars(self.pairing))
        own: Table = {
            "data.train": digest_of_examples(self.train_examples),
            "data.pairing": type(self.pairing).__name__,
        }
        if len(self._sources) > 1:
            own["data.train.weights"] = repr([source.weight for source in self._sources])
        return super().identity() | own | pairing

    def describe(self) -> Iterator[tuple[str, str]]:
        for source, part in zip(self._sources, self._parts, strict=True):
            weight = "" if source.weight == 1 else f" × {source.weight:g}"
            yield from part.describe(f"data{weight}")
        yield from super().describe()
        if self._held_out_part is not None:
            yield (
                "validation",
                f"{self.validation:.1%} of the prompts: {amount(self._held_out_part.rows, 'rows')}, not trained on",
            )
        if self._examples_read:
            yield from describe_example(self.tokenizer, self._examples_read[0])
