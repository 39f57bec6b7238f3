"""The study's cells, in small: their options parse, the queue survives a kill, and it runs nothing twice."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
import yaml
from tiny import byte_tokenizer, llama_config, write_pairs, write_prompts
from transformers import LlamaForSequenceClassification

from lit_align.cli import AlignCLI, main
from studies.papers import cells, prepare, run
from studies.papers.cells import Cell, Setting, configuration, read_arms, settings, tuning_cells
from studies.papers.results import Result, read_rows

ROOT = Path(__file__).parents[2]
ARMS = read_arms()
STUDY = Path("runs/study")
HERE = {"commit": "abc", "prepared": "def", "machine": "this one"}


@pytest.fixture(scope="module")
def prepared(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that `prepare.py` makes, of tiny models and few rows."""
    root = tmp_path_factory.mktemp("study")
    study = root / STUDY
    (study / "data").mkdir(parents=True)
    shutil.copytree(tiny_model, study / "sft/model")
    torch.manual_seed(0)
    scorer = LlamaForSequenceClassification(llama_config(num_labels=1))
    for name in ("gold", "proxy_large/model", "proxy_small/model"):
        scorer.save_pretrained(study / name)
        byte_tokenizer().save_pretrained(study / name)
    for name, count in {"train": 8, "test": 4}.items():
        Path(write_prompts(study / "data", count)).rename(study / f"data/{name}.jsonl")
    for name in ("sft", "news", "news_held_out", "tweets_held_out"):
        (study / f"data/{name}.jsonl").write_text('{"text": "A text."}\n{"text": "Another text."}\n')
    samples = study / "samples/seed1"
    samples.mkdir(parents=True)
    Path(write_pairs(samples)).rename(samples / "proxy_large.jsonl")
    return root


@pytest.fixture
def study(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    return prepared


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_the_options_of_every_arm_parse(arm, study, tmp_path, monkeypatch):
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: None)
    options = configuration(Cell(arm, 1), Setting(1e-4, 0.1), str(tmp_path))
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump(options))
    config = AlignCLI([f"--config={tmp_path / 'cell.yaml'}"], run=False).config
    given = config.model.init_args
    assert given.optimizer.init_args.lr == 1e-4
    assert given.get("beta", 0.1) == 0.1
    assert given.get("proximal", 0.0) == pytest.approx(0.1 * arm.proximal)
    assert config.win_rate.init_args.prompts == f"{STUDY}/data/test.jsonl"


def test_the_first_round_that_is_prepared_is_that_of_the_iterative_arms(study, tmp_path, monkeypatch):
    """All that determines its samples is equal, and so are store, proxy and prompts."""
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: None)
    prepared: list[dict[str, Any]] = []

    def fit(configuration: str, folder: Path, *options: str) -> None:
        folder.mkdir()
        parsed = AlignCLI([f"--config={prepare.HERE / configuration}.yaml", *options], run=False).config
        prepared.append(determined(parsed))
        Path(parsed.data.init_args.store).mkdir(exist_ok=True)

    def no_pairs(store: Path, proxy: str) -> list[Any]:
        assert not (store / "rounds").exists()  # whose rows would be among the pairs
        return []

    def determined(config: Any) -> dict[str, Any]:
        data, model = config.data.init_args.as_dict(), config.model.init_args.as_dict()
        of_data = ("prompts", "prompts_per_round", "responses_per_prompt", "sampling", "sampling_batch_size", "sampler")
        of_data += ("sampling_dtype", "record_sampler", "store", "scorer", "batch_size")
        of_run = {"seed": config.seed_everything, "epochs": config.trainer.max_epochs}
        return {name: data[name] for name in of_data} | {name: model[name] for name in ("policy", "lora")} | of_run

    monkeypatch.setattr(prepare, "fit", fit)
    monkeypatch.setattr(prepare, "best_and_worst", no_pairs)
    folder = STUDY / "samples/seed2"
    folder.mkdir()
    prepare.make_samples(folder, 2)
    for arm in (arm for arm in ARMS.values() if arm.data == "rounds"):
        options = configuration(Cell(arm, 2), Setting(1e-4, 0.1), str(tmp_path))
        (tmp_path / "cell.yaml").write_text(yaml.safe_dump(options))
        own = determined(AlignCLI([f"--config={tmp_path / 'cell.yaml'}"], run=False).config)
        assert own == prepared[3 if arm.small_proxy else 2], arm.name


