"""`lit-align init`: what it prints is a configuration that `doctor` accepts."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lit_align import objectives
from lit_align.cli import main
from lit_align.cli.classes import class_names
from lit_align.cli.init import Fit, Machine
from lit_align.data.formats import DataError, read_rows
from lit_align.errors import UserError
from lit_align.objectives import PreferenceObjective
from lit_align.policy import PolicyConfig

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"
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
        ("SPPO", ["--data=*airs.jsonl", "--devices=0"]),  # YAML would take a bare * for an alias
        ("KTO", ["--data=labelled.jsonl", "--devices=0", "--memory=1e-4"]),  # LoRA
        ("MPO", ["--prompts=pairs.jsonl", f"--scorer={SCORER}", "--devices=8", "--memory=2e-4"]),  # FSDP2
        ("DPO", ["--data=own.csv", "--columns={prompt: q, chosen: good, rejected: bad}", "--devices=1"]),
    ],
)
def test_doctor_accepts_what_it_prints(here, tiny_model, objective, source, capsys):
    Path("own.csv").write_text("q,good,bad\n" + "".join(f"p{i},yes,no\n" for i in range(4)))
    main(["init", objective, f"--policy={tiny_model}", *source, "--out=new folder/made.yaml"])
    main(["doctor", "--config=new folder/made.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1"])
    assert "all checks passed" in capsys.readouterr().out
    made = Path("new folder/made.yaml").read_text()
    assert len(max(made.splitlines()[2:], key=len)) <= 120
    assert yaml.safe_load(made)["model"]["class_path"] == objective


@pytest.mark.parametrize(("longest", "prompts", "response"), [(100, 128, 256), (400, 400, 112), (600, 448, 64)])
def test_prompts_of_rounds_leave_room_for_responses(here, tiny_model, capsys, longest, prompts, response):
    """The model has 512 positions."""
    Path("long.jsonl").write_text("".join(json.dumps({"prompt": length * "x"}) + "\n" for length in (9, longest)))
    main(["init", "DPO", f"--policy={tiny_model}", "--prompts=long.jsonl", f"--scorer={SCORER}"])
    made = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (made["max_prompt_length"], made["sampling"]["max_new_tokens"]) == (prompts, response)
    assert made.get("long_prompts") == ("drop" if longest > prompts else None)


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
        (["DPOO", "--policy=m", "--data=pairs.jsonl"], "no objective 'DPOO'. Did you mean 'DPO'\\? Known: .*DPO"),
        (["DPO", "--policy=nowhere/at/all", "--data=pairs.jsonl"], "there is no folder 'nowhere/at/all'"),
        (["DPO", "--policy=m.gguf", "--data=pairs.jsonl"], "must be a folder or a hub name"),
        (["DPO", "--policy=m"], "give either --data or --prompts"),
        (["DPO", "--policy=m", "--prompts=pairs.jsonl"], "belong together"),
        (["DPO", "--policy=m", "--data=pairs.jsonl", "--memory=nan"], "--memory=nan must be above 0"),
        (["DPO", "--policy=m", "--data=pairs.jsonl", "--out=pairs.jsonl"], "exists already"),
        (["DPO", "--policy=m", "--data=pairs.jsonl", "--columns=good"], "--columns=good must be like"),
        (["PR-DPO", "--policy=m", "--data=pairs.jsonl"], "PR-DPO is DPO with model.proximal above 0. Known: .*CPO"),
        (["DPO", "--data=labelled.jsonl"], "no preferences can be read from .*; they are labelled responses, for KTO"),
        (
            ["RewardModel", "--prompts=pairs.jsonl", f"--scorer={SCORER}"],
            "must be --data=FILE: RewardModel learns from",
        ),
        (["DPO", "--prompts=pairs.jsonl", "--scorer=rewards.py:rewards"], "there is no 'rewards' in 'rewards.py'"),
    ],
)
def test_bad_input_is_one_message(here, tiny_model, args, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["init", f"--policy={tiny_model}", *args])
    assert left.value.code == 2
    written = " ".join(capsys.readouterr().err.split())
    assert re.search(message, written), written


def test_the_gpu_of_the_option_counts():
    assert Machine(0, 16.0).with_options(8, 80.0) == Machine(8, 80.0)
    with pytest.raises(UserError, match="--devices=-1 must be at least 0"):
        Machine(0, 16.0).with_options(-1, None)


OTHER_LAYOUTS: list[dict] = [
    {"chosen": "Bird? Crow.", "rejected": "Bird? Stone."},
    {"prompt": "Bird?", "responses": ["Stone.", "Crow.", "A crow."], "ranks": [3, 2, 1]},
    {"prompt": "Bird?", "chosen": "Crow.", "rejected": ["Stone.", "Rock."]},
    {"prompt": "Bird?", "answers": [{"answer": "Stone", "rank": 2}, {"answer": "Crow", "rank": 1}]},
    {"question": "Bird?", "answer_0": "Stone", "answer_1": "Crow", "score_0": -2, "score_1": -1.0},
    {"messages": [{"role": "user", "content": "Bird?"}], "chosen": "Crow", "rejected": "Stone"},
    {"messages": [{"role": "user", "content": "Bird?"}, {"role": "assistant", "content": "Crow"}], "label": True},
    {"question": "Bird?", "answer": "Crow", "label": False},
    {"post": "Bird?", "title": "T", "subreddit": "s", "summary": "Crow"},
    {"text": "Bird? Crow."},
]
"""Layouts without an example in docs/data.md."""
MACHINES = {
    "CPU": ["--devices=0"],
    "CPU, LoRA": ["--devices=0", "--memory=1e-4"],
    "GPU": ["--devices=1", "--memory=80"],
    "GPU, LoRA": ["--devices=1", "--memory=2e-4"],
    "GPU, QLoRA": ["--devices=1", "--memory=2e-5"],
    "GPUs, DDP": ["--devices=2", "--memory=80"],
    "GPUs, FSDP2": ["--devices=8", "--memory=2e-4"],
    "GPUs, QLoRA": ["--devices=2", "--memory=2e-5"],
}
"""For the tiny model, whose weights take 0.1 MB."""


def layouts() -> list[list[dict]]:
    """Eight rows of each layout, with prompts that differ."""
    blocks = re.findall(r"```json \w+\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    several = [[json.loads(line) for line in block.splitlines()] for block in blocks] + [[row] for row in OTHER_LAYOUTS]
    texts = [[json.dumps(rows[i % len(rows)]) for i in range(8)] for rows in several]
    places = re.compile("Bird|capital|Name a")
    return [
        [json.loads(places.sub(lambda m, i=i: f"{m[0]} {i}", text)) for i, text in enumerate(rows)] for rows in texts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [name for name in MACHINES if "QLoRA" not in name or find_spec("bitsandbytes")])
@pytest.mark.parametrize("objective", [name for name in class_names(PreferenceObjective) if hasattr(objectives, name)])
def test_every_layout_on_every_machine(here, tiny_model, objective, machine, capsys):
    """`doctor` tries every layout on a CPU; elsewhere, each configuration that differs in more than its lengths.

    Prompts are read alike for all objectives: DPO tries all of their layouts.
    """
    needs = getattr(objectives, objective)(PolicyConfig(tiny_model)).data_needs()
    accepted, tried = 0, []
    for rows in layouts():
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = [(needs.data_kind, ["--data=rows.jsonl"])]
        sources += [("prompts", ["--prompts=rows.jsonl", f"--scorer={SCORER}"])] if needs.can_sample else []
        for kind, source in sources:
            try:
                read_rows("rows.jsonl", kind=kind)
            except DataError:
                continue
            accepted += 1
            Path("made.yaml").unlink(missing_ok=True)
            main(["init", objective, f"--policy={tiny_model}", *source, "--out=made.yaml", *MACHINES[machine]])
            made = yaml.safe_load(Path("made.yaml").read_text())
            made["data"]["init_args"] |= {"max_prompt_length": 0, "max_response_length": 0}
            every = machine == "CPU" and (kind != "prompts" or objective == "DPO")
            if every or made not in tried:
                tried.append(made)
                short = ["--data.sampling.max_new_tokens=8"] if kind == "prompts" else []
                main(["doctor", "--config=made.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1", *short])
                assert "all checks passed" in capsys.readouterr().out
    assert accepted >= 10
