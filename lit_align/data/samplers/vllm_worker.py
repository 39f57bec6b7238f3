"""An extension of the workers of a vLLM server: they take the policy's weights, and prove that they have them.

vLLM imports this module in each worker before it loads the model, and mixes `PolicyReceiver` into the worker's class. A
training process calls the methods over the server's `/collective_rpc`, so that arguments and results are plain values.
"""

import traceback
from typing import Any

import torch
from vllm.platforms import current_platform  # type: ignore[import-not-found]

from lit_align import __version__
from lit_align.data.samplers.transfer import Transfer, receive
from lit_align.data.samplers.vllm_weights import ModelWeights, check_supported, remove_start_file
from lit_align.dtypes import dtype_name
from lit_align.errors import first_line
from lit_align.sharding import drain

_weights = ModelWeights(on_cpu=current_platform.is_cpu())
if current_platform.is_cpu():
    remove_start_file()
_token: str | None = None  # names the weights that the model has; None if they are not a policy's


class PolicyReceiver:
    """Methods of a worker."""

    rank: int
    device: torch.device
    model_runner: Any
    vllm_config: Any

    def policy_worker(self) -> dict[str, Any]:
        """The properties of this worker that the training process checks."""
        parallel = self.vllm_config.parallel_config
        return {
            "version": __version__,
            "dtype": dtype_name(self.vllm_config.model_config.dtype),
            "longest": self.vllm_config.model_config.max_model_len,
            "workers": parallel.tensor_parallel_size,
            "other_parallelism": parallel.pipeline_parallel_size * parallel.data_parallel_size > 1,
        }

    def policy_receive(self, transfer: dict[str, Any], token: str) -> str | None:
        """Take new weights, which `token` names; what has failed, since an exception would not reach the sender."""
        global _token
        _token = None
        model, weights = self.model_runner.get_model(), receive(Transfer(**transfer), 1 + self.rank, self.device)
        try:
            check_supported(self.vllm_config.model_config, model)
            _weights.load(model, weights)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            drain(weights)
        _token = token
        return None

    def policy_token(self) -> str | None:
        """The name of the weights that the model has."""
        return _token

    def policy_sums(self) -> list[int] | None:
        """The sums of the weights that this worker counts; None if a layer multiplies by others."""
        sums = _weights.sums(self.model_runner.get_model())
        return None if sums is None else [*sums]
