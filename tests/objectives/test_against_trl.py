"""The losses against TRL's own code, run on stubs of its trainers; where the two differ, the test says why.

TRL computes most losses inside one trainer method. Here that method runs as it stands: on a "self" with just
the attributes that it reads, and on a "model" that returns made-up log-probabilities (or logits) in float64.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from lit_align.objectives import DPO
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.cpo import cpo_loss
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.exo import exo_loss
from lit_align.objectives.ipo import ipo_loss
from lit_align.objectives.kto import kto_loss, kto_z0
from lit_align.objectives.orpo import log1mexp, orpo_loss
from lit_align.objectives.reward_model import bradley_terry_loss
from lit_align.objectives.simpo import simpo_loss
from lit_align.objectives.sppo import sppo_loss
from lit_align.policy import PolicyConfig

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl", minversion="1.16", reason="the peer whose numbers these are; `make install` has it")

from trl import DPOTrainer, KTOTrainer, RewardTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp  # noqa: E402

B, PROMPT, LONGEST, VOCABULARY = 6, 3, 7, 11
LENGTHS = torch.tensor([[7, 2], [1, 4], [5, 5], [3, 6], [7, 1], [2, 7]])


def stub(**attributes):
    """A trainer's "self": one process, nothing but the loss."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "use_weighting": False,
        "is_encoder_decoder": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**common | attributes)


class Batch(SimpleNamespace):
    """Token log-probabilities of B pairs of unequal lengths, and what TRL's collators make of them."""

    def __init__(self, random):
        positions = torch.arange(PROMPT + LONGEST)
        # TRL stacks all chosen responses on all rejected ones
        lengths = LENGTHS.T.flatten()
        completion = (positions >= PROMPT) & (positions < PROMPT + lengths[:, None])
        self.inputs = {
            "input_ids": torch.randint(VOCABULARY, completion.shape),
            "attention_mask": (completion | (positions < PROMPT)).long(),
            "completion_mask": completion.long(),
        }
        self.token_logps = -random(2 * B, PROMPT + LONGEST - 1).exp() * completion[:, 1:]
        self.logps = self.token_logps.sum(1).view(2, B).T  # [B, 2]
        self.anchor_logps = self.logps + 3 * random(B, 2)


@pytest.fixture
def batch(random):
    return Batch(random)


def outputs(token_logps):
    """The output of TRL's fused language-model head; everything except log_probs is for logging."""
    zeros = torch.zeros_like(token_logps)
    return SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_dpo(batch, loss_type, beta, label_smoothing=0.0):
    trainer = stub(
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
    )
    chosen, rejected = batch.anchor_logps.unbind(1)
    inputs = batch.inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs(batch.token_logps), inputs, False)


same = lambda ours, theirs: assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # noqa: E731
betas = pytest.mark.parametrize("beta", [0.05, 0.5])


def assert_different(ours, theirs):
    assert (ours - theirs).abs() > 1e-3 * theirs.abs()


# --- DPO and its relatives ---------------------------------------------------------------------------------


@betas
def test_dpo_is_trls_sigmoid(beta, batch):
    same(dpo_loss(batch.logps, batch.anchor_logps, beta=beta).mean(), trl_dpo(batch, "sigmoid", beta))


@betas
def test_trls_sigmoid_ignores_label_smoothing(beta, batch):
    theirs = trl_dpo(batch, "sigmoid", beta, label_smoothing=0.2)
    same(theirs, trl_dpo(batch, "sigmoid", beta))
    ours = dpo_loss(batch.logps, batch.anchor_logps, beta=beta, label_smoothing=0.2).mean()
    assert_different(ours, theirs)
    margins = beta * (batch.logps - batch.anchor_logps) @ torch.tensor([1.0, -1.0]).double()
    same(ours, -(0.8 * logsigmoid(margins) + 0.2 * logsigmoid(-margins)).mean())


@betas
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_robust_dpo_is_trls_robust(beta, epsilon, batch):
    ours = dpo_loss(batch.logps, batch.anchor_logps, beta=beta, label_smoothing=epsilon, robust=True)
    same(ours.mean(), trl_dpo(batch, "robust", beta, label_smoothing=epsilon))


