"""The batch, and the log-probability of each of its responses.

    log π(y|x) = Σ_t log softmax(logits_t)[y_t]      over the response's tokens, its end-of-sequence token included

One function serves policy, reference and sampler. It runs the decoder once, sends only the positions that predict a
response token through the output head, and those in chunks that the backward pass computes again: neither logits of
prompts and padding nor a tensor of [all tokens, vocabulary] is ever formed.

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


def response_logps(model: PreTrainedModel, batch: PreferenceBatch) -> Tensor:
    """log π(y|x) of every response, [B, K] in float32 (float64 for a float64 model), with gradient.

    Args:
        model: A causal language model, its LoRA layers included.
        batch: Prompts must have at least one token each. Empty responses have log-probability 0.
    """
    ids, mask, predicts_response = _rows(batch)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [N, P+R, H]
    token_logps_M = _token_logps(model, hidden[predicts_response], batch.response_ids[batch.response_mask])
    token_logps = token_logps_M.new_zeros(batch.response_mask.shape)
    return token_logps.masked_scatter(batch.response_mask, token_logps_M).sum(-1)


def _rows(batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """One row per response: its prompt, then the response, then padding.

    Returns token ids, mask, and the positions whose next token is a response token; each [B·K, P+R].
    """
    B, K, R = batch.response_ids.shape
    P = batch.prompt_ids.shape[1]
    prompt_lengths = batch.prompt_mask.sum(-1).repeat_interleave(K)[:, None]
    response_lengths = batch.lengths.reshape(B * K, 1)

    ids = batch.response_ids.new_zeros(B * K, P + R)
    ids[:, :P] = batch.prompt_ids.repeat_interleave(K, dim=0)
    places = prompt_lengths + torch.arange(R, device=ids.device)
    ids.scatter_(1, places, batch.response_ids.reshape(B * K, R))

    position = torch.arange(P + R, device=ids.device)
    end = prompt_lengths + response_lengths
    predicts_response = (position >= prompt_lengths - 1) & (position < end - 1)
    return ids, (position < end).long(), predicts_response


def _token_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of M tokens, [M], from their hidden states [M, H], chunk by chunk."""
    head = model.get_output_embeddings()
    assert head is not None
    config = model.config.get_text_config()

    def chunk_logps(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = _finish_logits(head(hidden_chunk), config)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
