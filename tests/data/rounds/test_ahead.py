"""One round ahead: which weights sample, what they give, and what a killed run finds again."""

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in, train
from served import LoopbackServer, at_call, check_same_samples, die
from served import run as run_served
from tiny import adamw, fit, on_policy, round_store, same, weights, write_prompts

from lit_align.callbacks import Drift, WinRate
from lit_align.data import (
    ContinuousBatchingSampler,
    FunctionScorer,
    GenerateSampler,
    OnPolicyPairs,
    SampleRequest,
    Sampling,
    VLLMServerSampler,
)
from lit_align.data.batches import Example, record_logps
from lit_align.data.rounds.kept_weights import KeptWeights
from lit_align.data.rounds.make import RoundMaker
from lit_align.data.rounds.row_types import SampleRow
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics

LORA = LoRAConfig(r=4, dropout=0.2)
Weights = dict[str, torch.Tensor]


class Begins(Callback):
    """Keeps the policy's weights and the samples at the beginning of each round."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.samples: list[list[SampleRow]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(weights(pl_module))
        self.samples.append(samples(trainer.datamodule))


def samples(data: OnPolicyPairs) -> list[SampleRow]:
    return [row for number in range(2) for row in round_store(data).samples.read(number) or []]


def rounds(
    model: str, folder: str, *callbacks: Callback, lora: LoRAConfig | None = None, data: Any = None, **trainer: Any
) -> tuple[DPO, OnPolicyPairs]:
    """Three rounds of two batches."""
    module = DPO(PolicyConfig(model, dtype="float32"), lora=lora, proximal=0.1, optimizer=adamw(1e-2))
    options = {"store": f"{folder}/rounds", "rounds_ahead": 1, "sampling_dtype": "policy"}
    made = on_policy(Path(), **options | (data or {}))
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    fit(module, made, *callbacks, **{"max_epochs": 3, "enable_checkpointing": keeps} | trainer)
    return module, made


# --- which weights ---


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "LoRA with dropout"])
def test_each_round_is_sampled_by_the_policy_one_round_before(tiny_model, in_tmp, lora):
    """Responses and log π_s are to the bit those of the weights at the beginning of the round before."""
    begins = Begins()
    module, data = rounds(tiny_model, "run", begins, Drift(), lora=lora, logger=MetricsCSV("run"))
    assert not same(begins.weights[0], begins.weights[1])
    assert module.policy is not None
    for index, kept in enumerate(begins.samples):
        give(module.policy, begins.weights[max(0, index - 1)])
        assert [(row.response_ids, row.sampler_logps) for row in kept] == sampled_by(module.policy, data, index, kept)

    left = [path.name for path in Path("run/rounds").rglob("*")]
    assert not [name for name in left if name.startswith(("drawn", "weights", ".weights"))]
    with pytest.raises(AssertionError, match="call load"):
        _ = data.sampler.model  # type: ignore[attr-defined]
    assert "sampling ahead" not in {thread.name for thread in threading.enumerate()}

    logged = read_metrics(Path("run/metrics.csv"))
    assert [row["round/staleness"] for row in logged if "round/staleness" in row] == [0, 1, 1]
    divergences = [row["drift/kl_policy_sampler_begin"] for row in logged if "drift/kl_policy_sampler_begin" in row]
    assert len(divergences) == 2
    assert min(divergences) > 1e-3
    assert len([row for row in logged if "drift/kl_policy_start" in row]) == 3


def give(policy: Policy, values: Weights) -> None:
    with torch.no_grad():
        for name, weight in policy.trainable_weights():
            weight.copy_(values[name])


def sampled_by(policy: Policy, data: OnPolicyPairs, index: int, kept: list[SampleRow]) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities of a policy's responses to the prompts of a round's two batches."""
    made: list[tuple[Any, Any]] = []
    sampler = GenerateSampler()
    for rows in (kept[:4], kept[4:]):
        prompts, keys = [row.prompt_ids for row in rows], [(data.seed, index, row.source) for row in rows]
        request = SampleRequest(prompts, keys, 4, data.sampling, data.preference_tokenizer.end_ids())
        with sampler.ready(policy, torch.float32, 200):
            ids = [[response.ids for response in group] for group in sampler.sample(policy, request)]
        examples = [Example(prompt, group, "") for prompt, group in zip(prompts, ids, strict=True)]
        made += zip(ids, record_logps(policy, policy, examples, data.batch_size), strict=True)
    return made


