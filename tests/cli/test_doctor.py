"""`lit-align doctor`: the estimate of a run, and what it finds missing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from processes import run_in
from tiny import write_pairs, write_prompts

from lit_align.cli import main


def config(folder: Path, model: str, data: dict) -> None:
    write_prompts(folder)
    write_pairs(folder, 20)
    written = {
        "model": {"class_path": "DPO", "init_args": {"policy": {"path": model}}},
        "data": data,
        "win_rate": {
            "prompts": "prompts.jsonl",
            "scorer": {"class_path": "FunctionScorer", "init_args": {"function": "rewards.py:reward"}},
        },
        "trainer": {"max_epochs": 2, "default_root_dir": "run", "accelerator": "cpu", "accumulate_grad_batches": 2},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(written))


ROUNDS = {
    "class_path": "OnPolicyPairs",
    "init_args": {
        "prompts": "prompts.jsonl",
        "scorer": {"class_path": "FunctionScorer", "init_args": {"function": "rewards.py:reward"}},
        "sampling": {"max_new_tokens": 4},
        "batch_size": 2,
        "sampling_batch_size": 16,
    },
}
OFFLINE = {"class_path": "OfflinePairs", "init_args": {"train": "pairs.jsonl", "batch_size": 4}}


def test_offline_pairs_get_steps_time_memory_and_an_example(tiny_model, in_tmp, capsys):
    config(in_tmp, tiny_model, OFFLINE)
    main(["doctor", "--config=dpo.yaml", "--model.warmup_steps=8"])
    said = capsys.readouterr().out
    assert "an epoch        5 batches of 4 examples" in said
    assert "steps           3 each, 6 in all" in said
    assert said.count("warm-up         8 steps, but the run has 6: the learning rate reaches 75% of its value") == 1
    for piece in (
        "DPO: −log σ",
        "20 pairs from",
        "trained on",
        "step-0 check",
        "peak memory",
    ):
        assert piece in said
    assert re.search(r"response 0: \d+ tokens, trained on\n    │ yes \d+.*<\|endoftext\|>│", said)
    assert "all checks passed: python train.py fit --config=dpo.yaml --model.warmup_steps=8" in said
    assert not Path("run").exists(), "a dry run leaves no files"


def test_texts_beside_the_pairs_and_limits_are_counted(tiny_model, in_tmp, capsys):
    texts = OFFLINE["init_args"] | {"sft": "pairs.jsonl"}
    config(in_tmp, tiny_model, OFFLINE | {"init_args": texts})
    main(["doctor", "--config=dpo.yaml", "--model.sft_weight=0.1", "--trainer.limit_train_batches=4"])
    assert "an epoch        4 batches of 4 examples" in capsys.readouterr().out


def test_rounds_are_estimated_from_a_few_prompts(tiny_model, in_tmp, capsys):
    config(in_tmp, tiny_model, ROUNDS)
    main(["doctor", "--config=dpo.yaml"])
    said = capsys.readouterr().out
    assert not re.search(r"^ *run +/", said, re.M), "the scratch folder is not the run's"
    assert re.search(r"a round +24 prompts, about 1\d batches of 2 pairs", said)
    assert re.search(r"time +[\d.]+ s = [\d.]+ s sample \+ [\d.]+ s score \+ [\d.]+ s train; about", said)
    assert not Path("run").exists()


def test_a_saved_configuration_and_a_resume_command_are_taken(tiny_model, in_tmp, capsys):
    config(in_tmp, tiny_model, OFFLINE)
    main(["fit", "--config=dpo.yaml", "--trainer.max_epochs=1", "--win_rate=null"])
    capsys.readouterr()
    main(["doctor", "--config=run/config.yaml", "--ckpt_path=run/checkpoints/last.ckpt"])
    assert "all checks passed: " in capsys.readouterr().out


def test_the_printed_fit_command_can_be_pasted(tiny_model, in_tmp, capsys, monkeypatch):
    config(in_tmp, tiny_model, OFFLINE)
    monkeypatch.setattr("sys.argv", ["/usr/bin/lit-align"])
    main(["doctor", "--config=dpo.yaml", "--model.optimizer=torch.optim.SGD", "--trainer.plugins=[]"])
    said = capsys.readouterr().out
    assert "all checks passed: lit-align fit --config=dpo.yaml --model.optimizer=torch.optim.SGD '--trainer.p" in said


@pytest.mark.parametrize("data", [ROUNDS, OFFLINE], ids=["on-policy", "offline"])
def test_several_processes_try_it_and_the_first_prints(tiny_model, in_tmp, capfd, data):
    config(in_tmp, tiny_model, data)
    run_in(2, main, ["doctor", "--config=dpo.yaml", "--trainer.strategy=ddp", "--trainer.devices=2"])
    assert capfd.readouterr().out.count("all checks passed: ") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.train=none.jsonl", "none.jsonl"),
        ("--win_rate.prompts=none.jsonl", "none.jsonl"),
        ("--data.validation=none.jsonl", "none.jsonl"),
        ("--model.beta=-1", "beta=-1.0"),
        ("--model.policy.path=./none", "there is no folder './none'"),
    ],
)
def test_missing_files_and_wrong_options_exit_with_code_2(tiny_model, in_tmp, capsys, option, said):
    config(in_tmp, tiny_model, OFFLINE)
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--config=dpo.yaml", option])
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert json.loads(Path("pairs.jsonl").read_text().splitlines()[0])["prompt"] == "p0:"


def test_all_prompts_are_sampled_if_there_are_few(tiny_model, in_tmp, capsys):
    config(in_tmp, tiny_model, ROUNDS)
    write_prompts(in_tmp, 3)
    main(["doctor", "--config=dpo.yaml"])
    assert "a round         3 prompts, about " in capsys.readouterr().out


class Watched(Callback):
    """A callback of the user's own."""

    def setup(self, trainer, pl_module, stage):
        Path("setup").touch()

    def on_train_batch_end(self, *args):
        Path("trained").touch()


def test_a_callback_of_ones_own_is_set_up_but_does_not_act(tiny_model, in_tmp, capsys):
    config(in_tmp, tiny_model, OFFLINE)
    main(["doctor", "--config=dpo.yaml", f"--trainer.callbacks+={__name__}.Watched"])
    assert Path("setup").exists()
    assert not Path("trained").exists()
