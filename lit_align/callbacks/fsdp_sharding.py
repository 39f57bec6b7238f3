"""Sharding with FSDP2: each process holds a share of all weights, gradients and optimizer states.

The callback owns the plan and applies it; the strategy (`strategy: fsdp2`) owns processes and checkpoints. Every
transformer block is gathered by itself when it computes, and freed afterwards; weights outside the blocks (embedding,
last norm, output head) are gathered with the root. The reference is sharded like the policy, so that a refresh works
shard by shard.

    trainer: {strategy: fsdp2, devices: 8}
    fsdp_sharding: {compute_dtype: bfloat16}
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lit_align.blocks import blocks_of
from lit_align.callbacks.base import AlignCallback, DryRun
from lit_align.checkpoints import check_hash, check_shards, forget_hash, write_hash
from lit_align.dtypes import warn_if_slow
from lit_align.errors import UserError
from lit_align.loading import enable_checkpointing
from lit_align.objectives import PreferenceObjective
from lit_align.quantization import holds_quantized
from lit_align.reference.base import Reference
from lit_align.sharding import fsdp_modules, lazy_weights, load_shards, settle


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with all processes on the data-parallel axis.

    By default Lightning puts the processes of a node on the tensor-parallel axis. Every process would then silently
    hold all weights and see the same batches.

    Args:
        save_distributed_checkpoint: Save checkpoints as folders of shards, for models that do not fit into one
            process's memory. Off, a checkpoint is one file, from which a run on any number of processes can resume.
        process_group_backend: gloo, nccl, ...; None chooses by the device.
    """

    strategy_name = "fsdp2"

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None):
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup(self, trainer: Trainer) -> None:
        """Set up the processes.

        Raises:
            UserError: nothing shards the module. Every process would train a model of its own.
        """
        if not any(isinstance(callback, FSDPSharding) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "trainer.strategy=fsdp2 shards nothing without fsdp_sharding. Use --config configs/overlays/fsdp.yaml."
            )
        super().setup(trainer)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save as the base class does, and write the hash file of a folder of shards."""
        path = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            forget_hash(path)
        super().save_checkpoint(checkpoint, path, storage_options)
        if self._save_distributed_checkpoint:
            self.barrier()
            if self.is_global_zero:
                write_hash(path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states, from shards or from one file; return the rest."""
        path = Path(self.broadcast(str(checkpoint_path)))
        check_hash(path)
        if path.is_dir():
            check_shards(path)
            return super().load_checkpoint(path, weights_only)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        module = self.lightning_module
        assert module is not None
        if isinstance(module, PreferenceObjective):
            module.adapt_checkpoint(checkpoint)
            module.check_state_dict(checkpoint["state_dict"])
        weights = checkpoint.pop("state_dict")
        load_shards(module, weights)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            load_optimizer(module, optimizer, saved)
        return checkpoint


