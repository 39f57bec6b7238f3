"""Every command of README and docs runs, in the order of its page, on a tiny model.

Commands marked `# not run` are only parsed. `test_configs.py` trains the configurations that `docs/objectives/` names.
"""

import dataclasses
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
from lit_align.data.formats.read import read_rows
from lit_align.evaluation.summary import (
    DataComparison,
    Diversity,
    Forgetting,
    PartSummary,
    ScorerSummary,
    Summary,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs/objectives").glob("*.md"))]
METRICS = runpy.run_path(str(ROOT / "docs/make_metrics.py"))
ROUNDS = [
    "--trainer.max_epochs=2",
    "--data.prompts_per_round=8",
    "--data.batch_size=4",
    "--data.sampling.max_new_tokens=4",
]


def commands(page: Path) -> list[tuple[str, bool]]:
    """The command lines of a page, and whether the tests run them."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("#")
            run = not block.startswith("# not run") and not comment.strip().startswith("not run")
            found += [(command.strip(), run)] if command.strip() else []
    return found


@pytest.fixture(scope="module")
def folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository, with tiny models, few prompts and a simple reward in place of the quickstart's."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "data" / "quickstart").mkdir(parents=True)
    (root / "data" / "samples").symlink_to(ROOT / "data" / "samples")
    (root / "data" / "quickstart.py").write_text(REWARDS.replace("reward", "vader_sentiment"))
    prepared = root / "data" / "quickstart"
    shutil.copytree(tiny_model, prepared / "model")
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(prepared / "judge")
    byte_tokenizer().save_pretrained(prepared / "judge")
    for split, number in {"train": 12, "validation": 4, "test": 4}.items():
        rows = [json.dumps({"prompt": f"{split} film {i} is"}) for i in range(number)]
        (prepared / f"{split}.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture
def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All pages share the folder, so that a command that several pages name runs once."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    """The commands that have run in the folder."""
    return set()


def perform(words: list[str], done: set[tuple[str, ...]]) -> None:
    """Run one command line, unless it has run; rounds of shipped configurations are made small."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", "--directory", str(ROOT), *words[1:]], check=True)
        return
    if words[0] == "python" and words[1] != "train.py":
        runpy.run_path(words[1], run_name="__main__")
        return
    assert words[0] == "lit-align" or words[:2] == ["python", "train.py"]
    args = words[1:] if words[0] == "lit-align" else words[2:]
    if tuple(args) in done:
        return
    done.add(tuple(args))
    shipped = [word for word in args if word.startswith("configs/")]
    args += (
        ["--fresh"] if args[0] == "fit" and ".help=" not in args[-1] else []
    )  # each page stands alone, and shares its folders with others
    args += ROUNDS if any("OnPolicyPairs" in (ROOT / path).read_text() for path in shipped) else []
    if "configs/overlays/ddp.yaml" in shipped or "configs/overlays/fsdp.yaml" in shipped:
        run_in(2, lambda: main([*args, "--data.batch_size=2", "--trainer.devices=2"]))
    else:
        main(args)


SLOW_PAGES = {"recipes.md", "reference.md", "results.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in SLOW_PAGES else (), id=page.name)
        for page in PAGES
        if any(run for _, run in commands(page))
    ],
)
def test_the_commands_of_a_page_run_in_order(page, checkout, done, monkeypatch, blank_figures):
    monkeypatch.setattr("sys.stdin", io.StringIO("A film\n"))
    monkeypatch.syspath_prepend(checkout)  # as `python train.py` does
    for name, content in re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        Path(name).write_text(content)  # the files that a page shows
    for command, run in commands(page):
        try:
            if run:
                perform(shlex.split(command), done)
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:  # --help leaves with 0
                error.add_note(f"{page.name}: {command}")
                raise
    for file in checkout.glob("runs/**/metrics.csv"):
        assert unexplained(file) == [], file


