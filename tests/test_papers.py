"""The papers' protocols end to end, with a tiny model and rows in the schema of their data sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_align.cli import AlignCLI, main
from lit_align.data.formats.read import read_rows
from lit_align.reporting.metrics_csv import read_metrics

ROOT = Path(__file__).parents[1]
PAPERS = ROOT / "configs/papers"


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Invented rows with the columns of Anthropic/hh-rlhf, trl-lib/tldr and trl-lib/tldr-preference."""
    if name == "hh":
        begin = "\n\nHuman: Is {n} a number?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"
        return [
            {"chosen": begin.format(n=n) + f" Quite sure, {n} is.", "rejected": begin.format(n=n) + " No!"}
            for n in range(count)
        ]
    post = "SUBREDDIT: r/numbers\n\nTITLE: On {n}\n\nPOST: I counted up to {n}, and was tired.\n\nTL;DR:"
    if name == "tldr_reward":
        return [
            {"prompt": post.format(n=n), "chosen": f" Counted to {n}.", "rejected": " Numbers"} for n in range(count)
        ]
    return [{"prompt": post.format(n=n), "completion": f" Counted to {n}."} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_protocol_is_as_published(path):
    config = yaml.safe_load(path.read_text())
    model, data, trainer = (config[key].get("init_args", config[key]) for key in ("model", "data", "trainer"))
    total, new = (512, 200) if path.stem.startswith("hh") else (650, 75)
    if path.stem in ("hh", "tldr"):
        assert (trainer["max_epochs"], data["prompts_per_round"]) == (5, "chunk")
        assert model["reset_optimizer_each_round"] is True
        assert "reference_refresh" not in config
        assert data["sampling"] == {"max_new_tokens": new, "temperature": 0.8}
        assert float(model["optimizer"]["init_args"]["lr"]) == 1e-6
        assert data["batch_size"] * trainer["accumulate_grad_batches"] == 128
        assert data["max_prompt_length"] + new == total
        assert config["win_rate"]["responses_per_prompt"] == 4
    else:
        assert data["max_prompt_length"] + data["max_response_length"] == total


@pytest.mark.parametrize("name", ["tldr", pytest.param("hh", marks=pytest.mark.slow)])
def test_the_three_stages_run_and_the_baselines_differ_by_a_line(name, tiny_model, in_tmp, capsys, blank_figures):
    train = write(in_tmp / "train.jsonl", rows(name, 40))
    pairs = write(in_tmp / "pairs.jsonl", rows("hh" if name == "hh" else "tldr_reward", 8))
    test = write(in_tmp / "test.jsonl", rows(name, 44)[40:])
    small = ["--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=1", "--trainer.enable_progress_bar=false"]
    for stage, data, policy in (("sft", train, tiny_model), ("reward", pairs, f"runs/papers/{name}_sft/model")):
        config = PAPERS / f"{name}_{stage}.yaml"
        main(["fit", f"--config={config}", f"--model.policy.path={policy}", f"--data.train={data}", *small])
    small += [f"--data.prompts={train}", f"--win_rate.prompts={test}", "--data.sampling.max_new_tokens=6"]
    small += ["--data.sampling_batch_size=16", "--win_rate.shown=1"]
    runs = {
        "prpo": [],
        "iterative": ["--model.proximal=0", "--trainer.max_epochs=2"],
        "offline": ["--model.proximal=0", "--trainer.max_epochs=1"],
    }
    capsys.readouterr()
    for run, options in runs.items():
        root = f"--trainer.default_root_dir=runs/{run}"
        main(["fit", f"--config={PAPERS / name}.yaml", *small, *options, root])
        said = capsys.readouterr().out
        metrics = read_metrics(f"runs/{run}/metrics.csv")
        rounds = [row for row in metrics if "round/reward" in row]
        assert len(rounds) == {"prpo": 5, "iterative": 2, "offline": 1}[run]
        assert len(list(Path(f"runs/{run}/rounds").iterdir())) == len(rounds)
        samples = sorted(Path(f"runs/{run}/rounds").glob("*/samples-*.parquet"))
        sources = [row.source for row in read_rows(f"runs/{run}", kind="preferences")]
        assert len({source.partition("/")[2] for source in sources}) == len(sources) <= 40
        assert samples
        assert ("λ=0.05" in said) == (run == "prpo")
        assert "restarts each round" in said
        assert Path(f"runs/{run}/summary.json").exists()
        rates = [row["train/learning_rate"] for row in metrics if "train/learning_rate" in row]
        assert sum(rate == pytest.approx(1e-6) for rate in rates) == len(rounds)  # each begins with it


def test_the_shipped_names_parse_without_a_hub(monkeypatch):
    """The reward model of an earlier stage need not exist yet."""
    monkeypatch.chdir(ROOT)
    for path in sorted(PAPERS.glob("*_*.yaml")):
        AlignCLI(["--config", str(path)], run=False)
    for name in ("hh", "tldr"):
        with pytest.raises(SystemExit) as left:
            main(["fit", f"--config={PAPERS / name}.yaml", "--print_config"])
        assert left.value.code == 0
