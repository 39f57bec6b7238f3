"""The batch, and the log-probability of each of its responses.

    log π(y|x) = Σ_t log softmax(logits_t)[y_t]      over the response's tokens, its end-of-sequence token included

One function serves policy, reference and sampler. It computes a prompt once for all its responses (`packing.py`). Only
the positions that predict a response token pass the output head, in chunks. Their gradients are kept for the backward
pass up to a limit; beyond it, they are computed again. No logits of prompts and padding are ever formed.

Shapes: B prompts, K branches (responses) of each, P prompt tokens, R response tokens, N = B·K rows, M response tokens
in the whole batch, H hidden units, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from lit_align.blocks import skip_unread_rows
from lit_align.packing import PACKED, Packing, packed_hidden

KEPT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Memory for what the output head keeps for its backward pass; what is beyond it is computed again."""
LOGITS_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Memory for the float32 logits of one chunk of response tokens; small enough to stay in caches."""


@dataclass
class PreferenceBatch:
    """B prompts, each held once, with K response branches. Padding is on the right; masks are True on tokens.

    Branches are ordered as the objective reads them: for pairs 0 is the chosen and 1 the rejected response. Where
    `mismatched` is set, the last branch is another prompt's response (KTO's z0) and belongs to no preference.
    """

    prompt_ids: Tensor  # [B, P] int64
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, K, R] int64
    response_mask: Tensor  # [B, K, R] bool
    index: Tensor  # [B] int64, the example's number in its data set, for messages that name a row
    reference_logps: Tensor | None = None  # [B, K] float32, recorded log π_ref
    sampler_logps: Tensor | None = None  # [B, K] float32, recorded log π_s
    rewards: Tensor | None = None  # [B, K] float32
    labels: Tensor | None = None  # [B] probability that branch 0 wins, or [B, K] 1 = desirable (KTO)
    win_probabilities: Tensor | None = None  # [B, K] P(y ≻ π_s)
    weights: Tensor | None = None  # [B] float32, of each prompt in the loss and in all means; None is 1
    mismatched: bool = False

    @property
    def size(self) -> int:
        """B, the number of prompts."""
        return self.prompt_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B, K], response tokens of each branch."""
        return self.response_mask.sum(-1)

    @cached_property
    def packing(self) -> Packing:
        """The layout of its tokens as one row, computed once for policy and reference."""
        return Packing.of(self.prompt_ids, self.prompt_mask, self.response_mask)

    @cached_property
    def token_places(self) -> Tensor:
        """[M], places of the response tokens among all B·K·R."""
        return self.response_mask.flatten().nonzero().squeeze(1)

    def pinned(self) -> "PreferenceBatch":
        """The batch in page-locked memory, with the layout of its tokens."""
        pinned = self._mapped(Tensor.pin_memory)
        vars(pinned).update(packing=self.packing.pinned(), token_places=self.token_places.pin_memory())
        return pinned

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        """The batch on a device. A layout that it has goes with it, since the device would wait for one of its own."""
        device = torch.device(device)
        moved = self._mapped(lambda value: value.to(device, non_blocking=True))
        if "packing" in vars(self):
            vars(moved)["packing"] = self.packing.to(device)
        if "token_places" in vars(self):
            vars(moved)["token_places"] = self.token_places.to(device, non_blocking=True)
        return moved

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "PreferenceBatch":
        """A batch of the function's values for each tensor."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: function(value) for name, value in values if isinstance(value, Tensor)})

    def select(self, rows: slice) -> "PreferenceBatch":
        """The batch of some of its prompts only."""
        return self._mapped(lambda value: value[rows])


def preferences_of(batch: object) -> PreferenceBatch | None:
    """The preferences in a training batch, which may have texts beside them; None in another project's batch."""
    preferences = batch.get("preferences") if isinstance(batch, Mapping) else batch
    return preferences if isinstance(preferences, PreferenceBatch) else None