@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_dpo_per_token_is_trls_sigmoid_norm(beta, batch):
    module = DPO(PolicyConfig("none"), length_normalize=True)
    ours = module.loss(batch.logps, batch.anchor_logps, beta, SimpleNamespace(lengths=LENGTHS, labels=None))
    same(ours.mean(), trl_dpo(batch, "sigmoid_norm", beta))


@betas
def test_ipo_of_log_probabilities_per_token_is_trls_ipo(beta, batch):
    ours = ipo_loss(batch.logps / LENGTHS, batch.anchor_logps / LENGTHS, beta=beta)
    same(ours.mean(), trl_dpo(batch, "ipo", beta))


@betas
def test_ipo_sums_over_tokens_where_trl_averages(beta, batch):
    ours = ipo_loss(batch.logps, batch.anchor_logps, beta=beta).mean()
    assert_different(ours, trl_dpo(batch, "ipo", beta))
    h = (batch.logps - batch.anchor_logps) @ torch.tensor([1.0, -1.0]).double()
    same(ours, ((h - 1 / (2 * beta)) ** 2).mean())


@betas
@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_pairwise_exo_is_trls_exo_pair(beta, epsilon, batch):
    ours = exo_loss(batch.logps, batch.anchor_logps, beta=beta, label_smoothing=epsilon).mean()
    # TRL rounds ε to float32, unless it is a tensor of more digits already
    assert_close(ours, trl_dpo(batch, "exo_pair", beta, label_smoothing=epsilon), rtol=1e-6, atol=0)
    wide = torch.tensor(epsilon, dtype=torch.float64)
    same(ours, trl_dpo(batch, "exo_pair", beta, label_smoothing=wide))


@betas
def test_sppo_with_hard_labels_is_trls_sppo_hard(beta, batch):
    hard = torch.tensor([[1.0, 0.0]] * B)
    ours = sppo_loss(batch.logps, batch.anchor_logps, win_probabilities=hard, beta=beta)
    same(ours.mean(), trl_dpo(batch, "sppo_hard", beta))


@betas
def test_trls_sppo_hard_lacks_the_papers_win_probabilities(beta, batch):
    # two samples, each against both: P̂ = (½ + p)/2 is in [¼, ¾]
    soft = torch.tensor([[0.75, 0.25]] * B)
    ours = sppo_loss(batch.logps, batch.anchor_logps, win_probabilities=soft, beta=beta).mean()
    assert_different(ours, trl_dpo(batch, "sppo_hard", beta))


def test_sft_is_trls_for_one_response_and_averages_otherwise(batch):
    theirs = trl_dpo(batch, "sft", 0.1)
    chosen, lengths = batch.logps[:, 0], LENGTHS[:, 0]
    same(-chosen.sum() / lengths.sum(), theirs)
    ours = sft_loss(chosen, lengths).mean()
    assert_different(ours, theirs)
    same(ours, torch.stack([-chosen[i] / lengths[i] for i in range(B)]).mean())


# --- KTO ---------------------------------------------------------------------------------------------------


