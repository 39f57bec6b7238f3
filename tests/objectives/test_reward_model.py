import json
import math

import pytest
import torch
from architectures import build
from tiny import adamw, byte_tokenizer, fit, write_pairs
from torch.testing import assert_close

from lit_align.cli import main
from lit_align.data import OfflinePairs, SequenceClassificationScorer
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives.reward_model import RewardModel, Scored, bradley_terry_loss
from lit_align.policy import LoRAConfig, PolicyConfig


def test_a_pair_worked_by_hand():
    rewards = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    assert bradley_terry_loss(rewards).item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-14)
    for margin in (0.5, torch.tensor([0.5])):
        loss = bradley_terry_loss(rewards, margin=margin)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-14)


def test_equal_rewards_cost_ln_2_and_push_apart_by_one_half():
    rewards = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(rewards)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert rewards.grad.tolist() == [[-0.5, 0.5]]


def test_the_population_optimum_is_the_true_reward_up_to_a_constant(bandit, solve):
    def loss(scores):  # log-softmax scores: one representative of "up to a constant"
        return (bandit.weights * bandit.wins * bradley_terry_loss(scores[bandit.pairs])).mean()

    assert_close(solve(loss, bandit.reference), bandit.rewards.log_softmax(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"rewards": (3,)}, r"`rewards` has shape \[3\], but needs \[B, 2\]"),
        ({"rewards": (3, 2), "margin": (3, 1)}, r"`margin` has shape \[3, 1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()})


# --- the module ---


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4), LoRAConfig(r=4, targets=["q_proj"])], ids=str)
@pytest.mark.parametrize("chat", [False, True], ids=["without a chat template", "with one"])
def test_the_saved_model_scores_texts_as_the_module_does(tiny_model, in_tmp, lora, chat):
    byte_tokenizer(chat).save_pretrained(in_tmp / "tokenizer")
    module = RewardModel(PolicyConfig(tiny_model, dtype="float32"), lora=lora, optimizer=adamw(1e-2))
    module._tokenizer = byte_tokenizer(chat)
    data = OfflinePairs(write_pairs(in_tmp), batch_size=8)
    trainer = fit(module, data, max_epochs=4)
    assert trainer.callback_metrics["train/loss"] < 0.95 * math.log(2)
    module.policy.tokenizer = module.tokenizer
    module.policy.save(in_tmp / "saved")

    rows = [json.loads(line) for line in (in_tmp / "pairs.jsonl").read_text().splitlines()]
    scorer = SequenceClassificationScorer(str(in_tmp / "saved"))
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    scores = torch.tensor(scorer([row["prompt"] for row in rows for _ in range(2)], texts)).view(8, 2)
    (batch,) = data.train_dataloader()
    with torch.no_grad():
        rewards = module.policy.eval()(batch)
    assert_close(rewards, scores[batch.index], rtol=1e-4, atol=1e-5)
    assert rewards.std() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "opt", "gemma2 (soft-capped)"])
def test_a_head_on_any_backbone_scores_each_response_as_if_it_stood_alone(in_tmp, name):
    build(name, torch.float32).save_pretrained(in_tmp / "base")
    byte_tokenizer().save_pretrained(in_tmp / "base")
    attention = "eager" if "gemma2" in name else "sdpa"
    policy = Scored.load(PolicyConfig(str(in_tmp / "base"), dtype="float32", attention=attention))
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[4, 1], [2, 3]])
    batch = PreferenceBatch(
        prompt_ids=ids[:, :5],
        prompt_mask=torch.arange(5) < torch.tensor([[5], [3]]),
        response_ids=ids[:, None, 5:].expand(2, 2, 4),
        response_mask=torch.arange(4) < lengths[:, :, None],
        index=torch.arange(2),
    )
    with torch.no_grad():
        assert policy(batch).abs().max() == 0, "a new head"
        policy.model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
        rewards = policy(batch)
        for b, P in enumerate((5, 3)):
            for k in range(2):
                row = torch.cat([ids[b, :P], ids[b, 5 : 5 + int(lengths[b, k])]])[None]
                assert_close(rewards[b, k], policy.model(input_ids=row).logits[0, 0], rtol=1e-4, atol=1e-4)
    assert rewards.std() > 0.01


