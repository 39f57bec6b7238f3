"""Which examples a file's rows become, by the pairing rule or without one."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in
from tiny import Watch, adamw, byte_tokenizer, fit, write_pairs

from lit_align.data import AllPairs, BestWorst, Listwise, OfflinePairs
from lit_align.data.batches import Example, collate
from lit_align.data.examples import Source
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives import DPO, IPO, KTO, RewardModel
from lit_align.policy import PolicyConfig
from lit_align.reference.config import ReferenceConfig


def pair(better: float, worse: float | None, **more: Any) -> dict[str, Any]:
    row = {"prompt": "Q", "chosen": "yes", "rejected": "no", "score_chosen": better, "score_rejected": worse}
    return row | more


def unscored(**more: Any) -> dict[str, Any]:
    return {"prompt": "Q", "chosen": "yes", "rejected": "no"} | more


def read(
    folder: Path, rows: list[dict[str, Any]], pairing: Any = None, kind: str = "preferences"
) -> tuple[Sequence[Example], str]:
    """The examples that an objective over this kind of rows gets, and the line about them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = OfflinePairs(str(folder / "rows.jsonl"), pairing=pairing)
    module = SimpleNamespace(
        tokenizer=byte_tokenizer(chat=False),
        data_needs=lambda: DataNeeds(data_kind=kind, takes_labels=True, takes_groups=True),
    )
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    data.setup("fit")
    return data.train_examples, data.summary


@pytest.mark.parametrize(
    ("pairing", "reason"),
    [
        (BestWorst(min_margin=1.5), "1 margin too small"),
        (BestWorst(threshold=2.5), "1 below the threshold"),
        (BestWorst(max_length=3), "1 all equal, empty or long"),  # "yes" and its end are 4 tokens
        (AllPairs(min_margin=1.5), "1 margin too small"),
        (Listwise(min_margin=1.5), "1 margin too small"),
    ],
)
def test_a_rule_chooses_from_rows_of_two_responses_too(tmp_path, pairing, reason):
    taken = pair(3, 1, chosen="a", rejected="b")
    examples, line = read(tmp_path, [pair(2, 1), taken], pairing)
    assert [(example.source, example.rewards) for example in examples] == [("rows.jsonl:2", [3.0, 1.0])]
    assert reason in line


def test_soft_labels_and_ties_hold_for_any_number_of_responses(tmp_path):
    three = {"prompt": "Q", "chosen": "a", "rejected": ["b", "c"], "score_chosen": 3, "score_rejected": [2, 1]}
    examples, _ = read(tmp_path, [three, pair(2, 1), pair(1, 1)], BestWorst(labels="soft", ties="half"))
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 0.5]
    assert [example.labels for example in examples] == pytest.approx(expected)
    assert collate(examples, range(3)).labels.tolist() == pytest.approx(expected)


def test_a_pair_of_equal_rewards_is_left_out_and_counted(tmp_path):
    examples, line = read(tmp_path, [pair(1, 1), pair(2, 1)])
    assert [example.source for example in examples] == ["rows.jsonl:2"]
    assert "1 tied" in line


@pytest.mark.parametrize("pairing", [BestWorst(min_margin=1), BestWorst(labels="soft"), AllPairs(), Listwise()])
@pytest.mark.parametrize("kind", ["preferences", "texts", "labelled"])
def test_a_rule_without_rewards_to_choose_by_is_refused(tmp_path, pairing, kind):
    words = f"data.pairing={type(pairing).__name__} has no effect .* rows of .*rows.jsonl, read as {kind}, have none"
    with pytest.raises(UserError, match=words):
        read(tmp_path, [unscored()], pairing, kind)
    assert len(read(tmp_path, [unscored()], BestWorst(), kind)[0]) == 1


def test_without_rewards_each_rejected_response_makes_a_pair(tmp_path):
    examples, _ = read(tmp_path, [unscored(rejected=["no", "never"])])
    assert [len(example.response_ids) for example in examples] == [2, 2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([pair(2, 1), pair(2, 1), unscored()], "rows.jsonl:3: the row has no rewards, but rows.jsonl:1 has some"),
        ([unscored(), pair(2, 1)], "rows.jsonl:2: the row has rewards, but rows.jsonl:1 has none"),
        ([pair(2, 1), pair(2, None)], "rows.jsonl:2: `score_chosen` holds 2, but the other side of the pair has no"),
    ],
)
def test_all_rows_have_rewards_or_none(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, rows)