def trl_kto(batch, labels, beta, mismatched, weights=(1.0, 1.0)):
    """TRL's loss of 2B single responses; `mismatched` are log π and log π_ref of those that make z0."""
    trainer = stub(
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    trainer._compute_kl_logps = lambda model, inputs: mismatched[0]
    inputs = batch.inputs | {
        "label": labels,
        "ref_logps": batch.anchor_logps.T.flatten(),
        "ref_KL_logps": mismatched[1],
    }
    return KTOTrainer._compute_loss(trainer, lambda **_: outputs(batch.token_logps), inputs, False)


@betas
@pytest.mark.parametrize("shift", [-4.0, 4.0], ids=["z0 clamped", "z0 positive"])
def test_kto_is_trls_kto(beta, shift, batch, random):
    labels = random(2 * B) > 0
    mismatched = random(2 * B) + shift, random(2 * B)
    ours = kto_loss(
        batch.logps.T.flatten(),
        batch.anchor_logps.T.flatten(),
        labels,
        beta=beta,
        z0=kto_z0(mismatched[0] - mismatched[1]),
        desirable_weight=1.33,
        undesirable_weight=0.7,
    )
    same(ours.mean(), trl_kto(batch, labels, beta, mismatched, weights=(1.33, 0.7)))


def test_in_micro_batches_trls_z0_is_that_of_the_micro_batch(batch, random):
    labels = random(2 * B) > 0
    mismatched = 4 * random(2 * B), 4 * random(2 * B)
    whole = trl_kto(batch, labels, 0.5, mismatched)
    logps, anchor_logps = batch.logps.T.flatten(), batch.anchor_logps.T.flatten()
    theirs, ours = [], []
    for i in range(2 * B):  # batch size 1, accumulated
        one = SimpleNamespace(
            inputs={name: tensor[i : i + 1] for name, tensor in batch.inputs.items()},
            token_logps=batch.token_logps[i : i + 1],
            anchor_logps=anchor_logps[i : i + 1, None],
        )
        theirs.append(trl_kto(one, labels[i : i + 1], 0.5, (mismatched[0][i], mismatched[1][i])))
        z0 = kto_z0(mismatched[0] - mismatched[1])
        ours.append(kto_loss(logps[i : i + 1], anchor_logps[i : i + 1], labels[i : i + 1], beta=0.5, z0=z0).squeeze())
    same(torch.stack(ours).mean(), whole)
    assert_different(torch.stack(theirs).mean(), whole)


# --- without a reference -----------------------------------------------------------------------------------


class Logits(SimpleNamespace):
    """B pairs as CPO's and ORPO's collator makes them, and a model that returns random logits."""

    def __init__(self, random, batch):
        ids, completion = batch.inputs["input_ids"], batch.inputs["completion_mask"].bool()
        attention, labels = batch.inputs["attention_mask"], ids.masked_fill(~completion, -100)
        self.inputs = {}
        for i, side in enumerate(("chosen", "rejected")):
            rows = slice(i * B, (i + 1) * B)
            for name, tensor in (("input_ids", ids), ("attention_mask", attention), ("labels", labels)):
                self.inputs[f"{side}_{name}"] = tensor[rows]
        logits = random(2 * B, PROMPT + LONGEST, VOCABULARY)
        self.model = lambda *_, **__: SimpleNamespace(logits=logits)
        token_logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        self.logps = (token_logps * completion[:, 1:]).sum(1).view(2, B).T
        self.prompt_and_chosen = (token_logps * attention[:, 1:])[:B].sum(1)

    def trainer(self, cls, **attributes):
        trainer = stub(pad_token_id=0, padding_value=0, label_smoothing=0.0, alpha=0.0, **attributes)
        for name in ("concatenated_inputs", "get_batch_logps"):
            setattr(trainer, name, getattr(cls, name))
        for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(cls, name):
                setattr(trainer, name, getattr(cls, name).__get__(trainer))
        return lambda: cls.get_batch_loss_metrics(trainer, self.model, self.inputs)[0]


@pytest.fixture
def logits(random, batch):
    return Logits(random, batch)


@betas
def test_cpos_preference_term_is_trls(beta, logits):
    theirs = logits.trainer(CPOTrainer, loss_type="sigmoid", beta=beta, cpo_alpha=0.0)()
    same(cpo_loss(logits.logps, beta=beta, alpha=0.0).mean(), theirs)


@betas
def test_cpos_label_smoothing_is_trls(beta, logits):
    trainer = stub(alpha=0.0, loss_type="sigmoid", beta=beta, label_smoothing=0.2)
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *logits.logps.unbind(1))
    same(
        cpo_loss(logits.logps, beta=beta, alpha=0.0, labels=torch.full((B,), 0.8, dtype=torch.float64)),
        theirs,
    )


