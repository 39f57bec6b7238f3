"""The examples of docs/architecture.md: each is short, and together they run as the page says."""

import importlib
import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import lit_align.cli.commands
import lit_align.data.formats.layouts
from lit_align.cli import main
from lit_align.data.formats import detect
from lit_align.reporting.metrics_csv import read_metrics

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILES = {
    text.partition("\n")[0].removeprefix("# "): text for kind, text in BLOCKS if kind == "python" and text[0] == "#"
}
(YAML,) = (text for kind, text in BLOCKS if kind == "yaml")
(COMMAND,) = (text for kind, text in BLOCKS if kind == "python" and text[0] != "#")


@pytest.fixture
def project(tiny_model, in_tmp, monkeypatch):
    """The page's files in an empty folder: those of a project, and those that are added to folders of the package."""
    for path, text in FILES.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    Path("mine.yaml").write_text(YAML)
    Path("model").symlink_to(tiny_model)
    monkeypatch.syspath_prepend(in_tmp)
    for package in (lit_align.cli.commands, lit_align.data.formats.layouts):
        folder = str(in_tmp / package.__name__.replace(".", "/"))
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])
    yield in_tmp
    for name in [name for name in sys.modules if f"{name.replace('.', '/')}.py" in FILES or name == "my_project"]:
        del sys.modules[name]


@pytest.mark.parametrize("path", FILES)
def test_an_example_is_short(path):
    assert FILES[path].count("\n") < 30


def test_the_examples_run_together(project, monkeypatch, capsys, blank_figures):
    threads = importlib.import_module("lit_align.data.formats.layouts.threads")
    monkeypatch.setattr(detect, "LAYOUTS", (*threads.LAYOUTS, *detect.LAYOUTS))
    rows = [{"title": f"Title {i}", "post": f"Post {i}."} for i in range(8)]
    Path("threads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    main(["fit", "--config=mine.yaml", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"])
    said = " ".join(capsys.readouterr().out.split())
    for piece in (
        "Hinge: max(0, 1 − β·Δlog π/anchor)",
        "step-0 check loss 1.0000 = 1.0000 ✓",
        "brevity-1 words=5",
        "OneByOneSampler",
        "forum threads",
    ):
        assert piece in said
    tokens = [row["tokens/trained"] for row in read_metrics("run/metrics.csv") if "tokens/trained" in row]
    assert tokens == sorted(tokens)
    assert tokens[-1] > tokens[0] > 0

    (first, *_) = sorted(Path("run/rounds").glob("*/samples-*.parquet"))
    samples = pq.read_table(first).to_pylist()
    assert samples
    assert all(re.fullmatch(r"Title (\d)\n\nPost \1\.\n\nReply:", row["prompt"]) for row in samples)

    for name, command in eval(f"{{{COMMAND}}}", vars(lit_align.cli.commands)).items():
        monkeypatch.setitem(lit_align.cli.commands.COMMANDS, name, command)
    main(["size", "run"])
    assert re.search(r"[1-9][\d,]* rounds\n", capsys.readouterr().out)


def test_the_pairing_rule_takes_the_two_best(project):
    from lit_align.data.batches import Example

    rule = importlib.import_module("my_project.best_second").BestSecond()
    group = Example([5], [[1], [2], [3]], "row", rewards=[0.0, 2.0, 1.0], texts=["a", "b", "c"])
    assert rule([group]).examples[0].response_ids == [[2], [3]]
    tied = Example([5], [[1], [2], [3]], "row", rewards=[2.0, 2.0, 1.0], texts=["a", "b", "c"])
    assert rule([tied]).counts == {"best two too close": 1}
