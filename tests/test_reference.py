"""The reference: frozen, mixed by name, exact under LoRA, in every form."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from tiny import adamw, byte_tokenizer, fit, llama_config, write_pairs
from transformers import LlamaForCausalLM

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.data.batches import Example, collate
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig, PolicyWithoutAdapter, fingerprint
from lit_align.reference.build import make_reference
from lit_align.reference.config import ReferenceConfig, RefreshRule
from lit_align.reference.copied import CopiedReference
from lit_align.reference.lora import AdapterReference, DeltaReference, ring_size
from lit_align.reference.mixing import mix_weights


@pytest.fixture
def batch() -> PreferenceBatch:
    return collate([Example([70, 80], [[90, 100, 0], [95, 0]], ""), Example([71], [[99, 0], [98, 97, 0]], "")], [0, 1])


def policy_of(folder: str, lora: LoRAConfig | None = None, dtype: str = "auto") -> Policy:
    torch.manual_seed(0)
    return Policy.load(PolicyConfig(folder, dtype=dtype), lora)  # type: ignore[arg-type]


def jolt(policy: Policy, seed: int, size: float = 0.05) -> None:
    """Move what is trained, as a step would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, weight in policy.trainable_weights():
            weight.add_(size * torch.randn_like(weight))


LORA = LoRAConfig(r=4, alpha=8)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["copy", "adapter"])
def test_a_live_reference_of_the_policys_dtype_agrees_with_it_to_the_bit(tiny_model, batch, lora, dtype, form):
    if form == "adapter" and lora is None:
        return
    policy = policy_of(tiny_model, lora, dtype)
    reference = make_reference(policy, PolicyConfig(tiny_model, dtype=dtype), lora, ReferenceConfig(form), None)
    assert torch.equal(policy(batch), reference.logps(batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_without_its_adapter_is_the_plain_model_to_the_bit(tiny_model, batch, dtype):
    policy, plain = policy_of(tiny_model, LORA, dtype), policy_of(tiny_model, None, dtype)
    assert torch.equal(policy(batch), plain(batch)), "a fresh adapter adds 0"
    start = PolicyWithoutAdapter(policy)
    jolt(policy, 1)
    trained = policy(batch)
    assert not torch.equal(trained, plain(batch))
    assert torch.equal(start(batch), plain(batch))
    assert torch.equal(policy(batch), trained), "the adapter stays switched off"
    full = dict(plain.full_weights())
    assert all(torch.equal(weight, full.pop(name)) for name, weight in start.full_weights())
    assert not full
    assert start.fingerprint() == policy_of(tiny_model, LORA, dtype).base_fingerprint()
    assert (start.dtype, start.positions) == (plain.dtype, plain.positions)
    copied, expected = start.merged_copy(), plain.merged_copy()
    assert all(torch.equal(*both) for both in zip(copied.parameters(), expected.parameters(), strict=True))


def test_soft_mixing_follows_the_closed_form(tiny_model):
    """ref_T = (1−α)^T ref_0 + Σ_k α(1−α)^(T−k) θ_k."""
    policy, alpha, T = policy_of(tiny_model, dtype="float64"), 0.3, 5
    reference = CopiedReference(policy)
    expected = {name: (1 - alpha) ** T * w.detach().clone() for name, w in policy.full_weights()}
    for k in range(1, T + 1):
        jolt(policy, k)
        reference.mix(policy, alpha)
        for name, weight in policy.full_weights():
            expected[name] += alpha * (1 - alpha) ** (T - k) * weight.detach()
    for name, weight in reference.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-12)


def twin_of(policy: Policy) -> CopiedReference:
    """A dense float64 model, the adapter merged: what every form under LoRA must equal when mixed the same way."""
    return CopiedReference(policy, dtype=torch.float64)


def test_soft_mixing_under_lora_mixes_the_merged_weights_not_the_factors(tiny_model):
    policy, alpha = policy_of(tiny_model, LORA, "float64"), 0.3
    reference = CopiedReference(policy)
    expected = {name: w.detach().clone() for name, w in policy.full_weights()}
    for k in range(4):
        jolt(policy, k)
        reference.mix(policy, alpha)
        for name, merged in policy.full_weights():
            expected[name] = alpha * merged + (1 - alpha) * expected[name]
    for name, weight in reference.model.named_parameters():
        torch.testing.assert_close(weight.float(), expected[name].float())


@pytest.mark.parametrize("started", [False, True], ids=["fresh adapter", "existing adapter"])
@pytest.mark.parametrize("lora", [LORA, replace(LORA, rslora=True)], ids=["LoRA", "rslora"])
@pytest.mark.parametrize("form", ["ring", "dense"])
def test_soft_mixing_under_lora_follows_a_dense_twin_over_many_refreshes(
    tiny_model, batch, tmp_path, form, lora, started
):
    if started:
        first = policy_of(tiny_model, lora, "float32")
        jolt(first, 99, size=0.3)
        first.adapter.save_pretrained(tmp_path)
        lora = LoRAConfig(adapter=str(tmp_path))
    policy, alpha = policy_of(tiny_model, lora, "float32"), 0.6
    twin = twin_of(policy)
    reference = DeltaReference(policy) if form == "dense" else AdapterReference(policy, blocks=ring_size(alpha))
    for k in range(60):
        jolt(policy, k)
        reference.mix(policy, alpha)
        twin.mix(policy, alpha)
        if k in (0, 7, 20, 59):  # before the ring is full, and after it has gone round
            torch.testing.assert_close(reference.logps(batch), twin.logps(batch).float(), rtol=1e-5, atol=1e-4)
            assert (policy(batch) - reference.logps(batch)).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_an_adapter_on_one_of_tied_weights_is_refused(tiny_model, tmp_path, targets):
    with pytest.raises(UserError, match=r"model.lora.targets=.* shares its weights with the output head"):
        policy_of(tiny_model, replace(LORA, targets=targets))
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(target_modules=targets)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.lora.adapter=.* shares its weights with the output head"):
        policy_of(tiny_model, LoRAConfig(adapter=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_adapter_of_more_than_two_factors_is_refused(tiny_model, tmp_path, options, named):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
    adapter.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is not a plain LoRA adapter \({named}"):
        policy_of(tiny_model, LoRAConfig(adapter=str(tmp_path)))


def test_an_adapter_on_the_embedding_is_mixed_too(batch, tmp_path):
    lora = replace(LORA, targets=["embed_tokens", "q_proj"])
    LlamaForCausalLM(llama_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = policy_of(str(tmp_path), lora, "float32")
    twin = twin_of(policy)
    reference = make_reference(policy, PolicyConfig(""), lora, ReferenceConfig(), RefreshRule(0.1, 1))
    assert isinstance(reference, AdapterReference)  # a dense update of an embedding has no linear layer to stand on
    for k in range(5):
        jolt(policy, k)
        reference.mix(policy, 0.1)
        twin.mix(policy, 0.1)
    torch.testing.assert_close(reference.logps(batch), twin.logps(batch).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("alpha", "form"), [(1.0, AdapterReference), (0.99, AdapterReference), (0.1, DeltaReference)])
def test_the_smaller_form_is_taken_and_says_its_size(tiny_model, alpha, form):
    policy = policy_of(tiny_model, replace(LORA, r=1))
    reference = make_reference(policy, PolicyConfig(tiny_model), LORA, ReferenceConfig(), RefreshRule(alpha, 1))
    assert type(reference) is form
    beside = [p for n, p in policy.model.named_parameters() if ".reference." in n or n.endswith("lora_reference")]
    size = sum(p.numel() * p.element_size() for p in beside)
    assert f"{size / 1e6:.1f} MB" in str(reference)
    assert not any(p.requires_grad for p in beside)


@pytest.mark.parametrize("lora", [None, LORA, replace(LORA, r=32)], ids=["full", "LoRA", "LoRA of full rank"])
def test_a_hard_refresh_makes_the_reference_the_policy_to_the_bit(tiny_model, batch, lora):
    policy = policy_of(tiny_model, lora, "float32")
    config = PolicyConfig(tiny_model, dtype="float32")
    reference = make_reference(policy, config, lora, ReferenceConfig(), RefreshRule(1.0, 2))
    jolt(policy, 1)
    assert not torch.equal(policy(batch), reference.logps(batch))
    reference.mix(policy, 1.0)
    assert torch.equal(policy(batch), reference.logps(batch))
    jolt(policy, 2)
    assert not torch.equal(policy(batch), reference.logps(batch))


def test_under_lora_the_reference_is_an_adapter_or_the_plain_model(tiny_model):
    config = PolicyConfig(tiny_model)
    hard = make_reference(policy_of(tiny_model, LORA), config, LORA, ReferenceConfig(), RefreshRule(1.0, 1))
    rests = make_reference(policy_of(tiny_model, LORA), config, LORA, ReferenceConfig(), None)
    assert isinstance(hard, AdapterReference)
    assert hard.blocks == 1
    assert isinstance(rests, AdapterReference)
    assert rests.blocks == 0


def test_continuing_an_adapter_the_reference_is_that_adapter_as_it_was(tiny_model, batch, tmp_path):
    first = policy_of(tiny_model, LORA, "float32")
    jolt(first, 1, size=0.3)
    first.adapter.save_pretrained(tmp_path)
    lora = LoRAConfig(adapter=str(tmp_path))
    policy = policy_of(tiny_model, lora, "float32")
    reference = make_reference(policy, PolicyConfig(tiny_model, dtype="float32"), lora, ReferenceConfig(), None)
    before = policy(batch).detach()
    assert torch.equal(reference.logps(batch), before)
    with policy.adapters([]):
        assert (policy(batch) - before).abs().max() > 1e-3  # "adapter off" would be another model
    jolt(policy, 2)
    assert torch.equal(reference.logps(batch), before)


def test_an_offloaded_reference_stays_in_cpu_memory_and_computes_the_same(tiny_model, batch):
    policy = policy_of(tiny_model)
    config = PolicyConfig(tiny_model)
    reference = make_reference(policy, config, None, ReferenceConfig("offload"), RefreshRule(0.5, 1))
    holder = torch.nn.ModuleDict({"reference": reference})
    holder.to("meta")  # as Lightning moves all of a module to the device
    assert all(weight.device.type == "cpu" for weight in reference.parameters())
    homes = {weight.data_ptr() for weight in reference.parameters()}
    jolt(policy, 1)
    reference.mix(policy, 1.0)
    assert torch.equal(reference.logps(batch), policy(batch))
    assert {weight.data_ptr() for weight in reference.parameters()} == homes


def test_offloading_on_cpus_is_refused(tiny_model, in_tmp):
    module = DPO(PolicyConfig(tiny_model), reference=ReferenceConfig("offload"))
    with pytest.raises(UserError, match="form=offload has no effect on CPUs"):
        fit(module, OfflinePairs(write_pairs(in_tmp)))


def test_the_reference_is_frozen_and_never_in_training_mode(tiny_model, batch):
    policy = policy_of(tiny_model)
    reference = CopiedReference(policy)
    reference.train()
    assert not any(module.training for module in reference.modules())
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert not reference.logps(batch).requires_grad


def test_an_adapter_reference_leaves_the_policys_state_alone(tiny_model, batch):
    policy = policy_of(tiny_model, replace(LORA, dropout=0.5))
    reference = AdapterReference(policy, blocks=1)
    trained = {name for name, _ in policy.trainable_weights()}
    assert trained
    assert not any(".reference." in name for name in trained)
    modes = [module.training for module in policy.modules()]
    logps = policy(batch)
    first, second = reference.logps(batch), reference.logps(batch)
    assert torch.equal(first, second)  # dropout does not act on it
    assert [module.training for module in policy.modules()] == modes
    assert {name for name, _ in policy.trainable_weights()} == trained
    logps.sum().backward()
    for name, weight in policy.model.named_parameters():
        assert (weight.grad is not None) == (name in trained), name


def test_a_small_alpha_moves_a_bfloat16_reference(tiny_model):
    """In bfloat16 alone 1 + 0.01·(1.01 − 1) rounds back to 1, for ever."""
    policy = policy_of(tiny_model, dtype="bfloat16")
    reference = CopiedReference(policy, accumulate=True)
    start = {name: w.float().clone() for name, w in reference.model.named_parameters()}
    with torch.no_grad():
        for _, weight in policy.trainable_weights():
            weight.mul_(1.0625)
    for _ in range(100):
        reference.mix(policy, 0.01)
    for name, weight in reference.model.named_parameters():
        expected = start[name] + (1 - 0.99**100) * (dict(policy.full_weights())[name].float() - start[name])
        torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=1e-6)


def test_tied_weights_are_mixed_once(tiny_model):
    policy = policy_of(tiny_model)
    reference = CopiedReference(policy)
    assert reference.model.lm_head.weight is reference.model.model.embed_tokens.weight
    before = reference.model.lm_head.weight.clone()
    jolt(policy, 1)
    reference.mix(policy, 0.5)
    expected = torch.lerp(before, policy.model.lm_head.weight, 0.5)
    torch.testing.assert_close(reference.model.lm_head.weight, expected.detach())


def test_a_hard_refresh_copies_buffers_too(tiny_model):
    policy = policy_of(tiny_model)
    reference = CopiedReference(policy)
    policy.model.model.rotary_emb.inv_freq.mul_(2)
    reference.mix(policy, 1.0)
    assert torch.equal(reference.model.model.rotary_emb.inv_freq, policy.model.model.rotary_emb.inv_freq)


def test_mixing_pairs_weights_by_name_whatever_their_order():
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    mix_weights(target, {"b": torch.full((2,), 2.0), "a": torch.ones(2)}, 0.5)
    assert target["a"].tolist() == [0.5, 0.5]
    assert target["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("source", [{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}])
def test_mixing_weights_that_do_not_match_changes_nothing_and_names_them(source):
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match="b"):
        mix_weights(target, source, 0.5)
    assert target["a"].tolist() == [0.0, 0.0]


def test_mixing_with_alpha_zero_changes_nothing():
    target = {"a": torch.randn(5)}
    before = target["a"].clone()
    mix_weights(target, {"a": torch.randn(5)}, 0.0)
    assert torch.equal(target["a"], before)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_alpha_outside_its_range_is_refused_with_the_direction_of_the_mix(alpha):
    with pytest.raises(UserError, match=r"reference_refresh.alpha=.*must be in \(0, 1\].*reference ← alpha·policy"):
        RefreshRule(alpha, 1)


def test_tau_below_one_is_refused():
    with pytest.raises(UserError, match=r"reference_refresh.tau=0 must be at least 1"):
        RefreshRule(1.0, 0)


@pytest.mark.parametrize(
    ("lora", "config", "rule", "message"),
    [
        (None, ReferenceConfig("adapter"), None, "form=adapter needs an adapter"),
        (LORA, ReferenceConfig("recorded"), RefreshRule(0.5, 1), "form=recorded computes log π_ref once"),
        (LORA, ReferenceConfig("adapter", dtype="float32"), None, "path and dtype have no effect"),
    ],
)
def test_a_form_that_cannot_be_right_is_refused(tiny_model, lora, config, rule, message):
    with pytest.raises(UserError, match=message):
        make_reference(policy_of(tiny_model, lora), PolicyConfig(tiny_model), lora, config, rule)


def test_a_fingerprint_tells_weights_apart_by_bits_places_and_names():
    weight = torch.arange(12.0).view(3, 4)
    swapped = weight.clone()
    swapped[0, 0], swapped[2, 3] = weight[2, 3], weight[0, 0]
    prints = {
        fingerprint([("a", weight)]),
        fingerprint([("a", swapped)]),
        fingerprint([("b", weight)]),
        fingerprint([("a", weight.view(4, 3))]),
        fingerprint([("a", weight.double())]),
        fingerprint([("a", weight * (1 + 2**-23))]),
    }
    assert len(prints) == 6
    assert fingerprint([("a", weight), ("b", swapped)]) == fingerprint([("b", swapped), ("a", weight.clone())])


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_each_references_fingerprint_covers_its_own_slot(tmp_path, targets):
    LlamaForCausalLM(llama_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = policy_of(str(tmp_path), replace(LORA, targets=targets))
    references = [AdapterReference(policy, blocks=1)]
    references += [DeltaReference(policy)] if targets == ["lm_head"] else []
    prints = [part.fingerprint() for part in (policy, *references)]
    jolt(policy, 1)
    assert policy.fingerprint() != prints[0]
    assert [reference.fingerprint() for reference in references] == prints[1:]
    for reference, before in zip(references, prints[1:], strict=True):
        reference.mix(policy, 0.5)
        assert reference.fingerprint() != before


@pytest.mark.parametrize("form", ["auto", "recorded"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_another_model_as_reference_has_the_policys_type_by_default(tiny_model, form, lora):
    policy = policy_of(tiny_model, lora)
    config = ReferenceConfig(form, path=tiny_model)
    with make_reference(policy, PolicyConfig(tiny_model), lora, config, None).present() as reference:
        assert reference.dtype == policy.dtype


def test_another_reference_needs_no_tokenizer_and_no_revision(tiny_model, tmp_path, monkeypatch):
    policy = policy_of(tiny_model)
    policy.model.save_pretrained(tmp_path)
    loaded, load = [], Policy.load
    monkeypatch.setattr(Policy, "load", lambda config, *args: loaded.append(config) or load(config, *args))
    config = PolicyConfig(tiny_model, revision="v2")
    make_reference(policy, config, None, ReferenceConfig(path=str(tmp_path)), None)
    assert [(each.path, each.revision) for each in loaded] == [(str(tmp_path), None)]


def test_a_merged_copy_computes_the_same_as_the_adapted_policy(tiny_model, batch):
    policy = policy_of(tiny_model, LORA, "float32")
    jolt(policy, 1)
    merged = CopiedReference(policy)
    torch.testing.assert_close(merged.logps(batch), policy(batch).detach(), rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


def test_bfloat16_copies_keep_rotary_frequencies_in_float32(tiny_model):
    copied = policy_of(tiny_model).merged_copy(torch.bfloat16)
    assert copied.lm_head.weight.dtype == torch.bfloat16
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32


HARD, SOFT = (1.0, 1), (0.5, 1)
RING = replace(LORA, r=1)  # at α = 0.9; at 0.5 a dense update is smaller


def resumed(
    folder: str, lora: LoRAConfig | None, dtype: str, before: tuple, after: tuple, **options: bool
) -> list[DPO]:
    """Two steps with one rule, and a run with another rule that resumes from them."""
    modules = []
    for rule, path in ((before, None), (after, "kept/last.ckpt")):
        module = DPO(PolicyConfig(folder, dtype=dtype), lora=lora, optimizer=adamw())  # type: ignore[arg-type]
        callbacks: list = [ReferenceRefresh(*rule, **options if path else {})] if rule else []
        callbacks += [] if path else [ModelCheckpoint("kept", filename="last", enable_version_counter=False)]
        data = OfflinePairs(write_pairs(Path()), batch_size=4)
        fit(module, data, *callbacks, ckpt_path=path, enable_checkpointing=path is None)
        modules.append(module)
    return modules


@pytest.mark.parametrize(
    ("lora", "dtype", "before", "after"),
    [
        (None, "float32", (), HARD),
        (None, "float32", SOFT, HARD),
        (None, "bfloat16", (), SOFT),
        (None, "bfloat16", HARD, SOFT),
        (None, "bfloat16", SOFT, HARD),
        (LORA, "float32", (), HARD),
        (LORA, "float32", (), SOFT),
        (LORA, "float32", SOFT, (0.6, 2)),
        (RING, "float32", (), (0.9, 1)),
        (RING, "float32", HARD, (1.0, 2)),
    ],
)
def test_resuming_with_another_rule_keeps_the_reference(tiny_model, in_tmp, batch, lora, dtype, before, after):
    with pytest.raises(UserError, match="accept_change=true to resume with the new rule"):
        resumed(tiny_model, lora, dtype, before, after)
    first, second = resumed(tiny_model, lora, dtype, before, after, accept_change=True)
    assert torch.equal(first.policy(batch), second.policy(batch))
    torch.testing.assert_close(first.reference.logps(batch), second.reference.logps(batch), rtol=0, atol=1e-5)
    if isinstance(second.reference, CopiedReference) and second.reference.accumulator is not None:
        kept = dict(second.reference.accumulator.named_parameters())
        assert all(torch.equal(kept[name].to(w.dtype), w) for name, w in second.reference.model.named_parameters())
    second.reference.mix(second.policy, 1.0)
    torch.testing.assert_close(second.reference.logps(batch), second.policy(batch).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "before", "after"),
    [(LORA, SOFT, HARD), (LORA, HARD, SOFT), (RING, (0.9, 1), HARD), (RING, (0.9, 1), SOFT)],
)
def test_a_reference_that_cannot_change_its_form_is_always_refused(tiny_model, in_tmp, lora, before, after):
    for accepted in (False, True):
        with pytest.raises(UserError, match=r"does not fit the form of .* same reference_refresh\.$"):
            resumed(tiny_model, lora, "float32", before, after, accept_change=accepted)


def test_a_checkpoint_of_another_rank_and_reference_form_is_refused(tiny_model, in_tmp):
    rule = ReferenceRefresh(0.9, 1)  # four times the rank: dense updates
    module = DPO(PolicyConfig(tiny_model), lora=LORA)
    trainer = fit(module, OfflinePairs(write_pairs(in_tmp)), rule)
    assert isinstance(module.reference, DeltaReference)
    trainer.save_checkpoint("run.ckpt")
    other = DPO(PolicyConfig(tiny_model), lora=RING, accept_changes=["model.lora.r"])
    with pytest.raises(UserError, match=r"model\.lora\.r: 4 → \d+\n.* its weights do not fit"):
        fit(other, OfflinePairs("pairs.jsonl"), rule, ckpt_path="run.ckpt")
