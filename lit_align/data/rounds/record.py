"""What is computed once for a data set and kept on disk, a batch at a time, by all processes together.

Samples and their scores, log π_s, and log π_ref of a reference that rests: each is a part of a stored round
(`store.py`). Every process makes its share of the batches, a killed run goes on where it was, and weights that lie in
shards are gathered once for all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_align.console import phase, print_field
from lit_align.data.batches import Example, record_logps
from lit_align.data.rounds.store import RoundStore, digest
from lit_align.data.sampling import in_order
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import AnchoredObjective, PreferenceObjective
from lit_align.reference.base import Reference
from lit_align.reference.copied import CopiedReference, RecordedReference
from lit_align.sharding import gathered, wait_for_all

Rows = list[dict[str, Any]]
Make = Callable[[Sequence[int]], Rows]  # the rows of a batch, from the places of its prompts
Making = AbstractContextManager[Make]  # entered by all processes, if anything is missing


class Recorder:
    """Makes and reads the parts of stored rounds.

    Args:
        module: Whose policy and reference are asked.
        batch_size: Examples of one forward pass.
        wait_minutes: How long a process waits for the others in each part.
    """

    def __init__(self, module: PreferenceObjective, batch_size: int, wait_minutes: float):
        self.module = module
        self.batch_size = batch_size
        self.wait_minutes = wait_minutes

    def part(self, name: str, part: str, made: RoundStore, batches: Sequence[Sequence[int]], making: Making) -> Rows:
        """One row per prompt (or example), in their order: stored batches are read, missing ones are made and stored.

        Args:
            name: Shown beside the bar.
            batches: Places of the prompts of each batch; every process makes its share of the batches.
            making: Gives what makes the rows of one batch's places.
        """
        trainer = self.module.trainer
        what = f"{made.path.name}, {name}"
        total = sum(map(len, batches))
        missing = [number for number in range(len(batches)) if made.read(part, number) is None]
        wait_for_all(what, self.wait_minutes)  # all have looked before any writes
        if missing:
            stored = total - sum(len(batches[number]) for number in missing)
            before = f" ({stored} stored before)" if stored else ""
            with making as make, phase(name, total, f"prompts{before}", done=stored) as bar:
                for number in missing:
                    if number % trainer.world_size == trainer.global_rank:
                        made.write(part, number, make(batches[number]))
                    bar.advance(len(batches[number]))
        else:
            print_field(name, f"{total} prompts, stored before in {made.path}")
        wait_for_all(what, self.wait_minutes)
        rows: dict[int, Rows] = {}
        for number in range(len(batches)):
            read = made.read(part, number)
            if read is None:
                raise RuntimeError(
                    f"{made.path}: batch {number} of {part} is missing; do all processes share the folder?"
                )
            rows[number] = read
        return in_order(batches, rows)

    def logps(self, of: Callable[[PreferenceBatch], Tensor], examples: Sequence[Example]) -> list[list[float]]:
        """Log-probabilities of every response of each example, in the precision that training has."""
        assert self.module.policy is not None
        with self.module.trainer.precision_plugin.forward_context():
            return record_logps(of, self.module.policy, examples, self.batch_size)

    def with_reference(self, made: RoundStore, examples: Sequence[Example]) -> list[Example]:
        """The examples with log π_ref recorded, where it rests as long as they are trained on."""
        reference = getattr(self.module, "reference", None)
        if not self._rests(reference):
            return list(examples)
        assert isinstance(reference, CopiedReference | RecordedReference)
        making = self._asking(reference, examples)
        recorded = self.column("reference", reference.fingerprint(), made, making, examples)
        return [replace(e, reference_logps=logps) for e, logps in zip(examples, recorded, strict=True)]

    def _rests(self, reference: Reference | None) -> bool:
        """Whether the reference is a second model (an adapter costs nothing to keep) that stands still meanwhile."""
        module = self.module
        return (
            isinstance(module, AnchoredObjective)
            and module.beta > 0
            and not module.reference_moves_in_round
            and isinstance(reference, CopiedReference | RecordedReference)
        )

    @contextmanager
    def _asking(self, reference: CopiedReference | RecordedReference, examples: Sequence[Example]) -> Iterator[Make]:
        with reference.present() as present, gathered(present):
            yield lambda places: self.rows("reference", present.logps, [examples[i] for i in places])

    def rows(self, name: str, of: Callable[[PreferenceBatch], Tensor], examples: Sequence[Example]) -> Rows:
        """One row with `logps` per example."""
        return [
            {"source": example.source, f"{name}_logps": logps}
            for example, logps in zip(examples, self.logps(of, examples), strict=True)
        ]

    def column(
        self, name: str, whose: str, made: RoundStore, making: Making, examples: Sequence[Example]
    ) -> list[list[float]]:
        """Log-probabilities of every response of each example, stored under whose, the temperature and the tokens."""
        batches = [range(start, min(start + 64, len(examples))) for start in range(0, len(examples), 64)]
        assert self.module.policy is not None
        tokens = [(example.prompt_ids, example.response_ids) for example in examples]
        which = digest(repr((whose, self.module.policy.temperature, tokens)))
        rows = self.part(name, f"{name}-{which}", made, batches, making)
        return [row[f"{name}_logps"] for row in rows]


def check_cache(recorded: Sequence[float], again: Sequence[float], bound: float, where: str) -> None:
    """Make sure that stored log-probabilities are those of the reference.

    Raises:
        UserError: they differ by more than `bound` nats.
    """
    off = max(abs(a - b) for a, b in zip(recorded, again, strict=True))
    if not off <= bound:
        raise UserError(
            f"{where}: stored log π_ref differ from the reference's by {off:.3g} nats (bound {bound:.3g}), computed "
            "again for one example. Delete that folder, and they are recorded anew."
        )