def load_optimizer(module: nn.Module, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a whole optimizer state from a checkpoint's file; each process takes its shard.

    Lightning reads the numbers of the weights in it as positions among all weights of the module, which is wrong where
    some are frozen. Here they number the optimizer's own weights.
    """
    if not saved["state"]:  # plain SGD has none, and torch would not know its device
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group |= {key: value for key, value in values.items() if key != "params"}
        return
    names = {weight: name for name, weight in module.named_parameters()}
    ours = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    theirs = [number for group in saved["param_groups"] for number in group["params"]]
    name_of = dict(zip(theirs, ours, strict=True))
    state = {
        "state": {name_of[number]: value for number, value in saved["state"].items()},
        "param_groups": [
            group | {"params": [name_of[number] for number in group["params"]]} for group in saved["param_groups"]
        ],
    }
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, all processes data-parallel")


class FSDPSharding(AlignCallback):
    """Shard every network of the module: policy, reference, and any other child.

    Works on any LightningModule that builds its networks in `configure_model`.

    Args:
        blocks: Class names of the parts that are gathered one at a time; None takes those that transformers names for
            the model.
        compute_dtype: Type of the gathered weights and of computation; None is the weights' own. Shards and
            the optimizer keep their type; gradients are reduced in float32.
        activation_checkpointing: Recompute activations in the backward pass.
        cpu_offload: Keep shards in CPU memory until they are needed.
    """

    option_name = "fsdp_sharding"
    in_dry_run = DryRun.ACT

    def __init__(
        self,
        blocks: list[str] | None = None,
        compute_dtype: Literal["bfloat16", "float16"] | None = None,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
    ):
        if blocks is not None and not blocks:
            raise UserError(
                "fsdp_sharding.blocks=[] must name classes. Leave it out to take those that transformers names."
            )
        self.blocks = blocks
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header: label and value."""
        if self.compute_dtype is not None:
            yield "sharded", f"computes in {self.compute_dtype}"
            yield from warn_if_slow(getattr(torch, self.compute_dtype), "fsdp_sharding.compute_dtype=null")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange that networks are sharded as soon as they are built, since the optimizer is made next."""
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            name = getattr(trainer.strategy, "strategy_name", type(trainer.strategy).__name__)
            raise UserError(
                f"trainer.strategy={name} must be fsdp2 for fsdp_sharding. Set it, or leave the callback out."
            )
        if trainer.strategy._data_parallel_size == 1 < trainer.world_size:  # Lightning's own default
            raise UserError(
                f"fsdp_sharding: the strategy puts all {trainer.world_size} processes on the tensor-parallel axis, "
                "where nothing would be sharded. Set trainer.strategy=fsdp2."
            )
        if trainer.precision == "bf16-true":
            raise UserError(
                "trainer.precision=bf16-true rounds rotary frequencies too. Load the weights in bfloat16 "
                "(model.policy.dtype), or compute in it (fsdp_sharding.compute_dtype)."
            )
        if self.cpu_offload and trainer.strategy.root_device.type == "cpu":
            raise UserError("fsdp_sharding.cpu_offload=true has no effect on CPUs. Leave it out.")
        if type(pl_module).configure_model is LightningModule.configure_model:
            raise UserError(
                f"fsdp_sharding: {type(pl_module).__name__} builds its networks in __init__. Build them in "
                "`configure_model`, which runs after the processes have started."
            )
        if getattr(pl_module.configure_model, "shards", False):  # setup runs once per stage
            return
        build = pl_module.configure_model

        def configure_model() -> None:
            with lazy_weights():
                build()
                self.shard(pl_module)
            if isinstance(pl_module, PreferenceObjective):
                pl_module.beside.shard = partial(self.shard_network, mesh=mesh_of(pl_module))

        configure_model.shards = True  # type: ignore[attr-defined]
        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def shard(self, pl_module: LightningModule) -> None:
        """Shard the module's networks in place, unless they are already.

        Raises:
            UserError: a network has none of the given blocks.
        """
        for network in pl_module.children():
            self.shard_network(network, mesh_of(pl_module))

    def shard_network(self, network: nn.Module, mesh: DeviceMesh) -> None:
        """Shard one network in place over the processes of a mesh, unless it is already; see `shard`."""
        if isinstance(network, Reference):
            network.before_sharding()
        if holds_quantized(network):
            raise UserError(
                "model.policy.quantize=nf4 cannot be sharded: fsdp_sharding would cut packed weights in pieces "
                "without their scales. Use strategy=ddp, where each process has all 4-bit weights, or leave "
                "quantize out."
            )
        if fsdp_modules(network) or not any(True for _ in network.parameters()):
            return
        dtype = getattr(torch, self.compute_dtype) if self.compute_dtype else None
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()

        def fully(part: nn.Module) -> None:
            settle(part)
            fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)

        models = models_of(network)
        if self.activation_checkpointing:
            for model in models:
                if any(weight.requires_grad for weight in model.parameters()):
                    enable_checkpointing(model)
        for block in self._blocks(network, models):
            fully(block)
        for model in models[1:]:  # beside the one that computes: a float32 accumulator of its weights
            fully(model)
        fully(network)
        if isinstance(network, Reference):
            register_fsdp_forward_method(network, "logps")

    def _blocks(self, net: nn.Module, models: list[PreTrainedModel]) -> list[nn.Module]:
        if self.blocks is None:
            return [block for model in models for block in blocks_of(model)]
        blocks = [part for part in net.modules() if type(part).__name__ in self.blocks]
        if not blocks:
            known = sorted({type(part).__name__ for part in net.modules()})
            raise UserError(
                f"fsdp_sharding.blocks={self.blocks}: {type(net).__name__} has none of them. Take some of {known}."
            )
        return blocks


def models_of(network: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a network that are not a part of another one."""
    models = [part for part in network.modules() if isinstance(part, PreTrainedModel)]
    within = {part for model in models for part in model.modules() if part is not model}
    return [model for model in models if model not in within]


def mesh_of(pl_module: LightningModule) -> DeviceMesh:
    """The processes over which a module's networks are sharded."""
    assert pl_module.device_mesh is not None
    return pl_module.device_mesh["data_parallel"]