def response_logps(model: PreTrainedModel, batch: PreferenceBatch, *, temperature: float = 1.0) -> Tensor:
    """log π(y|x) of every response, [B, K] in float32 (float64 for a float64 model), with gradient.

    Args:
        model: A causal language model, its LoRA layers included.
        batch: Prompts must have at least one token each. Empty responses have log-probability 0.
        temperature: Divides the logits.
    """
    hidden, places = hidden_states(model, batch)
    predicting = hidden[places[:, :, :-1].flatten()[batch.token_places]]  # [M, H]
    targets = batch.response_ids.flatten()[batch.token_places]
    token_logps_M = _token_logps(model, predicting, targets, temperature)
    by_token = token_logps_M.new_zeros(batch.response_mask.numel()).index_copy(0, batch.token_places, token_logps_M)
    return by_token.view(batch.response_mask.shape).sum(-1)


def hidden_states(model: PreTrainedModel, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """The decoder's output, and the places of each response's tokens in it.

    The batch is one row without padding if the model shares prefixes (`enable_prefix_sharing`); otherwise each response
    has a row of its own, after its prompt.

    Returns:
        [tokens, H], and the places of each prompt's last token and of the response tokens after it, [B, K, 1 + R].
    """
    if model.config._attn_implementation == PACKED:
        return packed_hidden(model, batch.prompt_ids, batch.response_ids, batch.packing), batch.packing.response_places
    inputs, places = single_rows(batch)
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1), places


def single_rows(batch: PreferenceBatch) -> tuple[dict[str, Tensor], Tensor]:
    """One row per response: its prompt, then the response, then padding.

    Returns the decoder's inputs, [N, P+R], and the places as `hidden_states` does.
    """
    B, K, R = batch.response_ids.shape
    P = batch.prompt_ids.shape[1]
    width = P + R
    prompt_lengths = batch.prompt_mask.sum(-1)[:, None, None]  # [B, 1, 1]
    columns = (prompt_lengths + torch.arange(-1, R, device=prompt_lengths.device)).expand(B, K, 1 + R)

    ids = batch.response_ids.new_zeros(B, K, width)
    ids[:, :, :P] = batch.prompt_ids[:, None]
    ids.scatter_(2, columns[:, :, 1:], batch.response_ids)
    end = prompt_lengths + batch.lengths[:, :, None]
    mask = torch.arange(width, device=ids.device) < end
    rows = torch.arange(B * K, device=ids.device).view(B, K, 1)
    inputs = {"input_ids": ids.view(B * K, width), "attention_mask": mask.view(B * K, width).long()}
    return inputs, rows * width + columns


def enable_prefix_sharing(model: PreTrainedModel) -> bool:
    """Let the model compute each prompt once for all its responses (`packing.py`), if that leaves its output the same.

    This is tried on a few tokens. It fails for eager attention, for models with their own attention (ALiBi) and for
    recurrent states. Returns whether the model shares prefixes now.
    """
    config = model.config.get_text_config()
    if model.config._attn_implementation != "sdpa" or getattr(config, "attention_chunk_size", None):
        return model.config._attn_implementation == PACKED
    ids = torch.arange(1, 13, device=model.device) % config.vocab_size
    batch = PreferenceBatch(
        prompt_ids=ids[:5].view(1, 5),
        prompt_mask=torch.tensor([[True, True, True, True, False]], device=ids.device),
        response_ids=ids[6:].view(1, 2, 3),
        response_mask=torch.tensor([[[True, True, True], [True, True, False]]], device=ids.device),
        index=ids[:1],
    )

    @torch.no_grad()
    def tokens() -> Tensor:
        hidden, places = hidden_states(model, batch)
        return hidden[places[:, :, 1:][batch.response_mask]].cpu().double()

    # a window may be longer than these few tokens: then ask whether a layer has passed it on
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    was_training = model.training
    model.eval()
    try:
        single = tokens()
        model.set_attn_implementation(PACKED)
        skip_unread_rows(model)
        off = (tokens() - single).norm() / single.norm()
        same = off.item() < max(1e-4, 6 * torch.finfo(model.dtype).eps)
        same = same and (window is None or window in batch.packing.windows)
    except (TypeError, ValueError, RuntimeError):  # the model takes no position_ids, or masks of another form
        same = False
    finally:
        model.train(was_training)
    if not same:
        model.set_attn_implementation("sdpa")
    return same