def test_cpos_likelihood_sums_over_tokens_where_trl_averages(logits):
    theirs = logits.trainer(CPOTrainer, loss_type="sigmoid", beta=0.1, cpo_alpha=0.5)()
    preference = cpo_loss(logits.logps, beta=0.1, alpha=0.0).mean()
    chosen, lengths = logits.logps[:, 0], LENGTHS[:, 0]
    same(preference - 0.5 * chosen.sum() / lengths.sum(), theirs)
    summed = cpo_loss(logits.logps, beta=0.1, alpha=0.5).mean()
    averaged = cpo_loss(logits.logps, beta=0.1, alpha=0.5, lengths=LENGTHS).mean()
    same(summed, preference - 0.5 * chosen.mean())
    same(averaged, preference - 0.5 * (chosen / lengths).mean())
    assert_different(summed, theirs)
    assert_different(averaged, theirs)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_simpo_is_trls_simpo_without_cpos_likelihood(gamma, logits):
    theirs = logits.trainer(CPOTrainer, loss_type="simpo", beta=2.0, cpo_alpha=0.0, simpo_gamma=gamma)()
    same(simpo_loss(logits.logps, LENGTHS, beta=2.0, gamma=gamma).mean(), theirs)


def test_trls_default_simpo_adds_cpos_likelihood(logits):
    theirs = logits.trainer(CPOTrainer, loss_type="simpo", beta=2.0, cpo_alpha=1.0, simpo_gamma=0.7)()
    assert_different(simpo_loss(logits.logps, LENGTHS, beta=2.0, gamma=0.7).mean(), theirs)


def test_simpos_gamma_is_the_papers_not_that_of_the_authors_code(logits):
    chosen, rejected = (logits.logps / LENGTHS).unbind(1)
    authors = -logsigmoid(2.0 * (chosen - rejected - 0.35))  # gamma_beta_ratio = 0.35
    same(simpo_loss(logits.logps, LENGTHS, beta=2.0, gamma=0.7), authors)


@betas
def test_orpos_odds_ratio_is_trls_to_the_float32_that_trl_computes_it_in(beta, logits):
    theirs, *_ = ORPOTrainer.odds_ratio_loss(stub(beta=beta), *(logits.logps / LENGTHS).unbind(1))
    ours = orpo_loss(logits.logps, LENGTHS, beta=beta) + logits.logps[:, 0] / LENGTHS[:, 0]
    assert_close(ours, -theirs.double(), rtol=1e-5, atol=1e-6)
    odds = (logits.logps / LENGTHS).exp() / (1 - (logits.logps / LENGTHS).exp())
    same(ours, -beta * logsigmoid((odds[:, 0] / odds[:, 1]).log()))


def test_orpos_likelihood_leaves_out_the_prompt_that_trl_includes(logits):
    theirs = logits.trainer(ORPOTrainer, beta=0.1)()
    odds_term = (orpo_loss(logits.logps, LENGTHS, beta=0.1) + logits.logps[:, 0] / LENGTHS[:, 0]).mean()
    tokens = (LENGTHS[:, 0] + PROMPT - 1).sum()  # all but the first token of the prompt
    assert_close(odds_term - logits.prompt_and_chosen.sum() / tokens, theirs, rtol=1e-6, atol=0)
    assert_different(orpo_loss(logits.logps, LENGTHS, beta=0.1).mean(), theirs)


def test_log1mexp_is_trls_except_at_zero():
    x = -torch.logspace(-12, 2, 50, dtype=torch.float64)
    same(log1mexp(x), trl_log1mexp(x))
    zero = torch.zeros(1, dtype=torch.float64)
    assert trl_log1mexp(zero).isneginf().all()
    assert log1mexp(zero).isfinite().all()


# --- reward model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_margin", [False, True])
def test_the_reward_models_loss_is_trls(with_margin, random):
    rewards, margin = random(B, 2), random(B).exp()
    trainer = stub(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": margin} if with_margin else {})
    model_outputs = SimpleNamespace(logits=rewards.T.reshape(-1, 1))
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: model_outputs, inputs)
    same(bradley_terry_loss(rewards, margin=margin if with_margin else None).mean(), theirs)
