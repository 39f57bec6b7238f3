"""What the documentation says to type is typed: every command of README and docs, in order, on a tiny model.

Commands behind `# not run` are only parsed; those of `docs/objectives/` are what `test_configs.py` trains.
"""

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import run_in
from tiny import REWARDS, byte_tokenizer, llama_config
from transformers import LlamaForSequenceClassification

from lit_align.cli import main
from lit_align.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROUNDS = [
    "--trainer.max_epochs=2",
    "--data.prompts_per_round=8",
    "--data.batch_size=4",
    "--data.sampling.max_new_tokens=4",
]


def commands(page: Path) -> list[tuple[str, bool]]:
    """The lines of a page's blocks of commands, and whether they are run."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("#")
            run = not block.startswith("# not run") and not comment.strip().startswith("not run")
            found += [(command.strip(), run)] if command.strip() else []
    return found


@pytest.fixture
def checkout(tiny_model: str, in_tmp: Path) -> Path:
    """A folder as the repository's, with tiny models, few prompts and another reward where the quickstart's are."""
    (in_tmp / "configs").symlink_to(ROOT / "configs")
    (in_tmp / "data" / "quickstart").mkdir(parents=True)
    (in_tmp / "data" / "samples").symlink_to(ROOT / "data" / "samples")
    (in_tmp / "data" / "quickstart.py").write_text(REWARDS.replace("reward", "vader_sentiment"))
    prepared = in_tmp / "data" / "quickstart"
    shutil.copytree(tiny_model, prepared / "model")
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(prepared / "judge")
    byte_tokenizer().save_pretrained(prepared / "judge")
    for split, number in {"train": 12, "validation": 4, "test": 4}.items():
        rows = [json.dumps({"prompt": f"{split} film {i} is"}) for i in range(number)]
        (prepared / f"{split}.jsonl").write_text("\n".join(rows))
    return in_tmp


def perform(words: list[str]) -> None:
    """Run one command line as it stands, made small where it trains from a shipped configuration."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", "--directory", str(ROOT), *words[1:]], check=True)
        return
    assert words[0] == "lit-align" or words[:2] == ["python", "train.py"]
    args = words[1:] if words[0] == "lit-align" else words[2:]
    shipped = [word for word in args if word.startswith("configs/")]
    args += ROUNDS if "configs/quickstart.yaml" in shipped else []
    if "configs/overlays/ddp.yaml" in shipped or "configs/overlays/fsdp.yaml" in shipped:
        run_in(2, lambda: main([*args, "--data.batch_size=2", "--trainer.devices=2"]))
    else:
        main(args)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(run for _, run in commands(page))], ids=lambda p: p.name
)
def test_the_commands_of_a_page_run_in_order(page, checkout, monkeypatch, blank_figures):
    monkeypatch.setattr("sys.stdin", io.StringIO("A film\n"))
    for command, run in commands(page):
        try:
            if run:
                perform(shlex.split(command))
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:  # --help leaves with 0
                error.add_note(f"{page.name}: {command}")
                raise


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command, run in commands(page) if not run and " ... " not in command]
)
def test_what_is_not_run_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "wandb":
        assert words[1] in ("sweep", "agent")
        assert all(Path(word).exists() for word in words if word.startswith("configs/"))
        return
    args = words[words.index("train.py") + 2 :]
    with pytest.raises(SystemExit) as left:
        main(["fit", *args, "--print_config"])
    assert left.value.code == 0


def test_the_readmes_python_runs(checkout):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / "data/samples/pairs.jsonl", "pairs.jsonl")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "data/quickstart/model"), {})


def test_the_objectives_pages_are_what_the_code_says():
    made = runpy.run_path(str(ROOT / "docs/objectives/make.py"))["pages"]()
    there = {path.name: path.read_text() for path in (ROOT / "docs/objectives").glob("*.md")}
    assert there == made, "python docs/objectives/make.py"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs/objectives").glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_somewhere_and_commands_are_known(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for command in re.findall(r"lit-align ([a-z]+)", text):
        assert command in COMMANDS