def test_tuning_cells_never_read_the_test_prompts():
    trials = tuning_cells(ARMS)
    assert len(trials) == 4 * sum(arm.tuned_as is None for arm in ARMS.values())
    for cell in trials:
        options = configuration(cell, settings()[0], "folder")
        assert "data/test" not in yaml.safe_dump(options)
        assert cell.seed not in cells.SEEDS


def forked(options: list[str], log: IO[str]) -> SimpleNamespace:
    """Run `train.py` in a fork of this process, which has everything imported."""
    process = os.fork()
    if process == 0:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            main(options)
        except BaseException as error:
            print(repr(error), file=log, flush=True)
            os._exit(1)
        os._exit(0)
    return SimpleNamespace(pid=process, returncode=None)


@pytest.mark.slow
def test_a_killed_queue_continues_and_runs_no_cell_twice(study, tmp_path, monkeypatch, blank_figures):
    monkeypatch.setattr(cells, "EVALUATED_EVERY", 3)
    two = [Cell(ARMS["offline_dpo"], 1), Cell(ARMS["pr_dpo_1"], 1)]
    chosen = {cell.arm.name: Setting(1e-3, 0.1) for cell in two}
    results, work = tmp_path / "results", tmp_path / "cells"
    results.mkdir()
    started: list[str] = []

    def start(options, log):
        started.append(options[1])
        return forked(options, log)

    def start_and_kill_the_second(options, log):
        process = start(options, log)
        if len(started) == 2:
            while not len(list(Path(two[1].store).glob("round_*"))) > 1:
                time.sleep(0.01)
            queue.stop()
            os.kill(process.pid, signal.SIGKILL)
        return process

    queue = run.Queue(results, work, HERE, start_and_kill_the_second)
    queue.run(two, chosen, workers=1)
    assert sorted(path.name for path in results.iterdir()) == ["offline_dpo-1.json", "offline_dpo-1.parquet"]
    spent_before = float((work / "pr_dpo_1-1" / run.SPENT).read_text())

    run.Queue(results, work, HERE, start).run(two, chosen, workers=1)
    assert len(started) == 3
    found = Result.read(results, "pr_dpo_1-1")
    assert found is not None
    assert (found.arm, found.seed, found.starts, found.failed) == ("pr_dpo_1", 1, 2, "")
    assert found.cpu_seconds > spent_before > 0
    assert len(found.series["kl_by_round"]) == 4
    rows = read_rows(results, "pr_dpo_1-1").to_pandas()
    assert rows.groupby("step").prompt.nunique().to_dict() == {3: 4, 4: 4}
    assert not any(work.iterdir())


def test_a_cell_that_fails_twice_has_the_failure_as_its_result(study, tmp_path):
    def fail(options, log):
        log.write("loss is nan\n")
        log.flush()
        process = os.fork()
        if process == 0:
            os._exit(1)
        return SimpleNamespace(pid=process, returncode=None)

    run.Queue(tmp_path, tmp_path / "cells", HERE, fail).run([Cell(ARMS["iterative_dpo"], 101, 2)], {}, workers=1)
    found = Result.read(tmp_path, "tuning-iterative_dpo-2")
    assert found is not None
    assert found.failed == "loss is nan"


def result_of(cell: Cell, **made: str) -> Result:
    places: Any = HERE | made
    return Result(cell.arm.name, cell.seed, None, 1e-4, 0.1, seconds=1.0, cpu_seconds=1.0, **places)


def test_a_seed_is_not_continued_on_another_machine(tmp_path):
    cells = [Cell(ARMS[arm], seed) for seed in (1, 2) for arm in ("offline_dpo", "pr_dpo_1")]
    for cell in cells[:2]:
        result_of(cell, machine="another").write(tmp_path, cell.name)
    run.check_blocks(tmp_path, cells, HERE)  # seed 1 is whole
    result_of(cells[2], machine="another", prepared="other").write(tmp_path, cells[2].name)
    with pytest.raises(SystemExit, match="seed 2 was begun with other values of prepared and machine"):
        run.check_blocks(tmp_path, cells, HERE)


def test_counted_results_are_of_one_commit(tmp_path):
    cell = Cell(ARMS["offline_dpo"], 1)
    result_of(cell, commit="0123456789").write(tmp_path, cell.name)
    with pytest.raises(SystemExit, match=r"git worktree add --detach \.\./study-cells 0123456789"):
        run.check_blocks(tmp_path, [cell], HERE)