def test_a_row_too_long_for_a_model_loaded_later_is_named(tiny_model, in_tmp, monkeypatch):
    """As of a GGUF file, whose number of positions is known once it is loaded."""
    rows = [{"prompt": "p", "chosen": "y" * n, "rejected": "n"} for n in (5, 600)]
    (in_tmp / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("lit_align.objectives.base.load_positions", lambda config: None)
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    with pytest.raises(UserError, match=r"long\.jsonl:2: .* have 602 tokens, but the model reads 512"):
        fit(module, OfflinePairs("long.jsonl", batch_size=1, max_response_length=700))


# --- several sources in several processes ---


class Served(Callback):
    """Records which examples each step trains on."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        self.steps.append(batch.index.tolist())


def test_data_read_for_another_run_are_refused_where_they_differ(tiny_model, in_tmp):
    shutil.copytree(tiny_model, "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained("other")
    data = OfflinePairs(write_pairs(in_tmp))
    fit(DPO(PolicyConfig(tiny_model)), data, max_steps=1)
    fit(IPO(PolicyConfig(tiny_model)), data, max_steps=1)
    for other in (DPO(PolicyConfig("./other")), KTO(PolicyConfig(tiny_model)), RewardModel(PolicyConfig(tiny_model))):
        with pytest.raises(UserError, match="holds rows that were read for an earlier run"):
            fit(other, data)


def test_recorded_log_probabilities_stay_with_their_run(tiny_model, in_tmp):
    path, watch = write_pairs(in_tmp), Watch()
    data = OfflinePairs(path, validation=path)
    fit(DPO(PolicyConfig(tiny_model), reference=ReferenceConfig("recorded")), data, watch)
    assert watch.batches[0].reference_logps is not None
    watch = Watch()
    fit(DPO(PolicyConfig(tiny_model)), data, watch)
    assert watch.batches[0].reference_logps is None
    assert next(iter(data.val_dataloader())).reference_logps is None


def test_weighted_sources_are_served_alike_by_any_number_of_processes(tiny_model, in_tmp):
    """6 + 2 · 4 + ½ · 4 examples make 4 steps of 4, of which the fourth part is another in the second epoch."""
    for name, count in {"a": 6, "b": 4, "c": 4}.items():
        rows = [{"prompt": f"{name}{i}:", "chosen": " yes", "rejected": " no"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def steps(processes: int, ckpt_path: str | None = None) -> list[list[int]]:
        served = Served()
        keep = ModelCheckpoint("kept", f"{processes}-{{step}}", every_n_train_steps=6, save_top_k=-1)
        sources: list[str | Source] = ["a.jsonl", Source("b.jsonl", weight=2), Source("c.jsonl", weight=0.5)]
        data = OfflinePairs(sources, batch_size=4 // processes, seed=1)
        strategy = "auto" if processes == 1 else "ddp"
        options = {"strategy": strategy, "devices": processes, "max_epochs": 2, "enable_checkpointing": True}
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data, served, keep, ckpt_path=ckpt_path, **options)
        return served.steps

    def in_two(*args: Any) -> list[list[int]]:
        first, second = run_in(2, steps, 2, *args)
        return [mine + other for mine, other in zip(first, second, strict=True)]

    alone, together = steps(1), in_two()
    assert [sorted(step) for step in together] == [sorted(step) for step in alone]
    counts = [Counter(index for step in alone[start : start + 4] for index in step) for start in (0, 4)]
    assert all(each[index] == 1 for each in counts for index in range(6))
    assert all(each[index] == 2 for each in counts for index in range(6, 10))
    assert counts[0] + counts[1] == Counter({i: 2 if i < 6 else 4 if i < 10 else 1 for i in range(14)})
    assert in_two("kept/1-step=6.ckpt") == together[6:]
    assert steps(1, "kept/2-step=6.ckpt") == alone[6:]
