"""On-policy rounds: sampled once, by the right policy, and resumed to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from tiny import adamw, fit, on_policy, round_store, write_pairs

from lit_align.callbacks import Drift, ReferenceRefresh, RunReport
from lit_align.data import (
    AllPairs,
    BestWorst,
    ContinuousBatchingSampler,
    EnsembleScorer,
    FunctionScorer,
    GenerateSampler,
    Listwise,
    OfflinePairs,
    OnPolicyPairs,
    Sampling,
)
from lit_align.data.batches import Example
from lit_align.errors import UserError
from lit_align.objectives import DPO, EXO, KTO, SPPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics

LORA = LoRAConfig(r=4, dropout=0.2)


class Rounds(Callback):
    """Keeps the examples of each round, and with which weights they were made."""

    def __init__(self) -> None:
        self.made: list[list[Example]] = []
        self.at: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.made.append(list(trainer.datamodule.current_round.examples))
        self.at.append(trainer.datamodule.current_round.step)


def module_of(tiny_model: str, **options: Any) -> DPO:
    return DPO(PolicyConfig(tiny_model), optimizer=adamw(), **({"proximal": 0.1} | options))


def state(module: DPO) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:3]


def test_each_epoch_is_a_round_sampled_by_the_current_policy(tiny_model, in_tmp):
    rounds = Rounds()
    module = module_of(tiny_model)
    fit(module, on_policy(in_tmp, prompts_per_round="chunk"), rounds, max_epochs=3)
    sources = [{example.source for example in made} for made in rounds.made]
    assert rounds.at == [0, 3, 6] or rounds.at[0] == 0 < rounds.at[1] < rounds.at[2]
    assert not (sources[0] & sources[1])
    assert not (sources[1] & sources[2])
    assert len(list((in_tmp / "rounds").iterdir())) == 3


def test_each_epoch_of_a_second_fit_is_a_round_too(tiny_model, in_tmp):
    module, data, rounds = module_of(tiny_model), on_policy(in_tmp, prompts_per_round="chunk"), Rounds()
    fit(module, data, max_epochs=2)
    fit(module, data, rounds, max_epochs=2)
    first, second = ({example.source for example in made} for made in rounds.made)
    assert data.rounds_made == 4
    assert not first & second


@pytest.mark.parametrize("sampler", [GenerateSampler(), ContinuousBatchingSampler()], ids=["generate", "continuous"])
def test_sampler_logps_are_those_of_the_policy_that_sampled(tiny_model, in_tmp, sampler):
    """log π_s is the model's own, regardless of the sampler's filters."""

    class Compare(Callback):
        def __init__(self) -> None:
            self.off: list[float] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            for batch in trainer.datamodule.train_dataloader():
                with torch.no_grad():
                    self.off.append((pl_module.policy(batch) - batch.sampler_logps).abs().max().item())

    compare, sampling = Compare(), Sampling(max_new_tokens=8, temperature=0.5, top_k=9)
    fit(module_of(tiny_model), on_policy(in_tmp, sampler=sampler, sampling=sampling), compare, max_epochs=2)
    assert max(compare.off) < 1e-4


@pytest.mark.parametrize("objective", [DPO, KTO])
def test_unread_sampler_logps_can_be_left_out(tiny_model, in_tmp, objective):
    def run(record_sampler: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        module = objective(PolicyConfig(tiny_model), optimizer=adamw())
        data = on_policy(in_tmp, record_sampler=record_sampler)
        fit(module, data, max_epochs=2)
        return state(module), [vars(row) for row in round_store(data).samples.read(0) or []]

    (recorded, with_logps), (unrecorded, without) = run(True), run(False)
    assert_same(recorded, unrecorded)
    assert [row.pop("sampler_logps") for row in without] == [None] * len(without)
    assert all(row.pop("sampler_logps") for row in with_logps)
    assert with_logps == without


@pytest.mark.parametrize(
    ("module", "callbacks", "said"),
    [
        (lambda policy: DPO(policy, proximal=0.1), [], r"DPO, as configured, reads log π_s .*record_sampler"),
        (lambda policy: SPPO(policy, estimate_baseline=True), [], "SPPO, as configured, reads log π_s"),
        (lambda policy: DPO(policy), [Drift()], "drift reads log π_s"),
    ],
)
def test_unrecorded_sampler_logps_are_refused_where_they_are_read(tiny_model, in_tmp, module, callbacks, said):
    objective = module(PolicyConfig(tiny_model))
    pairing = Listwise() if objective.data_needs().needs_whole_groups else None
    with pytest.raises(UserError, match=said):
        fit(objective, on_policy(in_tmp, record_sampler=False, pairing=pairing), *callbacks)


@pytest.mark.parametrize("option", ["validation", "test"])
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda policy: DPO(policy, proximal=0.1), "must record log π_s, which DPO as configured reads, .* Leave"),
        (lambda policy: KTO(policy, proximal=0.1), "must record log π_s, which KTO as configured reads, .* Leave"),
        (lambda policy: SPPO(policy), "must have rewards, from which SPPO as configured learns. Add them .*, or leave"),
        (
            lambda policy: EXO(policy, reward_temperature=0.1),
            "must have rewards, from which EXO as configured learns. Add",
        ),
    ],
)
def test_file_pairs_without_the_objectives_needs_are_refused(tiny_model, in_tmp, option, module, said):
    data = on_policy(in_tmp, **{option: write_pairs(in_tmp)})
    with pytest.raises(UserError, match=rf"data.{option}=.*pairs.jsonl {said}"):
        fit(module(PolicyConfig(tiny_model)), data)
    assert not list(in_tmp.glob("rounds/*"))


def test_file_pairs_with_rewards_validate_sppo_and_exo(tiny_model, in_tmp):
    row = {"prompt": "Q", "chosen": "yes", "rejected": "no", "score_chosen": 2, "score_rejected": 1}
    Path("scored.jsonl").write_text(json.dumps(row) + "\n")
    for module in (SPPO(PolicyConfig(tiny_model)), EXO(PolicyConfig(tiny_model), reward_temperature=0.1)):
        trainer = fit(module, on_policy(in_tmp, validation="scored.jsonl"))
        assert "val/loss" in trainer.callback_metrics


def test_the_chosen_response_has_the_higher_reward(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    fit(module_of(tiny_model), data)
    stored = {row.source: row for n in range(2) for row in round_store(data).samples.read(n) or []}
    for example in data.current_round.examples:
        row = stored[example.source]
        texts = [row.responses[row.response_ids.index(ids)] for ids in example.response_ids]
        assert [float(sum(map(ord, text)) % 17) for text in texts] == example.rewards
        assert example.rewards[0] > example.rewards[1]


REFRESHES = {
    "no refresh": [],
    "soft": [(0.5, 1, "step")],
    "hard": [(1.0, 2, "step")],
    "round": [(1.0, 1, "round")],
}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA with dropout"])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_a_run_resumed_at_any_step_ends_in_the_same_bits(tiny_model, in_tmp, lora, refresh):
    """Mid-epoch, at a round's last batch, and between rounds; the moved reference included."""

    def run(folder: str, *keep: Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module = module_of(tiny_model, lora=lora)
        callbacks = [ReferenceRefresh(*rule) for rule in REFRESHES[refresh]]
        data = on_policy(in_tmp, store=f"{folder}/rounds")
        fit(module, data, *callbacks, *keep, ckpt_path=ckpt_path, max_epochs=3, enable_checkpointing=bool(keep))
        return state(module)

    keep = ModelCheckpoint("whole/checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = run("whole", keep)
    checkpoints = sorted(Path("whole/checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(checkpoints) >= 6
    for checkpoint in checkpoints[1::2]:
        shutil.copytree("whole/rounds", "again/rounds", dirs_exist_ok=True)
        assert_same(whole, run("again", ckpt_path=str(checkpoint)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"responses_per_prompt": 2}, "data.responses_per_prompt"),
        ({"prompts_per_round": 4}, "data.prompts"),
        ({"sampling": Sampling(max_new_tokens=8, temperature=0.5)}, "data.sampling"),
        ({"sampling_batch_size": 8}, "data.sampling_batch_size"),
        ({"seed": 2}, "data.seed and data.prompts"),
        ({}, "data.prompts"),
    ],
    ids=["K", "fewer prompts", "sampling", "batches", "seed", "a prompt less in the file"],
)
def test_within_a_round_only_the_same_settings_resume(tiny_model, in_tmp, change, named):
    keep = ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module_of(tiny_model), on_policy(in_tmp), keep, enable_checkpointing=True)
    data = on_policy(in_tmp, **change)
    if not change:
        lines = Path("prompts.jsonl").read_text().splitlines(keepends=True)
        Path("prompts.jsonl").write_text("".join(lines[1:]))
    module = module_of(tiny_model)
    options = ["responses_per_prompt", "prompts_per_round", "sampling.temperature", "sampling_batch_size", "seed"]
    module.accept_changes = [f"data.{option}" for option in [*options, "prompts"]]
    with pytest.raises(
        UserError,
        match=rf"^ckpt_path=checkpoints/step=1\.ckpt: the checkpoint is from the middle of "
        rf"round 1, .* sampled with another {named}\. ",
    ):
        fit(module, data, ckpt_path="checkpoints/step=1.ckpt")


def test_the_policys_temperature_enters_recorded_logps(tiny_model, in_tmp):
    def run(temperature: float, *callbacks: Callback, **options: Any) -> list[float]:
        module, rounds = module_of(tiny_model), Rounds()
        module.policy_config.temperature = temperature
        module.accept_changes = ["model.policy.temperature"]
        fit(module, on_policy(in_tmp), rounds, *callbacks, **options)
        return [logp for example in rounds.made[0] for logp in [*example.sampler_logps, *example.reference_logps]]

    keep = ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    plain = run(1.0, keep, enable_checkpointing=True)
    assert run(0.7) != plain
    assert run(1.0) == plain
    with pytest.raises(UserError, match=r"sampled with another model.policy.temperature"):
        run(0.7, ckpt_path="checkpoints/step=1.ckpt")


def test_between_rounds_other_settings_resume(tiny_model, in_tmp):
    keep = ModelCheckpoint("checkpoints", save_on_train_epoch_end=True, filename="{epoch}")
    fit(module_of(tiny_model), on_policy(in_tmp), keep, enable_checkpointing=True)
    data, module = on_policy(in_tmp, responses_per_prompt=2), module_of(tiny_model)
    module.accept_changes = ["data.responses_per_prompt"]
    fit(module, data, ckpt_path="checkpoints/epoch=0.ckpt", max_epochs=2)
    assert data.rounds_made == 2
    assert {len(group.response_ids) for group in data.current_round.groups} == {2}


def test_the_same_command_again_samples_nothing(tiny_model, in_tmp, monkeypatch):
    first, second = module_of(tiny_model), module_of(tiny_model)
    fit(first, on_policy(in_tmp), max_epochs=2)
    monkeypatch.setattr("lit_align.data.samplers.generate.sample_responses", None)
    fit(second, on_policy(in_tmp), max_epochs=2)
    assert_same(state(first), state(second))


def test_a_later_policy_never_replaces_lost_responses(tiny_model, in_tmp):
    keep = ModelCheckpoint("ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module_of(tiny_model), on_policy(in_tmp), keep, enable_checkpointing=True, max_epochs=2)
    shutil.rmtree("rounds")
    with pytest.raises(UserError, match=r"the responses of round 1, .* no longer in .*rounds.*Restore that folder"):
        fit(module_of(tiny_model), on_policy(in_tmp), ckpt_path="ckpt/step=1.ckpt", max_epochs=2)


def test_only_a_copied_reference_that_does_not_move_is_recorded(tiny_model, in_tmp):
    rounds = Rounds()
    fit(module_of(tiny_model), on_policy(in_tmp, store="full"), rounds)
    fit(module_of(tiny_model, lora=LORA), on_policy(in_tmp, store="lora"), rounds)
    fit(module_of(tiny_model), on_policy(in_tmp, store="step"), rounds, ReferenceRefresh(1.0, 2))
    fit(module_of(tiny_model), on_policy(in_tmp, store="round"), rounds, ReferenceRefresh(1.0, 1, "round"))
    recorded = [made[0].reference_logps is not None for made in rounds.made]
    assert recorded == [True, False, False, True]


def test_a_refresh_by_round_precedes_the_next_recording(tiny_model, in_tmp):
    """SPPO's setting: reference ← policy each round, so that both anchors of a round's pairs are one."""
    rounds = Rounds()
    fit(module_of(tiny_model), on_policy(in_tmp), rounds, ReferenceRefresh(1.0, 1, "round"), max_epochs=2)
    for example in rounds.made[1]:
        assert example.reference_logps == pytest.approx(example.sampler_logps, abs=1e-4)


def test_prompts_cycle_when_exhausted(tiny_model, in_tmp):
    rounds = Rounds()
    fit(module_of(tiny_model), on_policy(in_tmp, prompts_per_round=20), rounds, max_epochs=2)
    sources = [{example.source for example in made} for made in rounds.made]
    assert sources[0] & sources[1]
    assert len(sources[0] | sources[1]) > 20


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        (
            {"prompts_per_round": 25},
            {},
            "data.prompts_per_round=25 must be at most 24, .* prompts in .*prompts.jsonl. Lower it, or use all",
        ),
        ({"prompts_per_round": "chunk"}, {"max_epochs": 30}, "has 24 prompts for trainer.max_epochs=30 rounds"),
        (
            {"sampling": Sampling(max_new_tokens=500)},
            {},
            "max_new_tokens=500 must be at most 478: the model has 512 positions, and .*prompts.jsonl has 34 tokens",
        ),
    ],
)
def test_impossible_rounds_are_refused_before_sampling(tiny_model, in_tmp, options, trainer, message):
    with pytest.raises(UserError, match=message):
        fit(module_of(tiny_model), on_policy(in_tmp, **options), **trainer)
    assert not list(in_tmp.glob("rounds/*/samples*"))


