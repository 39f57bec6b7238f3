"""Preference pairs that exist already: files, saved data sets, the hub."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_line
from lit_align.data.base import PairsDataModule, digest_of_examples
from lit_align.data.batches import Example
from lit_align.data.loader import ExampleLoader
from lit_align.data.pairing import BestWorst, PairingRule
from lit_align.provenance import Table, of_options


class OfflinePairs(PairsDataModule):
    """Preference pairs from a file, a saved data set or the hub; prompts explicit or shared, text or chat.

    Args:
        train: A .jsonl, .json or .parquet file, a folder saved by `datasets`, a run's folder with rounds (or one of
            them), or a hub name. For objectives that take others (KTO, SFT), labelled responses or texts.
        train_split: Split of a saved or hub data set; of rounds with several scorers, a part of the name of one.
        pairing: Which pairs are made of a row whose responses have rewards; None is the best against the worst. Without
            rewards, each rejected response makes a pair with the chosen one.
    """

    def __init__(
        self, train: str, *, train_split: str | None = None, pairing: PairingRule | None = None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.train = train
        self.train_split = train_split
        self.pairing = pairing or BestWorst()
        self._examples_read: list[Example] | None = None
        self._recorded = False
        self.summary = ""

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._examples_read is None:
            self.check_sampler()
            self.check_pairing(self.pairing)
            self.read_texts()
            self._examples_read, self.summary = self.read_pairs(self.train, self.train_split, self.pairing)

    def train_dataloader(self) -> ExampleLoader | CombinedLoader:
        assert self._examples_read is not None
        if not self._recorded:
            self._examples_read, self._recorded = self.record_reference(self._examples_read), True
        loader = self._training_loader(self._examples_read)
        if loader.dropped:
            print_line(f"  {loader.dropped} pairs of each epoch are left out: they fill no batch for every process.")
        return self.with_texts(loader)

    @property
    def train_examples(self) -> list[Example]:
        assert self._examples_read is not None
        return self._examples_read

    def identity(self) -> Table:
        pairing = of_options("data.pairing", vars(self.pairing))
        own = {"data.train": digest_of_examples(self.train_examples), "data.pairing": type(self.pairing).__name__}
        return super().identity() | own | pairing

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "data", self.summary
        yield from super().describe()
        if self._examples_read:
            yield from self._describe_example(self._examples_read[0])