def test_no_two_commands_train_in_the_same_folder_with_other_options():
    """`fit` would refuse the second, whichever page it is on."""
    options: dict[str, set[frozenset[str]]] = {}
    for page in PAGES:
        texts = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
        for command, run in commands(page):
            _, fit, args = command.partition(" fit ")
            if not (fit and run and "--config" in args):
                continue
            files = [texts.get(name) or (ROOT / name).read_text() for name in re.findall(r"--config (\S+)", args)]
            folder = re.findall(r"default_root_dir[=:] *([\w/]+)", "\n".join([*files, args]))[-1]
            options.setdefault(folder, set()).add(frozenset(args.split()))
    assert len(options) > 10
    assert {folder: given for folder, given in options.items() if len(given) > 1} == {}


def unexplained(file: Path) -> list[str]:
    """The columns of a metrics.csv that `docs/metrics.md` does not explain."""
    known = {re.sub("NAME|REASON", r"\\w+", name) for name in METRICS["names"]()}
    unprefixed = "|".join(name for name in known if "/" not in name)
    pattern = re.compile("|".join([*known, f"(train|val)/({unprefixed})", "step", "epoch"]))
    return [name for name in file.read_text().splitlines()[0].split(",") if not pattern.fullmatch(name)]


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command, run in commands(page) if not run and " ... " not in command]
)
def test_a_command_that_is_not_run_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] in ("lm-eval", "export"):
        return
    if words[0] == "wandb":
        assert words[1] in ("sweep", "agent")
        assert all(Path(word).exists() for word in words if word.startswith("configs/"))
        return
    args = words[words.index("lit-align" if "lit-align" in words else "train.py") + 2 :]
    with pytest.raises(SystemExit) as left:
        main(["fit", *args, "--print_config"])
    assert left.value.code == 0


def test_the_readmes_python_runs(checkout):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / "data/samples/pairs.jsonl", "pairs.jsonl")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "data/quickstart/model"), {})


def test_the_objectives_pages_match_the_code():
    made = runpy.run_path(str(ROOT / "docs/objectives/make.py"))["pages"]()
    there = {path.name: path.read_text() for path in (ROOT / "docs/objectives").glob("*.md")}
    assert there == made, "python docs/objectives/make.py"


def test_the_metrics_page_matches_the_docstrings():
    assert (ROOT / "docs/metrics.md").read_text() == METRICS["page"](), "python docs/make_metrics.py"


EXAMPLES = re.findall(r"^```json (\w+)\n(.*?)^```", (ROOT / "docs/data.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("kind", "rows"), EXAMPLES)
def test_an_example_of_a_layout_is_read_whole(kind, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    read = read_rows(str(tmp_path / "rows.jsonl"), kind=kind)
    assert not read.skipped
    assert len({row.source for row in read}) == len(rows.splitlines())


@pytest.mark.parametrize("part", [Summary, ScorerSummary, DataComparison, PartSummary, Forgetting, Diversity])
def test_the_results_page_explains_each_key_of_a_summary(part):
    page = (ROOT / "docs/results.md").read_text()
    assert [field.name for field in dataclasses.fields(part) if f"`{field.name}" not in page] == []


def test_a_metric_without_a_formula_is_found(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss,val/win_rate_judge,round/dropped_no_text,drift/unheard_of,train/round/reward\n")
    assert unexplained(file) == ["drift/unheard_of", "train/round/reward"]


def test_the_readme_is_short_and_its_picture_small():
    assert len(PAGES[0].read_text().splitlines()) <= 170
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000


def sections(page: Path) -> list[str]:
    """The names by which links lead to the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_links_lead_somewhere_and_commands_are_known(page):
    text = page.read_text()
    for target, section in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        to = page.parent / target if target else page
        assert to.exists(), target
        assert not section or section in sections(to), f"{target}#{section}"
    for command in re.findall(r"lit-align ([a-z]+)", text):
        assert command in COMMANDS
