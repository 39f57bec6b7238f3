"""The samples of a round: K responses to each prompt, with log π_s, sampled when the round begins or one round ahead.

Ahead, batches are stored as `drawn`, without log π_s. When the round begins, its samples are the drawn rows and those
that are sampled now, all with log π_s.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lit_align.data.batches import Example
from lit_align.data.rounds.current import CurrentRound
from lit_align.data.rounds.kept_weights import KeptWeights
from lit_align.data.rounds.recorder import Computation, Recorder
from lit_align.data.rounds.row_types import SampleRow
from lit_align.data.rounds.store import RoundStore
from lit_align.data.samplers.base import Sampler
from lit_align.data.sampling import Response, SampleRequest, Sampling, check_stop, sampling_batches
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError
from lit_align.policy import Policy
from lit_align.sharding import barrier_with_timeout


@dataclass
class RoundSamples(Computation[SampleRow]):
    """Reads the stored samples of a round, and samples and stores the others."""

    round: CurrentRound
    store: RoundStore
    recorder: Recorder
    prompts: ExampleTable  # without responses
    sampler: Sampler
    sampling: Sampling
    sampling_dtype: torch.dtype
    longest: int  # most tokens of a prompt and its response, in all rounds
    end_ids: list[int]
    seed: int
    responses_per_prompt: int
    prompts_per_batch: int
    record_sampler: bool

    _is_sampling = False  # whether the sampler is ready; it is not needed if all batches are drawn

    @property
    def policy(self) -> Policy:
        policy = self.recorder.module.policy
        assert policy is not None
        return policy

    @cached_property
    def batches(self) -> list[list[int]]:
        """Indices of the prompts that are sampled, scored and stored together."""
        return sampling_batches(self.prompts.lengths.prompt.tolist(), self.prompts_per_batch)

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.check_policy()
        with ExitStack() as stack:
            self._is_sampling = bool(self.missing())
            if self._is_sampling:
                check_stop(self.sampling.stop, self.policy.tokenizer)
                stack.enter_context(self.sampler.ready(self.policy, self.sampling_dtype, self.longest))
            stack.enter_context(self.recorder.able_to_compute(self.policy))
            yield

    def compute(self, number: int) -> list[SampleRow]:
        rows = self.store.drawn.read(number)
        if self._is_sampling:  # if the rows are drawn, other processes may still sample theirs
            sampled = self.sampler.sample_in_turn(self.policy, self._request(number) if rows is None else None)
            rows = self._rows(number, sampled) if rows is None else rows
        assert rows is not None
        if not self.record_sampler:
            return rows
        logps = self.recorder.logps(self.policy, [Example(r.prompt_ids, r.response_ids, r.source) for r in rows])
        return [replace(row, sampler_logps=each) for row, each in zip(rows, logps, strict=True)]

    def idle(self) -> None:
        if self.sampler.streams_weights:
            if self._is_sampling:
                self.sampler.sample_in_turn(self.policy, None)
            if self.record_sampler:
                self.recorder.logps(self.policy, [])

    def missing(self) -> list[int]:
        """The batches whose responses are not stored."""
        drawn, samples = self.store.drawn, self.store.samples
        numbers = range(len(self.batches))
        return [number for number in numbers if not drawn.is_stored(number) and not samples.is_stored(number)]

    def all_stored(self) -> bool:
        """Whether all responses are stored. Every process must call it, after it has stored its own."""
        barrier_with_timeout(f"{self.store.path.name}, stored", self.recorder.wait_minutes)
        return not self.missing()

    def check_policy(self) -> None:
        """Check that the policy is the one that samples this round.

        Raises:
            UserError: it is not.
        """
        if self.has_present_weights:
            return
        if self.policy.fingerprint() != self.round.key.get("policy"):
            raise UserError(
                f"the checkpoint needs the responses of round {self.round.index + 1}, sampled at step "
                f"{self.round.step}, which are no longer in {self.store.path.parent}. Restore that folder "
                "(data.store), or, without data.rounds_ahead, resume from a checkpoint at the end of an epoch."
            )

    @property
    def has_present_weights(self) -> bool:
        """Whether the present weights are those that sample the round."""
        return self.recorder.module.global_step == self.round.step

    def _request(self, number: int) -> SampleRequest:
        prompts = [self.prompts[place] for place in self.batches[number]]
        keys = [(self.seed, self.round.index, prompt.source) for prompt in prompts]
        return SampleRequest(
            prompts=[prompt.prompt_ids for prompt in prompts],
            keys=keys,
            count=self.responses_per_prompt,
            sampling=self.sampling,
            end_ids=self.end_ids,
            continued={key for key, prompt in zip(keys, prompts, strict=True) if prompt.continues},
        )

    def _rows(self, number: int, sampled: Sequence[Sequence[Response]]) -> list[SampleRow]:
        prompts = (self.prompts[place] for place in self.batches[number])
        return [_sample_row(*each) for each in zip(prompts, sampled, strict=True)]

    # --- sample ahead ---

    def prepare_ahead(self) -> None:
        """Give the sampler the weights of this round, and keep them; every process must call it."""
        if self.has_present_weights:
            self._kept.keep(self.policy)
        with self.sampling_policy():
            self.check_policy()
            check_stop(self.sampling.stop, self.policy.tokenizer)
            self.sampler.prepare(self.policy, self.sampling_dtype, self.longest)

    def draw(self, number: int) -> None:
        """Sample one batch with a prepared sampler, and store it without log π_s."""
        self.store.drawn.write(number, self._rows(number, self.sampler.sample(self.policy, self._request(number))))

    @contextmanager
    def sampling_policy(self) -> Iterator[None]:
        """Within this context, the policy has the weights that sample this round, if they are kept."""
        if self.has_present_weights or not self._kept.exist:
            yield
        else:
            with self._kept.given_to(self.policy):
                yield

    def forget_ahead(self) -> None:
        """Remove what only sampling ahead needed; the round's samples are stored."""
        if self.recorder.module.trainer.is_global_zero:
            self._kept.remove()
            for number in range(len(self.batches)):
                self.store.drawn.file(number).unlink(missing_ok=True)

    @property
    def _kept(self) -> KeptWeights:
        return KeptWeights(self.store.path)


def _sample_row(prompt: Example, responses: Sequence[Response]) -> SampleRow:
    assert prompt.prompt is not None
    return SampleRow(
        source=prompt.source,
        prompt=prompt.prompt,
        prompt_ids=prompt.prompt_ids,
        responses=[response.text for response in responses],
        response_ids=[response.ids for response in responses],
        finished=[response.finished for response in responses],
        sampler_logps=None,
        beside=prompt.beside,
    )
