"""The contract of samplers: engines that sample a round's responses with the policy's current weights.

Before a round's first response, each proves bit by bit that its weights are the policy's (`check_weights`). No sampler
influences log π_s: the policy itself computes it from the sampled tokens.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_align.arguments import CheckedArguments
from lit_align.data.sampling import Response, SampleRequest
from lit_align.errors import UserError
from lit_align.policy import Policy
from lit_align.sharding import full_tensor, reshard


class EngineLost(UserError):
    """An engine has died or has other weights now; it may be loaded again."""


class Sampler(metaclass=CheckedArguments):
    """Samples responses. A round loads the policy's weights, samples all its batches, and frees what it can."""

    streams_weights = False
    """Whether it takes the weights one at a time and samples elsewhere: then no training process needs them all."""

    samples_ahead = False
    """Whether `sample` may run in a thread while the policy trains: of the policy it reads the tokenizer alone, and it
    neither draws from nor seeds the process's random generators."""

    @property
    def identity(self) -> str:
        """All that determines the samples except weights, prompts and `Sampling`; part of a round's key."""
        return type(self).__name__

    @abstractmethod
    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        """Take the policy's current weights; if they are sharded, every process calls it.

        Args:
            dtype: Type of the weights.
            longest: Most tokens of a prompt and its response together, in all rounds.
        """

    @abstractmethod
    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether it samples with exactly these weights, bit by bit. It reads all of them, even after a difference."""

    @abstractmethod
    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        """The responses to each prompt of one batch; the policy's tokenizer decodes them."""

    def sample_in_turn(self, policy: Policy, request: SampleRequest | None) -> list[list[Response]]:
        """The responses to this process's batch, while the others sample theirs.

        Args:
            request: None if there is no batch for this process. If it `streams_weights`, every process calls it.
        """
        return [] if request is None else self.sample(policy, request)

    @abstractmethod
    def release(self) -> None:
        """Free memory that training could use; called after a round is sampled, or fails."""

    def prepare(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        """Load the policy's current weights and check them; see `load`."""
        self.load(policy, dtype, longest)
        check_weights(self, policy, dtype)

    @contextmanager
    def ready(self, policy: Policy, dtype: torch.dtype, longest: int) -> Iterator[None]:
        """Within this context, sample with the policy's current weights."""
        try:
            self.prepare(policy, dtype, longest)
            yield
        finally:
            self.release()


@torch.no_grad()
def whole_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each of the policy's weights, merged and whole, one at a time.

    If the policy is sharded, each weight is gathered when it is read: every process must read all.
    """
    reshard(policy)
    for name, value in policy.full_weights():
        yield name, full_tensor(value).to(dtype)


def check_weights(sampler: Sampler, policy: Policy, dtype: torch.dtype) -> None:
    """Check that a sampler samples with the policy's weights.

    Raises:
        UserError: it has other weights.
    """
    if not sampler.weights_match(whole_weights(policy, dtype)):
        raise UserError(
            f"data.sampler={type(sampler).__name__} does not have the policy's weights, so its samples would be "
            "another model's. This engine does not support this model. Use GenerateSampler."
        )