def test_the_first_rounds_are_those_of_an_ordinary_run(tiny_model, in_tmp):
    """Ahead, the first two rounds have the start's weights: the first is the same round, under the same name."""
    begins, ordinary = Begins(), Begins()
    rounds(tiny_model, "ahead", begins, max_epochs=2)
    _, data = rounds(tiny_model, "ordinary", ordinary, data={"rounds_ahead": 0}, max_epochs=2)
    assert begins.samples[0] == ordinary.samples[0]
    assert begins.samples[1] != ordinary.samples[1]
    ours, theirs = (sorted(path.name for path in Path(f"{each}/rounds").iterdir()) for each in ("ahead", "ordinary"))
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]
    assert not [path for path in Path("ordinary/rounds").rglob("*") if path.name.startswith(("drawn", "weights"))]
    assert (data.state_dict()["next_at"], data.state_dict()["next_key"]) == (None, None)


def test_a_sampler_that_cannot_is_refused(tiny_model, in_tmp):
    with pytest.raises(UserError, match=r"rounds_ahead=1 does not work with data.sampler=ContinuousBatchingSampler"):
        rounds(tiny_model, "run", data={"sampler": ContinuousBatchingSampler()})
    with pytest.raises(UserError, match=r"rounds_ahead=2 must be 0 \| 1"):
        rounds(tiny_model, "run", data={"rounds_ahead": 2})


# --- a killed run ---


