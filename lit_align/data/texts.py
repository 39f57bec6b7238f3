"""Streams of texts that are trained on together with the preferences."""

from collections.abc import Callable, Iterator, Mapping

from lightning import Trainer
from lightning.pytorch.utilities import CombinedLoader

from lit_align.data.examples import Examples, Source, digest_of_examples
from lit_align.data.loader import ExampleLoader
from lit_align.errors import UserError, amount
from lit_align.objectives import PreferenceObjective
from lit_align.provenance import Table


class TextStreams:
    """Streams of texts: each gives as many batches as the preferences, over and over.

    Args:
        sources: The streams that are given, by name, with their splits.
    """

    def __init__(self, sources: Mapping[str, tuple[str | Source | None, str | None]]):
        self.sources: dict[str, Source] = {}
        self._read: dict[str, Examples] = {}
        for name, (source, split) in sources.items():
            if split is not None and not isinstance(source, str):
                where = f"data.{name}" if source is None else f"data.{name} as a path"
                raise UserError(f"data.{name}_split={split} has no effect without {where}. Leave it out.")
            if source is None:
                continue
            self.sources[name] = source if isinstance(source, Source) else Source(source, split=split)
            if self.sources[name].weight != 1:
                raise UserError(f"data.{name}: weight has no effect on a stream of texts. Set the objective's weight.")

    @property
    def examples(self) -> list[Examples]:
        """Those of each stream, once they are read."""
        return list(self._read.values())

    def read(self, module: object, tokenize: Callable[[Source], Examples]) -> None:
        """Read the streams once.

        Args:
            tokenize: Gives the examples of a source of texts.

        Raises:
            UserError: the objective does not weigh them.
        """
        if isinstance(module, PreferenceObjective):
            module.check_texts(self.sources)
        elif self.sources:
            raise UserError(
                f"data.{next(iter(self.sources))} needs a lit_align objective, which weighs texts beside preferences. "
                "Train one, or leave it out."
            )
        for name, source in self.sources.items():
            if name not in self._read:
                self._read[name] = tokenize(source)

    def beside(self, loader: ExampleLoader, trainer: Trainer, batch_size: int) -> ExampleLoader | CombinedLoader:
        """The loader of the preferences, together with one of as many batches for each stream.

        Args:
            batch_size: Texts of each stream per batch and process.
        """
        loaders = {"preferences": loader}
        for number, (name, texts) in enumerate(self._read.items(), 1):
            loaders[name] = ExampleLoader(
                texts.examples,
                batch_size,
                seed=loader.seed + 7919 * number,
                epoch=lambda: trainer.current_epoch,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                length=len(loader),
                pins=loader.pins,
            )
            if not loaders[name].share:
                raise UserError(
                    f"data.{name}: {amount(len(texts.examples), 'texts')} cannot fill a batch for every process. Lower "
                    "data.text_batch_size or the number of processes."
                )
        return CombinedLoader(loaders, "min_size") if len(loaders) > 1 else loader

    def identity(self) -> Table:
        """The tokens of each stream, identified."""
        return {f"data.{name}": digest_of_examples(texts.examples) for name, texts in self._read.items()}

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header."""
        for name, texts in self._read.items():
            yield from texts.describe(name)
