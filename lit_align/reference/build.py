"""Choice of the cheapest correct reference for a policy, a configuration and a refresh rule."""

from contextlib import AbstractContextManager, suppress
from dataclasses import replace

import torch
from torch import nn

from lit_align.dtypes import dtype_name
from lit_align.errors import UserError
from lit_align.model_files import load_tokenizer
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reference.base import Reference
from lit_align.reference.config import ReferenceConfig, RefreshRule
from lit_align.reference.copied import CopiedReference, RecordedReference
from lit_align.reference.lora import (
    AdapterReference,
    DeltaReference,
    adapted_layers,
    delta_bytes,
    ring_bytes,
    ring_size,
)
from lit_align.sharding import Beside

SAME_TOKENS = 0.9
"""Share of the policy's tokens that a reference must have under the same numbers; fine-tuning adds or renames a few."""


def make_reference(
    policy: Policy,
    policy_config: PolicyConfig,
    lora: LoRAConfig | None,
    config: ReferenceConfig,
    rule: RefreshRule | None,
    beside: Beside = Beside(),  # noqa: B008  # read, never written
) -> Reference:
    """Build the cheapest correct reference.

    Args:
        policy: The policy at the start.
        policy_config: Its options, with which another model is loaded, too.
        lora: None if all weights are trained.
        config: The form, type and path of the reference.
        rule: How the reference moves; None if it never does.
        beside: Loads a recorded reference.

    Raises:
        UserError: the configured form is impossible or cannot follow the rule, or the model of `config.path` cannot be
            read.
    """
    _check_form(config, lora, rule)
    if lora is not None and (config.form == "adapter" or (config.form == "auto" and config.is_start)):
        return _adapter_form(policy, lora, rule)
    dtype = policy.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    path = config.path or policy_config.path
    origin = replace(policy_config, path=path, dtype=dtype_name(dtype))
    if config.path is not None:
        origin.quantize = origin.revision = None  # the policy's
    if config.form == "recorded":
        # a fresh adapter adds 0
        adapter = lora if config.path is None and lora is not None and lora.adapter is not None else None

        def load() -> AbstractContextManager[CopiedReference]:
            return beside.loaded(lambda: CopiedReference(_load(origin, policy, config, adapter)), policy.device)

        return RecordedReference(load, dtype)
    source = policy if config.path is None else _load(origin, policy, config)
    is_soft = rule is not None and rule.alpha < 1
    return CopiedReference(source, dtype=dtype, accumulate=is_soft, offload=config.form == "offload")


def _check_form(config: ReferenceConfig, lora: LoRAConfig | None, rule: RefreshRule | None) -> None:
    """Check that the configured form is possible.

    Raises:
        UserError: it needs an adapter that is not there, or the policy's own weights; or it cannot follow the rule.
    """
    if config.form == "adapter" and lora is None:
        raise UserError("model.reference.form=adapter needs an adapter. Set model.lora, or use form=copy.")
    if config.form == "adapter" and not config.is_start:
        raise UserError(
            "model.reference: path and dtype have no effect because form=adapter uses the policy's own weights. "
            "Leave them out."
        )
    if config.form == "recorded" and rule is not None:
        raise UserError(
            f"model.reference.form=recorded computes log π_ref once, but this reference moves ({rule}). Use "
            "form=auto, or leave the refresh out (--reference_refresh=null)."
        )


def _load(origin: PolicyConfig, policy: Policy, config: ReferenceConfig, adapter: LoRAConfig | None = None) -> Policy:
    """The model of a reference, which reads the policy's tokens; errors name its own option."""
    try:
        reference = Policy.load(origin, adapter, policy.tokenizer)
    except UserError as error:
        if config.path is None:
            raise
        raise UserError(f"model.reference.path: {str(error).removeprefix('model.policy.path: ')}") from error
    if config.path is not None:
        _check_tokens(origin, reference, policy)
    return reference


def _check_tokens(origin: PolicyConfig, reference: Policy, policy: Policy) -> None:
    """Check that a model reads the policy's tokens as the same texts.

    Raises:
        UserError: it has fewer embeddings than there are tokens, or its own tokenizer gives texts other numbers.
    """
    ours = policy.tokenizer.get_vocab()
    rows, most = (len(model.model.get_input_embeddings().weight) for model in (reference, policy))  # type: ignore[arg-type]
    needed = min(len(ours), most)
    problem = f"has {rows} embeddings for the policy's {needed} tokens" if rows < needed else ""
    with suppress(UserError):  # it has no tokenizer of its own
        theirs = load_tokenizer(replace(origin, tokenizer=None, chat_template=None)).get_vocab()
        common = ours.keys() & theirs.keys()
        if sum(ours[token] == theirs[token] for token in common) < SAME_TOKENS * len(ours):
            problem = problem or "has other tokens than the policy"
    if problem:
        raise UserError(f"model.reference.path: {origin.path!r} {problem}. Give a model with the policy's tokenizer.")


def _adapter_form(policy: Policy, lora: LoRAConfig, rule: RefreshRule | None) -> Reference:
    if rule is None:
        return AdapterReference(policy, blocks=1 if lora.adapter else 0)
    blocks = ring_size(rule.alpha)
    linear = all("default" in layer.lora_A for layer in adapted_layers(policy.model))
    if blocks > 1 and linear and delta_bytes(policy) < ring_bytes(policy, blocks):
        return DeltaReference(policy)
    return AdapterReference(policy, blocks=blocks)


def belongs_to_reference(name: str) -> bool:
    """Whether a weight, by its name in the objective, belongs to a reference of any form."""
    return any(form.owns(name) for form in (CopiedReference, RecordedReference, AdapterReference, DeltaReference))


def own_weights(policy: Policy) -> list[nn.Parameter]:
    """The policy's weights, without those that a reference keeps in it (LoRA)."""
    return [weight for name, weight in policy.named_parameters() if not belongs_to_reference(name)]


def reference_weights(policy: Policy, reference: Reference | None) -> list[nn.Parameter]:
    """The weights that a reference adds: in the policy, or as a model of its own."""
    within = [weight for name, weight in policy.named_parameters() if belongs_to_reference(name)]
    return [*within, *reference.parameters()] if isinstance(reference, nn.Module) else within