def test_a_new_head_starts_at_ln_2_and_a_trained_one_is_kept(tiny_model, in_tmp):
    data = OfflinePairs(write_pairs(in_tmp), batch_size=8)
    module = RewardModel(PolicyConfig(tiny_model), optimizer=adamw(1e-2))
    assert fit(module, data).callback_metrics["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
    module.policy.save(in_tmp / "saved")
    (batch,) = data.train_dataloader()
    with torch.no_grad():
        rewards = module.policy(batch)
    again = RewardModel(PolicyConfig(str(in_tmp / "saved")), optimizer=adamw(1e-2))
    metrics = fit(again, OfflinePairs("pairs.jsonl", batch_size=8)).callback_metrics
    assert metrics["train/loss"] < math.log(2) - 1e-4
    assert metrics["train/reward_chosen"] == pytest.approx(rewards[:, 0].mean().item(), rel=1e-4)
    assert metrics["train/reward_margin"] == pytest.approx(
        metrics["train/reward_chosen"] - metrics["train/reward_rejected"]
    )


def test_a_checkpoint_of_lora_brings_its_head(tiny_model, in_tmp):
    data = OfflinePairs(write_pairs(in_tmp), batch_size=8)
    module = RewardModel(PolicyConfig(tiny_model), lora=LoRAConfig(r=4), optimizer=adamw(1e-2))
    fit(module, data, max_epochs=2).save_checkpoint("run.ckpt")
    (batch,) = data.train_dataloader()
    with torch.no_grad():
        assert torch.equal(module.eval()(batch), RewardModel.load_from_checkpoint("run.ckpt").eval()(batch))


def test_the_margin_may_be_that_of_the_rows_scores(tiny_model, in_tmp):
    rows = [
        {"prompt": "p", "chosen": f"a{i}", "rejected": "b", "score_chosen": i + 1, "score_rejected": i} for i in (1, 2)
    ]
    (in_tmp / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = RewardModel(PolicyConfig(tiny_model), margin="rewards")
    loss = fit(module, OfflinePairs("scored.jsonl")).callback_metrics["train/loss"]
    assert loss == pytest.approx(math.log1p(math.e))  # rewards 0, margin 1
    with pytest.raises(UserError, match=r"model.margin=rewards .* the rows have no scores"):
        fit(RewardModel(PolicyConfig(tiny_model), margin="rewards"), OfflinePairs(write_pairs(in_tmp)))


def test_options_of_a_likelihood_are_refused_and_not_offered(tiny_model, in_tmp, capsys):
    with pytest.raises(UserError, match=r"policy.temperature=0.8 has no effect because a reward model has no"):
        RewardModel(PolicyConfig("x", temperature=0.8))
    with pytest.raises(TypeError, match="sft_weight"):
        RewardModel(PolicyConfig("x"), sft_weight=0.1)
    (in_tmp / "sft.jsonl").write_text('{"prompt": "q", "completion": " a"}\n')
    with pytest.raises(UserError, match=r"data.sft has no effect because RewardModel learns from preferences only"):
        fit(RewardModel(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp), sft="sft.jsonl"))
    for name, offered in (("RewardModel", False), ("SimPO", True)):
        with pytest.raises(SystemExit):
            main(["fit", f"--model.help={name}"])
        said = capsys.readouterr().out
        assert "warmup_steps" in said
        assert ("sft_weight" in said) == offered


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_a_module_is_loaded_from_its_checkpoint_with_its_options(tiny_model, in_tmp, lora):
    module = RewardModel(PolicyConfig(tiny_model), lora=lora, margin=0.5, warmup_steps=3, optimizer=adamw())
    fit(module, OfflinePairs(write_pairs(in_tmp))).save_checkpoint("run.ckpt")
    loaded = RewardModel.load_from_checkpoint("run.ckpt")
    assert (loaded.margin, loaded.learning_rate.warmup_steps) == (0.5, 3)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