def test_a_round_without_pairs_says_why(tiny_model, in_tmp):
    with pytest.raises(UserError, match="round 1 gives no pair to train on: of 8 prompts, 8 margin too small"):
        fit(module_of(tiny_model), on_policy(in_tmp, pairing=BestWorst(min_margin=900)))


def test_the_pace_of_a_phase_counts_only_computed_prompts(tiny_model, in_tmp):
    phases = ("sample", "score", "train")
    for again in (False, True):
        data = on_policy(in_tmp)
        fit(module_of(tiny_model), data, RunReport(save_model=False), logger=MetricsCSV(f"log{again}"))
        logged = {key: value for row in read_metrics(f"log{again}/metrics.csv") for key, value in row.items()}
        for phase in phases if not again else phases[2:]:
            prompts = len(data.current_round.examples) if phase == "train" else 8
            expected = 60 * prompts / logged[f"round/seconds_{phase}"]
            assert logged[f"round/prompts_per_minute_{phase}"] == pytest.approx(expected)
        assert ("round/prompts_per_minute_sample" in logged) != again


def test_the_counts_of_a_round_are_printed(tiny_model, in_tmp, capsys):
    fit(module_of(tiny_model), on_policy(in_tmp, pairing=BestWorst(min_margin=9)))
    said = capsys.readouterr().out
    assert "round 1 of 1" in said
    assert "8/8 prompts" in said
    assert "margin too small" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"responses_per_prompt": 1}, "data.responses_per_prompt=1 must be at least 2"),
        (
            {"responses_per_prompt": 8, "sampling_batch_size": 4},
            "data.sampling_batch_size=4 must be at least data.responses_per_prompt=8",
        ),
        ({"prompts_per_round": 0}, "data.prompts_per_round=0 must be at least 1"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused_at_once(in_tmp, options, message):
    with pytest.raises(UserError, match=message):
        on_policy(in_tmp, **options)


def test_a_prompt_over_the_limit_is_named_before_sampling(tiny_model, in_tmp):
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the prompt has 15 tokens, but max_prompt_length=4"):
        fit(module_of(tiny_model), on_policy(in_tmp, max_prompt_length=4))


@pytest.mark.parametrize("code", ["[float('nan')] * len(responses)", "[1.0]", "1 / 0"])
def test_a_failing_scorer_stops_the_round_and_samples_are_kept(tiny_model, in_tmp, code, monkeypatch):
    data = on_policy(in_tmp)
    (in_tmp / "bad.py").write_text(f"def reward(prompts, responses): return {code}\n")
    from lit_align.data import FunctionScorer

    good, data.scorer = data.scorer, FunctionScorer("bad.py:reward")
    with pytest.raises(UserError, match=r"scorer bad.py:reward"):
        fit(module_of(tiny_model), data)
    monkeypatch.setattr("lit_align.data.samplers.generate.sample_responses", None)  # nothing is sampled again
    again: OnPolicyPairs = on_policy(in_tmp)
    again.scorer = good
    fit(module_of(tiny_model), again)


def test_another_pairing_or_scorer_reuses_the_samples(tiny_model, in_tmp, monkeypatch):
    fit(module_of(tiny_model), on_policy(in_tmp))
    files = sorted(path.name for path in Path("rounds").glob("*/samples-*"))
    monkeypatch.setattr("lit_align.data.samplers.generate.sample_responses", None)
    rounds = Rounds()
    fit(module_of(tiny_model), on_policy(in_tmp, pairing=AllPairs()), rounds)
    assert len(rounds.made[0]) > 8
    (in_tmp / "length.py").write_text("def reward(prompts, responses): return list(map(len, responses))\n")
    data = on_policy(in_tmp)
    data.scorer = FunctionScorer("length.py:reward")
    fit(module_of(tiny_model), data, rounds)
    stored = {row.source: row for n in range(2) for row in round_store(data).samples.read(n) or []}
    for example in rounds.made[1]:
        row = stored[example.source]
        texts = [row.responses[row.response_ids.index(ids)] for ids in example.response_ids]
        assert example.rewards == [float(len(text)) for text in texts]
        assert len(texts[0]) > len(texts[1])
    assert sorted(path.name for path in Path("rounds").glob("*/samples-*")) == files
    assert len(list(Path("rounds").iterdir())) == 1


@pytest.mark.parametrize("part", ["samples", "scores"])
def test_only_the_damaged_batch_is_computed_again(tiny_model, in_tmp, monkeypatch, capsys, part):
    from lit_align.data.samplers import generate as code

    whole, again = Rounds(), Rounds()
    fit(module_of(tiny_model), on_policy(in_tmp), whole)
    before = {path.name: path.read_bytes() for path in Path("rounds").glob("*/*.parquet")}
    (damaged,) = Path("rounds").glob(f"*/{part}*-00001.parquet")
    content = damaged.read_bytes()
    place = content.index(b"prompts.jsonl")  # a byte of a row
    damaged.write_bytes(content[:place] + b"P" + content[place + 1 :])
    sampled: list[int] = []
    original = code.sample_responses
    monkeypatch.setattr(code, "sample_responses", lambda *args: sampled.append(1) or original(*args))
    fit(module_of(tiny_model), on_policy(in_tmp), again)
    assert len(sampled) == (part == "samples")
    assert f"{damaged.name} cannot be read" in capsys.readouterr().out.replace("\n", "")
    assert again.made == whole.made
    assert {path.name: path.read_bytes() for path in Path("rounds").glob("*/*.parquet")} == before


def test_rounds_train_offline_too(tiny_model, in_tmp):
    fit(module_of(tiny_model), on_policy(in_tmp), max_epochs=2)
    offline = OfflinePairs("rounds", batch_size=4, pairing=BestWorst(min_margin=2.0))
    fit(module_of(tiny_model, proximal=0.0), offline)
    assert "ranked responses with rewards" in offline.summary
    for example in offline.train_examples:
        assert example.rewards
        assert example.rewards[0] - example.rewards[-1] > 2


def test_an_ensembles_members_and_disagreement_are_logged(tiny_model, in_tmp):
    (in_tmp / "length.py").write_text("def reward(prompts, responses): return list(map(len, responses))\n")
    data = on_policy(in_tmp)
    data.scorer = EnsembleScorer({"ords": data.scorer, "length": FunctionScorer("length.py:reward")})
    fit(module_of(tiny_model), data, logger=MetricsCSV("log"))
    (logged,) = [row for row in read_metrics("log/metrics.csv") if "round/reward" in row]
    assert logged["round/reward"] == pytest.approx((logged["round/reward_ords"] + logged["round/reward_length"]) / 2)
    assert logged["round/reward_disagreement"] > 0


@pytest.mark.parametrize("options", [{"ties": "half"}, {"labels": "soft"}])
def test_soft_labels_reach_the_loss_or_are_refused(tiny_model, in_tmp, options):
    fit(module_of(tiny_model), on_policy(in_tmp, pairing=AllPairs(**options)))
    module = SPPO(PolicyConfig(tiny_model), optimizer=adamw())
    with pytest.raises(UserError, match=r"data.pairing=AllPairs: soft labels .* have no effect on SPPO"):
        fit(module, on_policy(in_tmp, pairing=AllPairs(**options)))


@pytest.mark.parametrize(
    "change", [{"made_at": "x"}, {"key": []}, {"key": {"round": 0, "seed": torch.ones(2)}}], ids=str
)
def test_a_checkpoints_round_of_another_form_is_refused(in_tmp, change):
    data = on_policy(in_tmp)
    data.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.state.fn = TrainerFn.FITTING
    state = {"rounds_made": 1, "made_at": 0, "epoch": 0, "key": {"round": 0}, "sampling_prompt": "answer"}
    data.load_state_dict(state)
    with pytest.raises(TypeError):
        data.load_state_dict(state | change)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("half_written", [True, False], ids=["while writing", "after writing"])
def test_a_run_killed_at_any_write_resumes_to_the_same_bytes(tiny_model, in_tmp, monkeypatch, half_written):
    """Samples, scores and log π_ref: each is computed once, with the bytes of an uninterrupted run."""
    from lit_align.data.rounds import store

    written: list[str] = []
    original = store.write_whole

    def write(path: Path, how: Any) -> None:
        if len(written) == last:
            if half_written:
                path.with_name(f".{path.name}.1").write_bytes(b"PAR1 and no more")
                raise Killed
            original(path, how)
            written.append(path.name)
            raise Killed
        original(path, how)
        written.append(path.name)

    monkeypatch.setattr(store, "write_whole", write)
    monkeypatch.setattr(store, "write_text", lambda path, text: write(path, lambda beside: beside.write_text(text)))

    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(folder).glob("*/*.*") if not path.name.startswith(".")}

    last = -1
    fit(module_of(tiny_model), on_policy(in_tmp, store="whole"))
    whole, count = files("whole"), len(written)
    assert count == 6  # the key, two batches of samples and of scores, one of log π_ref
    for kill in range(count):
        written.clear()
        last = kill
        with pytest.raises(Killed):
            fit(module_of(tiny_model), on_policy(in_tmp, store=f"killed{kill}"))
        last = -1
        fit(module_of(tiny_model), on_policy(in_tmp, store=f"killed{kill}"))
        assert len(written) == len(set(written)) == count
        assert files(f"killed{kill}") == whole
