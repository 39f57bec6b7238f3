"""One round ahead: while the policy trains on a round, a thread samples the next one.

    step          0                       s₁                      s₂
    training      │ round 0               │ round 1               │ round 2
    sampling      │ round 1 with θ(0)     │ round 2 with θ(s₁)    │ round 3 with θ(s₂)

Round 0 is sampled first, with θ(0). At the start of each round the sampler takes the policy's weights, which are also
kept in the next round's folder (`kept_weights.py`). The thread stores responses as they come. Meanwhile the policy
takes the weights kept for the present round for a moment, computes log π_s of its responses, and then trains. If some
of them are missing, they are sampled before the sampler takes other weights. So a killed run repeats nothing that is
stored, and all numbers are those of the weights that sampled.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lit_align.console import phase, print_line
from lit_align.data.rounds.sample import RoundSamples
from lit_align.data.samplers.base import EngineLost, Sampler
from lit_align.errors import UserError
from lit_align.policy import Policy
from lit_align.sharding import barrier_with_timeout


def check_samples_ahead(sampler: Sampler, rounds_ahead: int) -> None:
    """Check that a sampler can sample while the policy trains, if it is to.

    Raises:
        UserError: it cannot.
    """
    if rounds_ahead and not sampler.samples_ahead:
        raise UserError(
            f"data.rounds_ahead=1 does not work with data.sampler={type(sampler).__name__}, which cannot sample while "
            "the policy trains. Use GenerateSampler, VLLMSampler or VLLMServerSampler."
        )


class SamplingAhead:
    """Samples rounds in a thread of this process, one at a time."""

    def __init__(self) -> None:
        self._sampling: _SamplerThread | None = None

    def start(self, samples: RoundSamples) -> None:
        """Begin to sample this process's share of a round, with the weights that it is to be sampled with.

        Every process must call it. Nothing happens if the round is being sampled, or stored.
        """
        if self._sampling is not None:
            return
        missing = samples.missing()
        recorder = samples.recorder
        barrier_with_timeout(f"{samples.store.path.name}, ahead", recorder.wait_minutes)  # all have looked
        if not missing:
            return
        samples.prepare_ahead()
        trainer = recorder.module.trainer
        self._sampling = _SamplerThread(samples, missing[trainer.global_rank :: trainer.world_size])
        self._sampling.start()

    @contextmanager
    def lend(self, sampler: Sampler, policy: Policy, dtype: torch.dtype, longest: int) -> Iterator[Sampler]:
        """Within this context, the sampler has a policy's weights; see `Sampler.load`. Every process must call it.

        A round that is sampled with these weights continues meanwhile; with others, it is finished first.
        """
        samples = self._sampling.samples if self._sampling else None
        if samples and policy is samples.policy and samples.has_present_weights:
            yield sampler
            return
        self.finish()
        with sampler.ready(policy, dtype, longest):
            yield sampler

    def finish(self) -> float:
        """Wait until this process's share is sampled, and return the seconds that it took.

        A lost engine ends it early: what is missing is sampled later.

        Raises:
            BaseException: sampling failed otherwise.
        """
        if self._sampling is None:
            return 0.0
        started, sampling = time.monotonic(), self._sampling
        if sampling.is_alive():
            with phase("sample", len(sampling.numbers), "batches, one round ahead", done=sampling.done) as bar:
                shown = sampling.done
                while sampling.is_alive():
                    sampling.join(0.1)
                    bar.advance(sampling.done - shown)
                    shown = sampling.done
        self.cancel()
        if isinstance(sampling.failure, EngineLost):
            print_line(f"  {sampling.failure}; the rest of the round is sampled now.")
        elif sampling.failure is not None:
            raise sampling.failure
        return time.monotonic() - started

    def cancel(self) -> None:
        """End the thread after its present batch, and free what the sampler can."""
        if self._sampling is not None:
            self._sampling.cancelled.set()
            self._sampling.join()
            self._sampling.samples.sampler.release()
        self._sampling = None


class _SamplerThread(threading.Thread):
    """Samples batches of a round and stores them.

    Args:
        numbers: Numbers of the batches.
    """

    def __init__(self, samples: RoundSamples, numbers: Sequence[int]):
        super().__init__(name="sampling ahead", daemon=True)
        self.samples = samples
        self.numbers = numbers
        self.done = 0
        self.cancelled = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            if self.samples.policy.device.type == "cuda":
                torch.cuda.set_device(self.samples.policy.device)  # each thread has its own
            for number in self.numbers:
                if self.cancelled.is_set():
                    return
                self.samples.draw(number)
                self.done += 1
        except BaseException as error:
            self.failure = error
