import lightning as L
import pytest
import torch
from tiny import adamw, fit, on_policy, write_pairs
from torch.testing import assert_close

from lit_align.data import Best, OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.sft import SFT
from lit_align.policy import PolicyConfig


def test_each_response_counts_its_own_tokens():
    loss = sft_loss(torch.tensor([-6.0, -6.0]).double(), torch.tensor([3, 2]))
    assert_close(loss, torch.tensor([2.0, 3.0]).double())


def test_the_population_optimum_is_the_distribution_of_the_text(bandit, solve):
    def loss(logps):
        return (bandit.sampler.exp() * sft_loss(logps, torch.ones(5))).sum()

    assert_close(solve(loss, bandit.reference), bandit.sampler, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 2), (3, 2)), r"`logps` has shape \[3, 2\], but needs \[N\]"),
        (((3,), (1,)), r"`lengths` has shape \[1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        sft_loss(*map(torch.zeros, shapes))


# --- the module ---


def test_of_preferences_the_better_response_is_imitated(tiny_model, in_tmp):
    data = OfflinePairs(write_pairs(in_tmp), validation="pairs.jsonl", batch_size=8)
    module = SFT(PolicyConfig(tiny_model), optimizer=adamw(3e-3))
    trainer = fit(module, data, max_epochs=3)
    (batch,) = data.val_dataloader()
    assert module.tokenizer.batch_decode(batch.response_ids[:, 0])[0].startswith(" yes 0<|endoftext|>")
    with torch.no_grad():
        logps = module.policy.eval()(batch)[:, 0]
    expected = -(logps / batch.lengths[:, 0]).mean().item()
    assert trainer.callback_metrics["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert expected < trainer.callback_metrics["train/loss"]
    logged = {name.partition("/")[2] for name in trainer.callback_metrics if name.startswith("val/")}
    assert logged == {"loss", "logp", "length"}


def test_plain_texts_are_learnt_from_their_first_token(tiny_model, in_tmp):
    (in_tmp / "texts.jsonl").write_text('{"text": "one text"}\n{"text": "another"}\n')
    data = OfflinePairs("texts.jsonl", batch_size=2)
    fit(SFT(PolicyConfig(tiny_model)), data)
    (batch,) = data.train_dataloader()
    assert batch.prompt_ids.tolist() == [[0], [0]]
    assert sorted(batch.lengths[:, 0].tolist()) == [len("another") + 1, len("one text") + 1]


def test_on_rounds_it_imitates_the_best_response_of_each_prompt(tiny_model, in_tmp):
    class Checked(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert batch.response_ids.shape[:2] == (batch.size, 1)
            best = {tuple(group.prompt_ids): max(group.rewards) for group in trainer.datamodule.current_round.groups}
            prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
            assert batch.rewards[:, 0].tolist() == pytest.approx([best[tuple(ids)] for ids in prompts])
            seen.append(batch.size)

    seen: list[int] = []
    module = SFT(PolicyConfig(tiny_model), optimizer=adamw())
    fit(module, on_policy(in_tmp, pairing=Best(), record_sampler=False), Checked(), max_epochs=2)
    assert sum(seen) > 0
    assert module.trainer.callback_metrics["train/loss"].isfinite()


def test_a_rule_that_makes_pairs_is_refused(tiny_model, in_tmp):
    with pytest.raises(UserError, match=r"data.pairing=BestWorst: SFT imitates one response. Use data.pairing=Best"):
        fit(SFT(PolicyConfig(tiny_model)), on_policy(in_tmp))


def test_the_best_alone_is_refused_where_responses_are_compared(tiny_model, in_tmp):
    with pytest.raises(UserError, match=r"data.pairing=Best: DPO compares responses, and this rule keeps one"):
        fit(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp, pairing=Best()))
