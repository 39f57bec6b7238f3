"""Log-probabilities of responses under the policy and under the start, by all processes together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_align.data.base import data_module_of
from lit_align.data.batches import Example, record_logps
from lit_align.evaluation.shares import Batches, Share, compute_share
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy
from lit_align.sharding import computing


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities under the policy and under the start.

    Args:
        batch_size: Examples of one forward pass.
    """

    module: PreferenceObjective
    policy: Policy
    start: Policy
    batch_size: int

    def share(
        self, batches: Batches, examples_of: Callable[[Sequence[int]], Sequence[Example]], name: str | None = None
    ) -> Share[tuple[list[float], list[float]]]:
        """log π and log π_start of every response of the examples of each of this process's batches.

        Args:
            examples_of: The examples at the places of one batch.
            name: Shown beside a progress bar.
        """
        data = data_module_of(self.module.trainer)
        on_shards = data is not None and data.recorder.on_shards

        def compute(examples: Sequence[Example]) -> list[tuple[list[float], list[float]]]:
            both = [
                record_logps(model, model, examples, self.batch_size, on_shards=on_shards)
                for model in (self.policy, self.start)
            ]
            return list(zip(*both, strict=True))

        with computing(self.policy, on_shards), computing(self.start, on_shards):
            return compute_share(
                self.module.trainer, batches, name, lambda places: compute(examples_of(places)), lambda: compute([])
            )
