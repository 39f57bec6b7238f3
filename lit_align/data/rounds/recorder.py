"""Parts of stored rounds, computed once and kept on disk, a batch at a time, by all processes together.

Samples and their scores, log π_s, and log π_ref of a reference that does not move: each is a part of a stored round
(`store.py`). Every process computes its share of the batches, a killed run resumes where it was, and sharded weights
are gathered once for all batches.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from lit_align.console import phase, print_field
from lit_align.data.batches import Example, record_logps
from lit_align.data.rounds.row_types import LogpsRow, StoredRow
from lit_align.data.rounds.store import Part, RoundStore
from lit_align.data.table import ExampleTable
from lit_align.dtypes import has_full_precision
from lit_align.errors import UserError, amount
from lit_align.files import repr_in_pieces
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import PreferenceObjective
from lit_align.objectives.first_step import rounding_of_batches
from lit_align.sharding import barrier_with_timeout, computing, in_turns

R = TypeVar("R", bound=StoredRow)
LogpsFn = Callable[[PreferenceBatch], Tensor]
"""Log-probabilities of a batch's responses: a policy, or a reference's `logps`."""

EXAMPLES_PER_FILE = 64
"""Examples whose log-probabilities are computed and stored together."""


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """A part that is stored whole, and what it took to have it. Its rows are read batch by batch."""

    part: Part[R]
    batches: Sequence[Sequence[int]]  # indices of the prompts of each batch
    seconds: float
    computed: int  # prompts that were not stored before

    def batch(self, number: int) -> list[R]:
        """The rows of one batch."""
        return self.part.row.from_arrow(self.table(number))

    def table(self, number: int) -> pa.Table:
        """The same as an Arrow table."""
        table = self.part.table(number)
        if table is None:
            raise UserError(
                f"{self.part.file(number)} is missing, although a process has stored it. Rounds need a folder that all "
                "processes share: set data.store to one."
            )
        return table

    def __iter__(self) -> Iterator[R]:
        """All rows, batch by batch."""
        return chain.from_iterable(map(self.batch, range(len(self.batches))))

    @property
    def order(self) -> NDArray[np.int64]:
        """The place of each prompt's row when all rows are read batch by batch."""
        return np.argsort(np.concatenate([np.asarray(indices) for indices in self.batches]))


class Computation(ABC, Generic[R]):
    """How the missing batches of a part are computed."""

    @abstractmethod
    def ready(self) -> AbstractContextManager[None]:
        """Load what `compute` needs, and free it afterwards.

        Entered if any batch is missing, and then by all processes, since sharded weights take all of them.
        """

    @abstractmethod
    def compute(self, number: int) -> list[R]:
        """The rows of one batch."""

    def idle(self) -> None:
        """Take part in what other processes compute, without a batch of one's own; most need no other process."""


