"""The weights of a model within vLLM: which are supported, how they are loaded and packed, and their proof.

On CPUs vLLM multiplies by packed copies of the weights and drops what it packed; of tied weights it then never packs
the copy of the output head again. Here it keeps the weights, and packs them after each load. The proof covers both: the
sums of all weights, and the products of each packed layer with unit vectors, which are columns of its weight.

With tensor parallelism each worker holds a share of most weights, and a copy of the others. The sums of all workers are
those of the whole model, if each copy is counted once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.data.samplers.weights import weight_sums

CHECKED_COLUMNS = 4
"""Columns of each packed weight that the proof reads: one training step changes thousands of their numbers."""


class ModelWeights:
    """The weights of one worker's model. Make it before vLLM loads the model.

    Args:
        on_cpu: vLLM runs on CPUs.
    """

    def __init__(self, on_cpu: bool):
        self._packing = _Packing() if on_cpu else None

    def load(self, model: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take weights under the names that transformers gives them."""
        model.load_weights(weights)
        if self._packing:
            self._packing.pack()

    def sums(self, model: Any) -> tuple[int, int] | None:
        """`weight_sums` of the weights that this worker counts; None if a layer multiplies by others."""
        if self._packing and not self._packing.is_of_the_weights():
            return None
        return weight_sums(counted(model))


def remove_start_file() -> None:
    """Have the workers on CPUs delete the file through which they find each other, since vLLM never does.

    Each deletes it in the last step of its start; all have found each other by then.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker  # type: ignore[import-not-found]

    warm_up = CPUWorker.compile_or_warm_up_model

    def warm_up_and_remove(worker: Any) -> Any:
        Path(worker.distributed_init_method.removeprefix("file://")).unlink(missing_ok=True)
        return warm_up(worker)

    CPUWorker.compile_or_warm_up_model = warm_up_and_remove


def check_supported(config: Any, model: Any) -> None:
    """Check that vLLM computes with the weights of this model as they are.

    Args:
        config: vLLM's ModelConfig.

    Raises:
        ValueError: it does not.
    """
    if config.use_mla or any(weight.ndim > 2 for weight in model.parameters()):
        raise ValueError("mixtures of experts, convolutions and latent attention are not supported")


def counted(model: Any) -> Iterator[Tensor]:
    """The weights that this worker counts: its share of those that are shared out, and copies if it is the first."""
    from vllm.distributed import get_tensor_model_parallel_rank as rank_of  # type: ignore[import-not-found]

    first = rank_of() == 0
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:  # tied
                continue
            seen.add(id(weight))
            share = _share(module, name, weight)
            if share is not None:
                yield share
            elif first:
                yield weight


def _share(layer: Any, name: str, weight: Tensor) -> Tensor | None:
    """The part of a weight that this worker alone has, or is the first to have; None if each worker has all of it."""
    from vllm.model_executor.layers import linear, vocab_parallel_embedding  # type: ignore[import-not-found]

    by_output = linear.ColumnParallelLinear | vocab_parallel_embedding.VocabParallelEmbedding
    by_input = isinstance(layer, linear.RowParallelLinear) and name == "weight"
    if not (isinstance(layer, by_output) or by_input) or layer.tp_size == 1:
        return None
    if isinstance(layer, linear.QKVParallelLinear) and layer.tp_rank % layer.num_kv_head_replicas:
        return weight[: layer.num_heads * layer.head_size]  # another has the same keys and values
    return weight


class _Packing:
    """Packs the weights of linear layers for vLLM's CPU kernels, and keeps the plain weights."""

    def __init__(self) -> None:
        from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

        self.layers: list[Any] = []
        self._pack: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm
        utils.dispatch_cpu_unquantized_gemm = self._keep
        utils.check_cpu_sgl_kernel = lambda *shape: False  # these kernels replace a layer's bias, too

    def _keep(self, layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear
        self.layers.append(layer)

    def pack(self) -> None:
        """Pack each weight, once if layers share it."""
        packed: dict[int, Any] = {}
        for layer in self.layers:
            first = packed.setdefault(id(layer.weight), layer)
            if first is layer:
                self._pack(layer, remove_weight=False)
            else:
                layer.cpu_linear = first.cpu_linear

    def is_of_the_weights(self) -> bool:
        """Whether each layer multiplies by the weight that it has now."""
        products = {(id(layer.weight), id(layer.cpu_linear)): layer for layer in self.layers}
        return all(map(multiplies_by_its_weight, products.values()))


def multiplies_by_its_weight(layer: Any) -> bool:
    """Whether a packed layer multiplies by the weight that it has now.

    A product with a unit vector is exact: one column of the weight plus zeros.
    """
    weight = layer.weight
    columns = torch.linspace(0, weight.shape[1] - 1, CHECKED_COLUMNS).long()
    units = torch.zeros(CHECKED_COLUMNS, weight.shape[1], dtype=weight.dtype)
    units[torch.arange(CHECKED_COLUMNS), columns] = 1
    return torch.equal(layer.cpu_linear(units, weight, None), weight[:, columns].T)