class Snapshots(Callback):
    """Copies the store at each step, as a kill would leave it."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        hidden = shutil.ignore_patterns(".*")  # files that are being written
        shutil.copytree(trainer.datamodule.folder, f"stores/{trainer.global_step}", ignore=hidden, dirs_exist_ok=True)


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "LoRA with dropout"])
def test_a_run_killed_at_any_step_ends_in_the_same_bits(tiny_model, in_tmp, lora):
    """In the middle of a round and at its end, without the responses that were sampled ahead, and then with them."""
    keep = ModelCheckpoint("ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, _ = rounds(tiny_model, "whole", Snapshots(), keep, lora=lora)
    steps = sorted(int(path.stem.split("=")[1]) for path in Path("ckpt").glob("*.ckpt"))
    assert len(steps) >= 6
    for step, without in zip(steps[1::2], itertools.cycle(["drawn-*", "nothing"]), strict=False):
        shutil.copytree(f"stores/{step}", f"again/{step}/rounds")
        for path in Path(f"again/{step}").rglob(without):
            path.unlink()
        again, _ = rounds(tiny_model, f"again/{step}", lora=lora, ckpt_path=f"ckpt/step={step}.ckpt")
        assert same(weights(again), weights(whole))


def test_a_round_is_made_while_the_next_one_is_sampled(tiny_model, in_tmp, monkeypatch):
    """The sampler has the next weights before the round is scored. A run that ends in between continues to the bit."""
    keep = ModelCheckpoint("ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, _ = rounds(tiny_model, "whole", keep)
    last = max(int(path.stem.split("=")[1]) for path in Path("ckpt").glob("*.ckpt"))
    events: list[str] = []

    def noted(kind: type, method: str) -> None:
        own = getattr(kind, method)

        def note(self: Any, *values: Any) -> Any:
            events.append(method)
            if events == before_the_end:
                raise KeyboardInterrupt
            return own(self, *values)

        monkeypatch.setattr(kind, method, note)

    before_the_end = ["load", "score", "load", "load", "score"]
    noted(GenerateSampler, "load")
    noted(RoundMaker, "score")
    with pytest.raises(SystemExit):
        rounds(tiny_model, "again", keep)
    assert len(list(Path("again/rounds").glob("*/drawn-*"))) > 2  # of both rounds
    before_the_end = []
    events.clear()
    again, _ = rounds(tiny_model, "again", ckpt_path=f"ckpt/step={last // 3}.ckpt")
    assert events.count("load") <= 1  # for what the ended run had not sampled of the third round
    assert same(weights(again), weights(whole))


def test_lost_weights_and_responses_are_named(tiny_model, in_tmp):
    keep = ModelCheckpoint("ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    rounds(tiny_model, "run", keep, max_epochs=2)
    shutil.rmtree("run/rounds")
    with pytest.raises(UserError, match=r"needs the responses of round \d, sampled at step 0, which are no longer in"):
        rounds(tiny_model, "run", max_epochs=2, ckpt_path="ckpt/step=1.ckpt")


# --- a server ---


@pytest.fixture
def server(tiny_model) -> Any:
    running = LoopbackServer(tiny_model)
    yield running
    running.stop()


def test_a_server_that_dies_while_it_samples_ahead_changes_nothing(tiny_model, server, in_tmp, capsys):
    """Neither do evaluations, for which it takes other weights when the round ahead is sampled."""
    small = {"prompts_per_round": 2, "sampling_batch_size": 4, "batch_size": 2, "sampling": Sampling(max_new_tokens=4)}
    data = {"sampler": VLLMServerSampler(server.url)} | small
    few = write_prompts(in_tmp, 3)
    reward = FunctionScorer(f"{in_tmp / 'rewards.py'}:reward")
    looks = [Drift(prompts=2), WinRate(few, reward, validation=few, responses_per_prompt=1)]
    whole, _ = rounds(tiny_model, "whole", *looks, data=data)
    # of three rounds; of start and policies in three validations; of the last round's drift, while none samples ahead
    assert server.calls.count("policy_receive") == 3 + 4 + 1
    server.calls.clear()
    at_call(server, "/v1/completions", 10, lambda: die(server))  # 8 are those of the first round
    lost, _ = rounds(tiny_model, "lost", data=data)
    assert same(weights(lost), weights(whole))
    assert "the rest of the round is sampled now" in capsys.readouterr().out
    assert server.calls.count("policy_receive") == 4


@pytest.mark.slow
def test_a_server_samples_while_sharded_processes_train(tiny_model, server, in_tmp):
    """It dies while it samples ahead. With a learning rate of 0, one process samples the same."""
    options = {"rounds": 2, "rounds_ahead": 1}
    run_served(tiny_model, in_tmp / "one", server.url, "auto", 0.0, None, **options)
    server.calls.clear()
    at_call(server, "/v1/completions", 50, lambda: die(server))
    run_in(2, lambda: run_served(tiny_model, in_tmp / "two", server.url, "fsdp2", 0.0, None, **options))
    assert server.calls.count("policy_receive") == 3
    check_same_samples(in_tmp / "one", in_tmp / "two")


def test_kept_weights_are_given_to_shards_and_taken_back(tiny_model, in_tmp):
    """The policy computes with the weights of an earlier step, and then with its own, bit by bit."""

    class Swap(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            policy = pl_module.policy
            self.kept = KeptWeights(Path("kept"))
            self.kept.keep(policy)
            self.before = policy.fingerprint()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            policy = pl_module.policy
            after = policy.fingerprint()
            with self.kept.given_to(policy):
                inside = policy.fingerprint()
            self.seen = [inside == self.before, after != self.before, policy.fingerprint() == after]

    def train_and_swap() -> list[bool]:
        swap = Swap()
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(1e-2))
        train(module, on_policy(in_tmp, batch_size=2), swap, strategy="fsdp2")
        return swap.seen

    (in_tmp / "kept").mkdir()
    assert run_in(2, train_and_swap) == [[True] * 3] * 2