class Recorder:
    """Computes and reads the parts of stored rounds.

    Args:
        module: Its policy and reference give the log-probabilities.
        batch_size: Examples of one forward pass.
        wait_minutes: How long a process waits for the others in each part.
        on_shards: All processes compute log-probabilities together on the shards of sharded weights; otherwise each
            gathers all weights and computes on its own.
    """

    def __init__(self, module: PreferenceObjective, batch_size: int, wait_minutes: float, on_shards: bool = False):
        self.module = module
        self.batch_size = batch_size
        self.wait_minutes = wait_minutes
        self.on_shards = on_shards

    def able_to_compute(self, network: object) -> AbstractContextManager[None]:
        """Within this context, `logps` can be computed with a network, a policy or a reference."""
        return computing(network, self.on_shards)

    def load_or_compute(
        self, name: str, part: Part[R], batches: Sequence[Sequence[int]], computation: Computation[R]
    ) -> Loaded[R]:
        """Check the batches that are stored; compute and store the others. Every process must call it.

        Args:
            name: Shown beside the progress bar.
            batches: Indices of the prompts of each batch; every process computes its share of the batches.
        """
        started = time.monotonic()
        trainer = self.module.trainer
        where = f"{part.store.path.name}, {name}"
        total = sum(map(len, batches))
        missing = [number for number in range(len(batches)) if not part.is_stored(number)]
        to_do = sum(len(batches[number]) for number in missing)
        barrier_with_timeout(where, self.wait_minutes)  # all have looked before any writes
        if missing:
            before = f" ({total - to_do} stored before)" if to_do < total else ""
            with computation.ready(), phase(name, total, f"prompts{before}", done=total - to_do) as bar:
                for turn, own in in_turns(missing, trainer.global_rank, trainer.world_size):
                    if own is not None:
                        part.write(own, computation.compute(own))
                    else:
                        computation.idle()
                    bar.advance(sum(len(batches[number]) for number in turn))
        else:
            print_field(name, f"{amount(total, 'prompts')}, stored before in {part.store.path}")
        barrier_with_timeout(where, self.wait_minutes)
        return Loaded(part, batches, time.monotonic() - started, to_do)

    def logps(self, model: LogpsFn, examples: Sequence[Example]) -> list[list[float]]:
        """Log-probabilities of every response of each example, in the precision that training has.

        If they are computed `on_shards`, every process must call this at the same time, also one without examples.
        """
        assert self.module.policy is not None
        with self.module.trainer.precision_plugin.forward_context():
            return record_logps(model, self.module.policy, examples, self.batch_size, on_shards=self.on_shards)

    def logps_column(
        self,
        name: str,
        identity: str,
        store: RoundStore,
        examples: ExampleTable,
        model: AbstractContextManager[LogpsFn],
    ) -> NDArray[np.float64]:
        """Log-probabilities of all responses, [examples, K], stored under the model, temperature and tokens.

        Args:
            name: Shown beside the progress bar; the files' names begin with it.
            identity: Identifies the model.
            model: Gives the model if any batch is missing.
        """
        assert self.module.policy is not None
        under = f"({identity!r}, {self.module.policy.temperature!r}, "

        def determined_by() -> Iterator[str]:
            tokens = repr_in_pieces((example.prompt_ids, example.response_ids) for example in examples)
            return chain([under], tokens, [")"])

        part = store.logps(name, determined_by, known_as=examples.digest and f"{under}{examples.digest}")
        starts = range(0, len(examples), EXAMPLES_PER_FILE)
        batches = [range(start, min(start + EXAMPLES_PER_FILE, len(examples))) for start in starts]

        rows = self.load_or_compute(name, part, batches, _LogpsComputation(self, model, examples, batches))
        return np.fromiter(chain.from_iterable(row.logps for row in rows), np.float64).reshape(len(examples), -1)

    def with_reference(self, store: RoundStore, examples: ExampleTable) -> ExampleTable:
        """The examples with log π_ref, if it may be recorded; otherwise as they are."""
        reference = self.module.recordable_reference
        if reference is None:
            return examples

        @contextmanager
        def open_reference() -> Iterator[LogpsFn]:
            with reference.present() as present, self.able_to_compute(present):
                yield present.logps

        recorded = self.logps_column("reference", reference.fingerprint(), store, examples, open_reference())
        return examples.with_numbers("reference_logps", recorded)

    def with_stored_reference(self, folder: Path, examples: ExampleTable) -> ExampleTable:
        """The examples with log π_ref, from the folder or computed now.

        Raises:
            UserError: the folder's numbers are not the reference's.
        """
        reference = self.module.recordable_reference
        assert reference is not None
        store = RoundStore(folder, 0, {"reference": reference.fingerprint()})
        recorded = self.with_reference(store, examples)
        first = recorded[0]
        with reference.present() as present:
            (again,) = self.logps(present.logps, [first])
        full_precision = has_full_precision(reference.dtype, self.module.trainer.precision)
        bound = rounding_of_batches(max(map(len, first.response_ids)), full_precision)
        check_cache(first.reference_logps or [], again, bound, str(store.path))
        return recorded


@dataclass
class _LogpsComputation(Computation[LogpsRow]):
    """The log-probabilities of examples under a model."""

    recorder: Recorder
    model: AbstractContextManager[LogpsFn]
    examples: ExampleTable
    batches: Sequence[range]

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.model as self._logps:
            yield

    def compute(self, number: int) -> list[LogpsRow]:
        some = self.examples[self.batches[number].start : self.batches[number].stop]
        return [LogpsRow(e.source, each) for e, each in zip(some, self.recorder.logps(self._logps, some), strict=True)]

    def idle(self) -> None:
        if self.recorder.on_shards:
            self.recorder.logps(self._logps, [])


def check_cache(recorded: Sequence[float], recomputed: Sequence[float], bound: float, where: str) -> None:
    """Check that stored log-probabilities are those of the reference.

    Raises:
        UserError: they differ by more than `bound` nats.
    """
    off = max(abs(a - b) for a, b in zip(recorded, recomputed, strict=True))
    if not off <= bound:
        raise UserError(
            f"{where}: the stored log π_ref of one example differs from the reference's by {off:.3g} nats (bound "
            f"{bound:.3g}). Delete this folder to record them again."
        )
