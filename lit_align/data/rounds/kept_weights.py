"""The weights that sample a round, kept in its folder while the policy trains on."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_align.files import writing
from lit_align.policy import Policy
from lit_align.sharding import first_with_all, full_tensor, local_shard, on_first, reshard, write_whole_weight


class KeptWeights:
    """The trained weights of a policy at one step: all of them, or an adapter's.

    A file for each, so that no process ever holds more than one whole weight of a sharded policy.

    Args:
        folder: The round's folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / "weights"
        self._beside = folder / ".weights"  # incomplete

    @property
    def exist(self) -> bool:
        """Whether they are kept. Every process must ask."""
        return on_first(self.path.is_dir)

    def keep(self, policy: Policy) -> None:
        """Write the policy's present weights, unless weights are kept. Every process must call it."""
        if self.exist:
            return
        reshard(policy)
        weights = ((name, full_tensor(weight)) for name, weight in policy.trainable_weights())
        with torch.no_grad():
            first_with_all(weights, self._write)

    def _write(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        shutil.rmtree(self._beside, ignore_errors=True)  # of a killed run
        with writing(self._beside):
            self._beside.mkdir()
            for name, weight in weights:
                save_file({"weight": weight.detach().contiguous()}, self._beside / name)
            os.replace(self._beside, self.path)

    @contextmanager
    def given_to(self, policy: Policy) -> Iterator[None]:
        """Within this context, the policy has the kept weights; afterwards its own again."""
        own = [local_shard(weight).detach().clone() for weight in self._weights(policy).values()]
        try:
            with torch.no_grad():
                for name, weight in self._weights(policy).items():
                    write_whole_weight(weight, load_file(self.path / name)["weight"])
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self._weights(policy).values(), own, strict=True):
                    local_shard(weight).copy_(value)

    def _weights(self, policy: Policy) -> dict[str, Tensor]:
        reshard(policy)
        return dict(policy.trainable_weights())

    def remove(self) -> None:
        """Remove them, also those of a killed run."""
        if self.path.is_dir():
            os.replace(self.path, self._beside)
        shutil.rmtree(self._beside, ignore_errors=True)