def _token_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits)[target] of M tokens, [M], from their hidden states [M, H], chunk by chunk."""
    config = model.config.get_text_config()
    device, element = hidden.device.type, hidden.element_size()
    chunk = max(1, LOGITS_CHUNK_BYTES.get(device, 1 << 29) // (config.vocab_size * max(4, element)))

    def chunk_logps(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = next_token_logits(model, hidden_chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        return -cross_entropy(logits, target_chunk, reduction="none")

    head = _plain_head(model, hidden)
    if head is not None:
        factor = _logit_factor(config) / temperature
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()  # keeps nothing then
        chunk_logps = partial(_HeadLogps.apply, weight, factor, chunk)  # type: ignore[assignment]
        chunk *= max(1, KEPT_BYTES.get(device, 1 << 30) // (config.vocab_size * element * chunk))
    chunks = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([chunk_logps(h, t) for h, t in chunks])
    kept = [chunk_logps(h, t) for h, t in chunks[:1]] if head is not None else []
    return torch.cat(kept + [checkpoint(chunk_logps, h, t, use_reentrant=False) for h, t in chunks[len(kept) :]])  # type: ignore[arg-type]


class _HeadLogps(torch.autograd.Function):
    """log softmax(factor · hidden weightᵀ)[target], [M], which keeps the logits' gradient for its backward pass.

    So the backward pass needs no logits, and one product for all tokens, whose sums are in float32.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float, chunk: int, hidden: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keeps = any(ctx.needs_input_grad)
        slopes = hidden.new_empty(len(hidden) if keeps else 0, len(weight))  # softmax − 1 at the target, [M, V]
        logps = []
        for start in range(0, len(hidden), chunk):
            rows, some = slice(start, start + chunk), targets[start : start + chunk, None]
            logits = hidden[rows] @ weight.T
            logits = logits if factor == 1 else logits.to(wide).mul_(factor)
            every = logits.log_softmax(-1, dtype=wide) if logits.is_cuda else logits.to(wide).log_softmax(-1)
            logps.append(every.gather(1, some)[:, 0])
            if keeps:
                _write_slopes(slopes[rows], every, some)
        ctx.save_for_backward(weight, hidden, slopes)
        ctx.factor = factor
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, hidden, slopes = ctx.saved_tensors
        scale = (grads[0] * -ctx.factor)[:, None]
        to_hidden = ((slopes @ weight) * scale).to(hidden.dtype)
        to_weight = slopes.T @ (hidden * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        return to_weight, None, None, to_hidden, None


def _write_slopes(slopes: Tensor, logps: Tensor, targets: Tensor) -> None:
    """slopes ← softmax − 1 at the target, from log-probabilities [rows, V] that are not needed afterwards."""
    if logps.is_cuda:  # one pass, which rounds what it writes
        at_target = logps.gather(1, targets).expm1()
        torch.exp(logps, out=slopes).scatter_(1, targets, at_target.to(slopes.dtype))
    else:
        slopes.copy_(logps.exp_().scatter_add_(1, targets, logps.new_full(targets.shape, -1.0)))


def _plain_head(model: PreTrainedModel, hidden: Tensor) -> nn.Linear | None:
    """The output head, if `_HeadLogps` computes what it does: a plain matrix of the hidden states' type."""
    head = model.get_output_embeddings()
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if type(head) is not nn.Linear or head.bias is not None or capped or torch.is_autocast_enabled(hidden.device.type):
        return None
    return head if type(head.weight) is nn.Parameter and head.weight.dtype == hidden.dtype else None


def next_token_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits, [*, V], from the decoder's output, [*, H]: the head's, which some models scale or cap."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    assert head is not None
    logits, factor = head(hidden), _logit_factor(config)
    logits = logits if factor == 1 else logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


def _logit_factor(config: PretrainedConfig) -> float:
    """The factor of an architecture's logits: Cohere's `logit_scale`, Granite's 1 / `logits_scaling`."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Check that decoder and `next_token_logits` reproduce the model's own logits on a few tokens.

    Raises:
        NotImplementedError: the architecture computes its logits in another way.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    was_training = model.training
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    has_head = isinstance(model.get_output_embeddings(), nn.Module)
    ours = next_token_logits(model, hidden).float() if has_head else None
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise NotImplementedError(
            f"{type(model).__name__} computes its logits in a way that lit_align does not support. Compare its "
            "forward with lit_align/logprobs.py (next_token_logits) and open an issue."
        )
