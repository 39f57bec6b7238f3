"""The verdict on held-out prompts, and the report of a run, on a real fit."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from processes import run_in
from tiny import adamw, fit, on_policy, write_pairs, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.callbacks import RunReport, WinRate
from lit_align.data import FunctionScorer, OfflinePairs, Sampling
from lit_align.data.batches import Example, collate
from lit_align.data.scorers.base import Scores
from lit_align.errors import UserError
from lit_align.evaluation.rows import read_held_out
from lit_align.evaluation.summary import Summary
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics
from lit_align.reporting.run_folder import held_out_files, verdict_file


def scorer() -> FunctionScorer:
    return FunctionScorer("rewards.py:reward")


def read_summary(folder: str) -> Summary:
    summary = Summary.read(folder)
    assert summary is not None
    return summary


def test_a_fresh_run_deletes_earlier_results_and_a_resumed_one_not(tiny_model, in_tmp):
    def run(*callbacks: Any, **options: Any) -> None:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        callbacks = (RunReport(save_model=False), *callbacks)
        fit(module, on_policy(in_tmp), *callbacks, default_root_dir="run", log_every_n_steps=1, **options)

    write_prompts(in_tmp)
    keep = ModelCheckpoint("run/checkpoints", filename="end")
    run(WinRate("prompts.jsonl", scorer()), keep, enable_checkpointing=True)
    steps = [row["step"] for row in read_metrics("run/metrics.csv")]
    run(max_epochs=2, ckpt_path="run/checkpoints/end.ckpt")
    again = [row["step"] for row in read_metrics("run/metrics.csv")]
    assert set(again) > set(steps)
    assert again == sorted(again)
    assert "Verdict" in Path("run/report.html").read_text()
    run()
    assert not Path("run/summary.json").exists()
    assert "Verdict" not in Path("run/report.html").read_text()


def test_a_checkpoint_of_the_best_win_rate_can_be_kept(tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp)
    best = ModelCheckpoint("best", monitor="val/win_rate", mode="max")
    stop = EarlyStopping("val/kl_from_start", stopping_threshold=1e9)
    verdict = WinRate("prompts.jsonl", scorer(), validation="prompts.jsonl")
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw(3e-2))
    fit(module, data, verdict, best, stop, logger=MetricsCSV("run"), enable_checkpointing=True, max_epochs=2)
    rates = [row["val/win_rate"] for row in read_metrics("run/metrics.csv") if "val/win_rate" in row]
    assert best.best_model_score == pytest.approx(max(rates))
    said = capsys.readouterr().out
    assert said.count("held-out policy") == len(rates) == 1
    assert "test policy" not in said, "the verdict is on the answers of the last validation"


def test_the_verdict_has_the_best_of_n_of_the_starts_responses(tiny_model, in_tmp, capsys):
    def verdict(**options: Any) -> Summary:
        data = on_policy(in_tmp)
        judged = WinRate("prompts.jsonl", scorer(), judges={"other": scorer()}, responses_per_prompt=2, **options)
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data, judged)
        assert judged.evaluation is not None
        return judged.evaluation.summary

    few = verdict()
    assert [*few.training.best_of_n] == ["2"]
    rows = read_held_out(verdict_file("."))
    best = [max(scored.rewards_start) for row in rows if (scored := row.scored_by("training"))]
    assert few.training.best_of_n["2"].reward.value == pytest.approx(sum(best) / len(best), rel=1e-6)
    capsys.readouterr()
    many = verdict(best_of=8)
    found = many.scorers["other"].best_of_n
    assert [*found] == ["2", "4", "8"]
    assert found == many.training.best_of_n  # the same scorer
    rewards = [each.reward.value for each in found.values()]
    assert [many.training.reward_start.value, *rewards] == sorted([many.training.reward_start.value, *rewards])
    assert "best of 8 of the start's responses, at KL 1.20" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"win_rate.best_of=1 must be at least 2"):
        WinRate("prompts.jsonl", scorer(), best_of=1)


def test_an_interval_without_prompts_to_answer_is_refused(in_tmp):
    write_prompts(in_tmp)
    with pytest.raises(UserError, match=r"win_rate.every=3 rounds has no effect without win_rate.validation"):
        WinRate("prompts.jsonl", scorer(), every=3)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_a_policy_that_has_not_moved_ties_with_itself(tiny_model, in_tmp, lora):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), judges={"other": scorer()})
    fit(
        DPO(PolicyConfig(tiny_model, dtype="float32"), lora=lora, optimizer=adamw(0.0)),
        data,
        verdict,
        default_root_dir="run",
    )
    summary = read_summary("run")
    assert summary.training.win_rate == (0.5, 0.5, 0.5)
    assert summary.training.reward_start == summary.training.reward_end
    assert summary.kl_from_start.value == 0
    assert summary.scorers["other"] == summary.training
    assert summary.training.identity == scorer().identity


def test_a_run_leaves_its_verdict_its_curves_and_a_model_that_reloads(tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), validation="prompts.jsonl", responses_per_prompt=2)
    module = DPO(PolicyConfig(tiny_model), lora=LoRAConfig(r=4), optimizer=adamw(3e-2))
    fit(module, data, verdict, RunReport(), max_epochs=2, default_root_dir="run", log_every_n_steps=1)

    summary = read_summary("run")
    assert summary.kl_from_start.value > 0.1
    assert summary.training.win_rate.low <= summary.training.win_rate.value <= summary.training.win_rate.high

    rows = read_metrics(in_tmp / "run" / "metrics.csv")
    rounds = [row["round"] for row in rows if "round/pairs" in row]
    assert rounds == [0, 1]
    assert len([row for row in rows if "val/win_rate" in row]) == 2
    assert (in_tmp / "run" / "curves.png").stat().st_size > 10_000

    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert AutoTokenizer.from_pretrained("run/model").chat_template
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.float(), module.policy.merged_copy()(ids).logits.float())

    said = capsys.readouterr().out
    for piece in (
        "objective",
        "DPO: −log σ",
        "reference",
        "step-0 check",
        "round 2 of 2",
        "before",
        "after",
        "run/model",
    ):
        assert piece in said


def test_testing_makes_the_report_of_the_run_again(tiny_model, in_tmp):
    fit(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp), RunReport(), default_root_dir="run", log_every_n_steps=1)
    report = in_tmp / "run" / "report.html"
    before = report.read_text()
    tester = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir="run", enable_model_summary=False,
        callbacks=[WinRate("prompts.jsonl", scorer()), RunReport()],
    )  # fmt: skip
    tester.test(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp))
    assert "at equal length" not in before
    assert "at equal length" in report.read_text()


def test_missing_held_out_prompts_are_found_before_training(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    with pytest.raises(UserError, match=r"no_such.jsonl"):
        fit(DPO(PolicyConfig(tiny_model)), data, WinRate("no_such.jsonl", scorer()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 40, "long_prompts": "error"}, "held_out.jsonl.*max_prompt_length=40"),
        (
            {"sampling": Sampling(max_new_tokens=470)},
            "model has 512 positions, and the longest prompt of held_out.jsonl has 60 tokens",
        ),
    ],
)
def test_prompts_that_cannot_be_answered_are_found_before_training(tiny_model, in_tmp, options, message):
    Path("held_out.jsonl").write_text(json.dumps({"prompt": 60 * "a"}) + "\n")
    with pytest.raises(UserError, match=message):
        fit(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp, **options), WinRate("held_out.jsonl", scorer()))
    assert not Path("rounds").exists()


def test_testing_a_checkpoint_gives_the_verdict_of_its_run(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer())
    trainer = fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(3e-2)), data, verdict, default_root_dir="run")
    trainer.save_checkpoint("run.ckpt")
    first = (in_tmp / "run" / "summary.json").read_text()
    again = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir="test", enable_model_summary=False,
        callbacks=[WinRate("prompts.jsonl", scorer())],
    )  # fmt: skip
    again.test(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp), ckpt_path="run.ckpt")
    assert json.loads((in_tmp / "test" / "summary.json").read_text()) == json.loads(first)
    assert json.loads(first)["step"] == trainer.global_step > 0


def test_held_out_prompts_have_columns_and_should_not_be_trained_on(tiny_model, in_tmp, capsys):
    rows = [{"question": f"Q{i}", "note": "x"} for i in range(4)]
    (in_tmp / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"columns": {"prompt": "{question}?"}, "ignore_columns": ["note"], "responses_per_prompt": 1}
    data = on_policy(in_tmp)
    judged = WinRate("held_out.jsonl", scorer(), **options)
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(3e-2)), data, judged, max_steps=1)
    assert "caution" not in capsys.readouterr().out
    assert judged.evaluation is not None
    assert [row.prompt for row in judged.evaluation.rows()] == ["Q0?", "Q1?", "Q2?", "Q3?"]
    again = WinRate("prompts.jsonl", scorer(), responses_per_prompt=1)
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(3e-2)), on_policy(in_tmp), again, max_steps=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "win_rate.prompts=prompts.jsonl is trained on, so these prompts are not held out" in said


def test_test_pairs_are_reported(tiny_model, in_tmp):
    path = write_pairs(in_tmp, 7)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (values,) = trainer.test(DPO(PolicyConfig(tiny_model)), OfflinePairs(path, test=path, batch_size=3), verbose=False)
    assert values["test/loss"] == pytest.approx(0.6931472)
    assert "test/reward_margin" in values


def test_own_responses_forgetting_and_every_prompt_are_reported(tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp)
    rows = [{"prompt": f"Say {i}", "completion": f" well {i}"} for i in range(10)]
    (in_tmp / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = WinRate(
        "answers.jsonl", scorer(), judges={"other": scorer()}, validation="answers.jsonl", every=2, unit="step",
        own_responses=True, forgetting={"texts": "answers.jsonl"}, responses_per_prompt=2,
    )  # fmt: skip
    module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(3e-2))
    fit(module, data, verdict, default_root_dir="run", log_every_n_steps=1)
    summary = read_summary("run")
    own = [float(sum(map(ord, row["completion"])) % 17) for row in rows]
    assert summary.training.data is not None
    assert summary.training.data.reward.value == pytest.approx(sum(own) / len(own))
    assert summary.scorers["other"].data == summary.training.data

    forgetting = summary.forgetting["texts"]
    start = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert forgetting.nll_start == pytest.approx(nll_by_hand(start, module.tokenizer, rows), rel=1e-5)
    after = nll_by_hand(module.policy.merged_copy(torch.float32), module.tokenizer, rows)
    assert forgetting.nll_end == pytest.approx(after, rel=1e-5)
    assert forgetting.change.low <= forgetting.change.value <= forgetting.change.high
    said = capsys.readouterr().out
    assert "forgetting texts 10/10 prompts" in said
    assert "test policy" in said, "the policy has moved since its last validation"

    table = read_held_out(verdict_file("run"))
    assert [row.prompt for row in table] == [row["prompt"] for row in rows]
    training, other = zip(*(row.scorers for row in table), strict=True)
    assert [scored.reward_data for scored in training] == own
    assert sum(scored.win_rate for scored in training) / 10 == pytest.approx(summary.training.win_rate.value)
    rewards = [reward for scored in other for reward in scored.rewards]
    assert sum(rewards) / len(rewards) == pytest.approx(summary.training.reward_end.value)
    kl = [a - b for row in table for a, b in zip(row.logps, row.logps_start, strict=True)]
    assert sum(kl) / len(kl) == pytest.approx(summary.kl_from_start.value)
    batch = collate([Example(row.prompt_ids, row.response_ids, row.source) for row in table[:1]], [0])
    with torch.no_grad():
        assert module.policy(batch)[0].tolist() == pytest.approx(table[0].logps, abs=1e-4)
    assert [path.name for path in held_out_files("run")] == ["validation-000002.parquet"]


def nll_by_hand(model, tokenizer, rows) -> float:
    """Negative log-likelihood per response token, from plain transformers."""
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        response = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits.float().log_softmax(-1)[0]
        total -= sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))
        tokens += len(response)
    return total / tokens


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("training", "is the scorer that training uses"),
        ("low", "val/win_rate_low already exists"),
        ("a/b", "must be letters, digits, _ and -"),
        ("", "must be letters"),
    ],
)
def test_judges_need_names_of_their_own(in_tmp, name, said):
    write_prompts(in_tmp)
    with pytest.raises(UserError, match=rf"win_rate\.judges: .*{said}"):
        WinRate("prompts.jsonl", scorer(), judges={name: scorer()})


def test_a_judge_may_have_the_name_of_a_result(tiny_model, in_tmp):
    names = ["data", "forgetting", "prompts", "back_end", "win_rate"]
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), judges={name: scorer() for name in names})
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(0.0)), data, verdict, default_root_dir="run")
    assert list(read_summary("run").scorers) == ["training", *names]


def test_two_processes_share_the_work_and_give_the_same_numbers(tiny_model, in_tmp):
    write_prompts(in_tmp)
    rows = [{"prompt": f"Say {i}", "completion": f" well {i}"} for i in range(40)]
    (in_tmp / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(processes: int) -> None:
        verdict = WinRate(
            "prompts.jsonl",
            scorer(),
            batch_size=10,
            responses_per_prompt=2,
            forgetting={"texts": "texts.jsonl"},
            validation="prompts.jsonl",
        )
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(0.0))
        data = on_policy(in_tmp, batch_size=1, prompts_per_round=4)
        strategy = "ddp" if processes > 1 else "auto"
        fit(module, data, verdict, default_root_dir=f"run{processes}", devices=processes, strategy=strategy)

    for processes in (1, 2):
        run_in(processes, run, processes)
    one, two = (json.loads((in_tmp / f"run{n}" / "summary.json").read_text()) for n in (1, 2))
    assert (one.pop("step"), two.pop("step")) == (4, 2)
    assert one == two
    files = [[Path(f"run{n}/held_out/test.parquet"), *held_out_files(f"run{n}")] for n in (1, 2)]
    for first, second in zip(*files, strict=True):
        assert pq.read_table(first).equals(pq.read_table(second))


class Grades(FunctionScorer):
    """Two grades of each response; the reward is their mean."""

    def __call__(self, prompts, responses):
        lengths = [float(len(response)) for response in responses]
        return Scores([each + 0.5 for each in lengths], {"brevity": lengths, "taste": [each + 1 for each in lengths]})


def test_a_judges_grades_are_reported_with_intervals(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), judges={"grades": Grades("rewards.py:reward")})
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(0.0)), data, verdict, default_root_dir="run")
    judged = read_summary("run").scorers["grades"]
    brevity, taste = judged.parts["brevity"], judged.parts["taste"]
    assert brevity.start == brevity.end
    assert brevity.end.value == pytest.approx(taste.end.value - 1)
    assert judged.reward_end.value == pytest.approx(brevity.end.value + 0.5)
    assert brevity.end.low < brevity.end.value < brevity.end.high
