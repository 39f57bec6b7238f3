"""A stand-in for an accelerator that is not NVIDIA's: it has no float64, as Apple's GPUs.

Its tensors are on the device "other", and their values on the CPU. What such a device refuses raises an error here:
float64, and tensors of two devices in one operation. Import it in a process of its own, since torch registers the
device for good.
"""

from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

# operations whose indices may be on the CPU, and copies between devices
_MIXED = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::_index_put_impl_", "aten::set_")


class _Backend(backend_registration._DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def is_autocast_enabled(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None: ...


backend_registration._setup_privateuseone_for_python_backend("other", backend_module=_Backend())
torch._C._set_multithreading_enabled(False)  # type: ignore[attr-defined]  # backward in this thread
torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
DEVICE = torch.device("other", 0)


def _without_gradients(self: Any) -> None:
    self._grad = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)


# tensors of inference mode cannot be wrapped
torch.inference_mode.__enter__ = _without_gradients  # type: ignore[method-assign]
torch.inference_mode.__exit__ = lambda self, *error: self._grad.__exit__(*error)  # type: ignore[method-assign]


class _Elsewhere(Tensor):
    """A tensor on the device; `values` is on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "_Elsewhere":
        if values.dtype == torch.float64:
            raise TypeError("this device has no float64")
        place = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=DEVICE, **place)  # type: ignore[attr-defined]
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.values} on {DEVICE}"

    def __deepcopy__(self, memo: Any) -> "_Elsewhere":
        return type(self)(self.values.clone()).requires_grad_(self.requires_grad)

    def tolist(self) -> Any:
        return self.values.tolist()


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation, on the CPU's values. Its results are on the device that it names, or that of its inputs."""
    leaves = tree_leaves((args, kwargs))
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, _Elsewhere)]
    others = [each for each in tensors if not isinstance(each, _Elsewhere) and each.dim()]
    if ours and others and not func.name().startswith(_MIXED):
        raise RuntimeError(f"{func.name()}: tensors on {DEVICE} and on the CPU")
    there = bool(ours)
    if func.name() == "aten::copy_":
        there = isinstance(args[0], _Elsewhere)
    for each in leaves:
        if isinstance(each, torch.device):
            there = each.type == DEVICE.type
    known = {id(each.values): each for each in ours}  # what an operation in place returns

    def there_again(result: Any) -> Any:
        if not there or not isinstance(result, Tensor):
            return result
        if id(result) not in known:
            return _Elsewhere(result)
        assert result.shape == known[id(result)].shape, f"{func.name()} resizes its output: make it in one step"
        return known[id(result)]

    def here(argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return argument.values if isinstance(argument, _Elsewhere) else argument

    args, kwargs = tree_map(here, (args, kwargs))
    return tree_map(there_again, func(*args, **kwargs))


_library = torch.library.Library("aten", "IMPL")
for _operation in (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten._copy_from.default,
    torch.ops.aten._to_copy.default,
):
    _library.impl(
        _operation.name().removeprefix("aten::"),
        lambda *args, _operation=_operation, **kwargs: _compute(_operation, args, kwargs),
        "PrivateUse1",
    )


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None: ...


def strategy() -> SingleDeviceStrategy:
    """Lightning's strategy for training on this device."""
    return SingleDeviceStrategy(device=DEVICE, accelerator=_Accelerator())
