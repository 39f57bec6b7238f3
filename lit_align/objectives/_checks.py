"""Checks of arguments and of checkpoints.

Shapes are checked where a tensor enters a loss, so that broadcasting never hides a mistake.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import UserError, amount
from lit_align.logprobs import PreferenceBatch
from lit_align.model_options import from_fields
from lit_align.objectives.accumulation import weighted_mean
from lit_align.policy import PolicyConfig

FIXES = {
    "policy": "Write PolicyConfig(path).",
    "lora": "Write LoRAConfig(r=16).",
    "optimizer": "It makes the optimizer once the model is loaded. Write lambda parameters: "
    "torch.optim.AdamW(parameters, lr=1e-5).",
}
"""Fixes of wrong arguments of an objective."""


def check_shape(argument: str, tensor: Tensor | None, *needed: int | str) -> None:
    """Raise unless the tensor has the shape needed: `check_shape("labels", labels, logps.shape[0])`.

    A number must match exactly; a string stands for any size ("B"), or for any size from a minimum ("K>=2"). None
    passes, for an optional argument.
    """

    def fits(size: int, need: int | str) -> bool:
        return size == need if isinstance(need, int) else size >= int(need.partition(">=")[2] or 0)

    if tensor is not None and not (tensor.ndim == len(needed) and all(map(fits, tensor.shape, needed))):
        shape = ", ".join(map(str, needed))
        raise ValueError(f"`{argument}` has shape {list(tensor.shape)}, but needs [{shape}].")


def checked_policy(objective: str, policy: PolicyConfig | Mapping[str, Any]) -> PolicyConfig:
    """The policy that an objective passes on to its base class; a mapping of its fields becomes a PolicyConfig.

    Raises:
        UserError: it is something else.
    """
    policy = from_fields(PolicyConfig, policy)
    if not isinstance(policy, PolicyConfig):
        raise UserError(
            f"{objective} must pass a PolicyConfig to its base class, which got {type(policy).__name__}. Write "
            "`def __init__(self, policy: PolicyConfig, **kwargs)`, with this annotation, and "
            "`super().__init__(policy, **kwargs)`."
        )
    return policy


def check_batch(batch: object) -> None:
    """Check that a training batch is a `PreferenceBatch` whose tensors fit together, or several by name.

    Raises:
        UserError: names the first tensor that does not fit, with its shape and the one that it needs.
    """
    batches = batch if isinstance(batch, Mapping) and "preferences" in batch else {"": batch}
    for name, each in batches.items():
        where = f"the training batch of {name!r}" if name else "the training batch"
        if not isinstance(each, PreferenceBatch):
            raise UserError(
                f"{where} must be a lit_align.data.PreferenceBatch, and is of type {type(each).__name__}. Make a "
                "PreferenceBatch of its tensors in the data module."
            )
        try:
            _check_shapes(each)
        except ValueError as error:
            raise UserError(f"{where}: {error} Change it in the data module.") from error


def _check_shapes(batch: PreferenceBatch) -> None:
    check_shape("response_ids", batch.response_ids, "B>=1", "K>=1", "R")
    B, K, R = batch.response_ids.shape
    check_shape("prompt_ids", batch.prompt_ids, B, "P>=1")
    check_shape("prompt_mask", batch.prompt_mask, *batch.prompt_ids.shape)
    check_shape("response_mask", batch.response_mask, B, K, R)
    check_shape("index", batch.index, B)
    check_shape("weights", batch.weights, B)
    if batch.weights is not None and not (batch.weights >= 0).all():
        wrong = batch.weights[~(batch.weights >= 0)][0].item()
        raise ValueError(f"`weights` holds {wrong}, but needs numbers of at least 0.")
    check_shape("reference_logps", batch.reference_logps, B, K)
    labels, own = batch.labels, K - batch.mismatched  # of responses to the batch's own prompts
    one_per_pair = labels is not None and labels.ndim == 1 and not batch.mismatched
    check_shape("labels", labels, *((B,) if one_per_pair else (B, own)))
    for name, values in {
        "sampler_logps": batch.sampler_logps,
        "rewards": batch.rewards,
        "win_probabilities": batch.win_probabilities,
    }.items():
        if values is not None and values.shape != (B, own):
            check_shape(name, values, B, K)
    for name, mask in {"prompt_mask": batch.prompt_mask, "response_mask": batch.response_mask}.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"`{name}` is of type {mask.dtype}, but needs torch.bool.")


def check_state_dict(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds exactly the weights of a module.

    Args:
        ours: The module's weights.
        theirs: The checkpoint's weights.

    Raises:
        UserError: a weight is missing, unknown, or has another shape.
    """
    if different := ours.keys() ^ theirs.keys():
        raise UserError(
            "this checkpoint belongs to another model or configuration: "
            f"{amount(len(different), 'weights')} without a counterpart, such as {sorted(different)[0]!r}. "
            "Resume with the configuration that made it."
        )
    for name, value in theirs.items():
        if isinstance(value, Tensor) and value.shape != ours[name].shape:
            raise UserError(
                f"this checkpoint belongs to another model or configuration: {name} has the shape {tuple(value.shape)} "
                f"there and {tuple(ours[name].shape)} here. Resume with the configuration that made it."
            )


def check_losses(losses: Tensor, batch: PreferenceBatch, step: int, source: str = "this round's data") -> None:
    """Check that each example of a batch has a loss, and that their mean is finite.

    Args:
        losses: [B], loss of each example.
        source: Where the examples are from, for the message.

    Raises:
        UserError: one is not; names the shape, or the examples.
    """
    if losses.shape != (batch.size,):
        raise UserError(
            f"loss must return one value per example, [{batch.size}], but returns shape {list(losses.shape)}. "
            "Leave out its mean or sum."
        )
    loss = weighted_mean(losses.detach(), batch.weights)
    if not torch.isfinite(loss):
        rows = batch.index[~torch.isfinite(losses.detach())].tolist()
        if not rows and batch.weights is not None:
            raise UserError(
                f"step {step}: the weights of examples {batch.index.tolist()} of {source} sum to "
                f"{batch.weights.sum().item():g}, so they have no mean. Leave such a batch out in the data module."
            )
        raise UserError(
            f"the loss of step {step} is {loss.item()}, from examples {rows} of {source}. "
            "Lower the learning rate or clip gradients (trainer.gradient_clip_val), or take them out."
        )
