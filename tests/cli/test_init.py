"""`lit-align init`: what it prints is a configuration that `doctor` accepts."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from lit_align.cli import main
from lit_align.cli.init import Fit, Machine
from lit_align.errors import UserError

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
SCORER = "rewards.py:reward"


@pytest.fixture
def here(in_tmp):
    for name in ("pairs", "labelled", "sft"):
        shutil.copy(SAMPLES / f"{name}.jsonl", in_tmp)
    (in_tmp / "rewards.py").write_text("def reward(prompts, responses): return [float(len(r)) for r in responses]\n")
    return in_tmp


@pytest.mark.parametrize(
    ("objective", "source"),
    [
        ("SPPO", ["--data=*airs.jsonl"]),  # YAML would take a bare * for an alias
        ("KTO", ["--data=labelled.jsonl"]),
        ("SFT", ["--prompts=pairs.jsonl", f"--scorer={SCORER}"]),
    ],
)
def test_doctor_accepts_what_it_prints(here, tiny_model, objective, source, capsys):
    main(["init", objective, f"--policy={tiny_model}", *source, "--out=made.yaml", "--devices=0"])
    main(["doctor", "--config=made.yaml", "--trainer.accelerator=cpu"])
    assert "all checks passed" in capsys.readouterr().out
    made = Path("made.yaml").read_text()
    assert len(max(made.splitlines()[2:], key=len)) <= 120
    assert yaml.safe_load(made)["model"]["class_path"] == objective


def test_it_prints_yaml_that_names_the_layout_and_the_lengths(here, tiny_model, capsys):
    main(["init", "DPO", f"--policy={tiny_model}", "--data=pairs.jsonl"])
    made = capsys.readouterr().out
    assert "16 rows: preference pairs with an explicit prompt, chat messages (columns prompt, chosen, rejected)" in made
    options = yaml.safe_load(made)
    assert options["data"]["class_path"] == "OfflinePairs"
    assert options["data"]["init_args"]["max_prompt_length"] % 64 == 0


GB80, GB24 = Machine(1, 80.0), Machine(1, 24.0)


@pytest.mark.parametrize(
    ("weights", "machine", "anchored", "fit"),
    [
        (1.35e8, GB24, True, Fit(lora=False, quantized=False, sharded=False)),  # 2.7 GB
        (3e9, GB80, False, Fit(lora=False, quantized=False, sharded=False)),  # 48 of 53 GB
        (3e9, GB80, True, Fit(lora=True, quantized=False, sharded=False)),  # with the reference 60
        (7e9, Machine(8, 80.0), True, Fit(lora=False, quantized=False, sharded=True)),  # 140 over 8
        (7e9, GB24, True, Fit(lora=True, quantized=False, sharded=False)),  # 14 of 16 GB
        (13e9, GB24, True, Fit(lora=True, quantized=True, sharded=False)),  # 26 of 16 GB
        (13e9, Machine(0, 16.0), True, Fit(lora=True, quantized=False, sharded=False)),
    ],
)
def test_the_weights_are_trained_as_they_fit(weights, machine, anchored, fit):
    assert Fit.of(weights, machine, anchored) == fit


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["DPOO", "--policy=m", "--data=pairs.jsonl"], "there is no objective 'DPOO'. Known: .*DPO"),
        (["DPO", "--policy=nowhere/at/all", "--data=pairs.jsonl"], "there is no folder 'nowhere/at/all'"),
        (["DPO", "--policy=m.gguf", "--data=pairs.jsonl"], "must be a folder or a hub name"),
        (["DPO", "--policy=m"], "give either --data or --prompts"),
        (["DPO", "--policy=m", "--prompts=pairs.jsonl"], "belong together"),
        (["DPO", "--policy=m", "--data=pairs.jsonl", "--memory=nan"], "--memory=nan must be above 0"),
        (["DPO", "--policy=m", "--data=pairs.jsonl", "--out=pairs.jsonl"], "exists already"),
    ],
)
def test_bad_input_is_one_message(here, args, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["init", *args])
    assert left.value.code == 2
    written = " ".join(capsys.readouterr().err.split())
    assert re.search(message, written), written


def test_the_gpu_of_the_option_counts():
    assert Machine(0, 16.0).with_options(8, 80.0) == Machine(8, 80.0)
    with pytest.raises(UserError, match="--devices=-1 must be at least 0"):
        Machine(0, 16.0).with_options(-1, None)
