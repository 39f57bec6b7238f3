"""The batch, and the log-probability of each of its responses.

    log π(y|x) = Σ_t log softmax(logits_t)[y_t]      over the response's tokens, its end-of-sequence token included

One function serves policy, reference and sampler. It computes a prompt once for all its responses, sends only the
positions that predict a response token through the output head, and those in chunks that the backward pass computes
again: neither logits of prompts and padding nor a tensor of [all tokens, vocabulary] is ever formed.

Shapes: B prompts, K branches (responses) of each, P prompt tokens, R response tokens, N = B·K rows, M response tokens
of the batch in all, H hidden units, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

HEAD_CHUNK = 1024
"""Response tokens that pass the output head at once: their float32 logits are HEAD_CHUNK × V × 4 bytes."""


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
    mismatched: bool = False

    @property
    def size(self) -> int:
        """B, the number of prompts."""
        return self.prompt_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B, K], response tokens of each branch."""
        return self.response_mask.sum(-1)

    def select(self, rows: slice) -> "PreferenceBatch":
        """The same batch with some of its prompts only."""
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def response_logps(
    model: PreTrainedModel, batch: PreferenceBatch, *, shared_prefix: bool = True, temperature: float = 1.0
) -> Tensor:
    """log π(y|x) of every response, [B, K] in float32 (float64 for a float64 model), with gradient.

    Args:
        model: A causal language model, its LoRA layers included.
        batch: Prompts must have at least one token each. Empty responses have log-probability 0.
        shared_prefix: Compute each prompt once for all its responses, side by side in one row; else one row per
            response. Not every model can (`can_share_prefix`).
        temperature: Divides the logits.
    """
    inputs, predicts = _shared_rows(batch) if shared_prefix else _single_rows(batch)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # [rows, row length, H]
    mask = batch.response_mask
    hidden_MH = hidden.flatten(0, 1)[predicts[mask]]
    token_logps_M = _token_logps(model, hidden_MH, batch.response_ids[mask], temperature)
    return token_logps_M.new_zeros(mask.shape).masked_scatter(mask, token_logps_M).sum(-1)


def _single_rows(batch: PreferenceBatch) -> tuple[dict[str, Tensor], Tensor]:
    """One row per response: its prompt, then the response, then padding.

    Returns the decoder's inputs, [B·K, P+R], and for each response token the place (in all rows laid end to end) whose
    output predicts it, [B, K, R].
    """
    B, K, R = batch.response_ids.shape
    P = batch.prompt_ids.shape[1]
    width = P + R
    prompt_lengths = batch.prompt_mask.sum(-1)[:, None, None]  # [B, 1, 1]
    places = (prompt_lengths + torch.arange(R, device=prompt_lengths.device)).expand(B, K, R)

    ids = batch.response_ids.new_zeros(B, K, width)
    ids[:, :, :P] = batch.prompt_ids[:, None]
    ids.scatter_(2, places, batch.response_ids)
    end = prompt_lengths + batch.lengths[:, :, None]
    mask = torch.arange(width, device=ids.device) < end
    rows = torch.arange(B * K, device=ids.device).view(B, K, 1)
    inputs = {"input_ids": ids.view(B * K, width), "attention_mask": mask.view(B * K, width).long()}
    return inputs, rows * width + places - 1


def _shared_rows(batch: PreferenceBatch) -> tuple[dict[str, Tensor], Tensor]:
    """One row per prompt: the prompt, then its responses, each of which sees the prompt and itself alone.

    Positions restart behind the prompt for each response. Returns as `_single_rows` does, for rows of length P + K·R.
    """
    B, K, R = batch.response_ids.shape
    P = batch.prompt_ids.shape[1]
    device = batch.prompt_ids.device
    width = P + K * R
    prompt_lengths = batch.prompt_mask.sum(-1)[:, None]  # [B, 1]
    step = torch.arange(R, device=device).repeat(K)  # [K·R], place within the response

    positions = torch.cat([torch.arange(P, device=device).expand(B, P), prompt_lengths + step], dim=1)
    real = torch.cat([batch.prompt_mask, batch.response_mask.flatten(1)], dim=1)
    part = torch.cat([torch.full((P,), -1, device=device), torch.arange(K, device=device).repeat_interleave(R)])
    order = torch.arange(width, device=device)
    visible = (part[None, :] == -1) | (part[None, :] == part[:, None])  # a key of the prompt, or of the same response
    visible = visible & (order[None, :] <= order[:, None])
    seen = visible & real[:, None, :] | torch.eye(width, dtype=torch.bool, device=device)  # padding sees itself: no NaN
    inputs = {
        "input_ids": torch.cat([batch.prompt_ids, batch.response_ids.flatten(1)], dim=1),
        "attention_mask": seen[:, None],  # [B, 1, row, row]
        "position_ids": positions,
    }
    before = P + torch.arange(K * R, device=device).view(K, R) - 1
    places = torch.where(torch.arange(R, device=device) == 0, prompt_lengths[:, :, None] - 1, before)
    return inputs, torch.arange(B, device=device).view(B, 1, 1) * width + places


@torch.no_grad()
def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether the model gives the same log-probabilities with shared prompts: tried, on a few tokens.

    Some cannot: eager attention reads a mask of booleans as numbers, sliding windows need masks of their own.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    ids = torch.arange(1, 13, device=model.device) % model.config.get_text_config().vocab_size
    batch = PreferenceBatch(
        prompt_ids=ids[:5].view(1, 5),
        prompt_mask=torch.tensor([[True, True, True, True, False]], device=ids.device),
        response_ids=ids[6:].view(1, 2, 3),
        response_mask=torch.tensor([[[True, True, True], [True, True, False]]], device=ids.device),
        index=ids[:1],
    )
    windows = getattr(model.config.get_text_config(), "sliding_window", None)
    was_training = model.training
    model.eval()
    try:
        shared = response_logps(model, batch)
        single = response_logps(model, batch, shared_prefix=False)
    except (TypeError, ValueError, RuntimeError):  # no position_ids, another form of mask
        return False
    finally:
        model.train(was_training)
    return windows is None and torch.allclose(shared, single, rtol=0.02, atol=0.02)


def _token_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits)[target] of M tokens, [M], from their hidden states [M, H], chunk by chunk."""
    head = model.get_output_embeddings()
    assert head is not None
    config = model.config.get_text_config()

    def chunk_logps(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = _finish_logits(head(hidden_chunk), config)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        return logits.gather(-1, target_chunk[:, None]).squeeze(-1) - logits.logsumexp(-1)

    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk_logps, h, t, use_reentrant=False) for h, t in chunks])  # type: ignore[arg-type]
    return torch.cat([chunk_logps(h, t) for h, t in chunks])


def _finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What some architectures do between the output head and their logits."""
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Make sure that decoder, head and the above reproduce the model's own logits on a few tokens.

    Raises:
        NotImplementedError: the architecture does something else to its logits.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    was_training = model.training
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    ours = _finish_logits(head(hidden), model.config.get_text_config()).float() if isinstance(head, nn.Module) else None
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise NotImplementedError(
            f"{type(model).__name__} computes its logits in a way that response log-probabilities do not know: "
            "compare its forward with lit_align/logprobs.py (_finish_logits) and open an issue."
        )
