"""Results of cells: NAME.json, and NAME.parquet with one row per evaluation and prompt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.evaluation.rows import HeldOutRow
from lit_align.files import write_whole
from lit_align.reporting.run_folder import Run
from studies.papers.cells import Arm, Cell, Setting, Trial, choose, settings, tuning_cells

SCHEMA = pa.schema(
    {
        "step": pa.int16(),
        "prompt": pa.int16(),  # its row in the file of prompts
        "gold": pa.float32(),
        "gold_start": pa.float32(),
        "proxy": pa.float32(),
        "proxy_start": pa.float32(),
        "log_ratio": pa.float32(),  # log π(y|x) − log π_start(y|x) of the policy's response
        "length": pa.int16(),
        "length_start": pa.int16(),
    }
)
SERIES = {
    "gradient_scale": "train/gradient_scale",  # by step
    "reward_margin": "train/reward_margin",
    "kl_by_round": "drift/kl_policy_start",  # as each round begins
}


@dataclass(frozen=True)
class Result:
    """What is kept of a cell, beside its Parquet file.

    Args:
        prepared: The file in prepared/ that names the data and the models that the cell started from.
        starts: How often the run was started; a resumed run's seconds are those since the queue's last start.
        pairs: Hash of the file of offline pairs.
        failed: The last line of the program's output, if it failed twice.
        series: Logged values, by the names of SERIES.
    """

    arm: str
    seed: int
    trial: int | None
    lr: float
    beta: float
    commit: str
    prepared: str
    machine: str
    seconds: float
    cpu_seconds: float
    starts: int = 1
    pairs: str = ""
    failed: str = ""
    series: dict[str, list[float]] = field(default_factory=dict)
    diversity: dict[str, dict[str, float]] = field(default_factory=dict)
    forgetting: dict[str, dict[str, float]] = field(default_factory=dict)
    best_of_n: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str) -> Self | None:
        path = folder / f"{name}.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, folder: Path, name: str) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / f"{name}.json", lambda path: path.write_text(text))


def read_rows(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet", schema=SCHEMA)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_whole(folder / f"{name}.parquet", lambda path: pq.write_table(table, path, compression="zstd"))


def identity(cell: Cell, setting: Setting) -> dict[str, Any]:
    """The fields of a `Result` that say which cell it is."""
    return {"arm": cell.arm.name, "seed": cell.seed, "trial": cell.trial, "lr": setting.lr, "beta": setting.beta}


def take(run: Run, prompts: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parts of a finished run that are kept: fields of its `Result`, and the rows of its Parquet file."""
    summary = run.summary
    assert summary is not None
    places = {json.loads(line)["prompt"]: place for place, line in enumerate(prompts.read_text().splitlines())}
    last = int(max(row["step"] for row in run.metrics))
    evaluations = {**run.validations, last: run.held_out}
    rows = [_row(step, places[row.prompt], row) for step in sorted(evaluations) for row in evaluations[step]]
    rows.sort(key=lambda row: (row["step"], row["prompt"]))
    fields = {
        "starts": len(run.record.starts) if run.record else 1,
        "series": {name: [value for (value,) in run.points(metric)] for name, metric in SERIES.items()},
        "diversity": {"start": asdict(summary.diversity_start), "end": asdict(summary.diversity_end)},
        "forgetting": {
            name: {"start": each.nll_start, "end": each.nll_end} for name, each in summary.forgetting.items()
        },
        "best_of_n": dict(_best_of_n(run)),
    }
    return fields, rows


def _row(step: int, prompt: int, row: HeldOutRow) -> dict[str, Any]:
    gold, proxy = row.scored_by("gold"), row.scored_by("training")
    assert gold is not None
    assert proxy is not None
    return {
        "step": step,
        "prompt": prompt,
        "gold": gold.rewards[0],
        "gold_start": gold.rewards_start[0],
        "proxy": proxy.rewards[0],
        "proxy_start": proxy.rewards_start[0],
        "log_ratio": row.logps[0] - row.logps_start[0],
        "length": row.lengths[0],
        "length_start": row.lengths_start[0],
    }


def _best_of_n(run: Run) -> Iterator[tuple[str, dict[str, float]]]:
    """Rewards of the best of n of the start's responses, selected by the proxy, by n."""
    gold, proxy = run.scorers["gold"].best_of_n, run.scorers["training"].best_of_n
    for n, best in gold.items():
        yield n, {"kl": best.kl, "gold": best.reward.value, "proxy": proxy[n].reward.value}


def read_trial(folder: Path, cell: Cell) -> Trial | None:
    """The end of a tuning cell; None if it has not run."""
    result = Result.read(folder, cell.name)
    if result is None or result.failed:
        return None if result is None else Trial()
    table = read_rows(folder, cell.name).to_pandas()
    end = table[table.step == table.step.max()]
    return Trial(float(end.gold.mean()), float(end.log_ratio.mean()))


def chosen(folder: Path, arms: Mapping[str, Arm]) -> dict[str, Setting]:
    """The configuration of each arm whose tuning cells have all run."""
    trials: dict[str, list[Trial | None]] = {}
    for cell in tuning_cells(arms):
        trials.setdefault(cell.arm.name, []).append(read_trial(folder, cell))
    found = {name: settings()[choose(each)] for name, each in trials.items() if all_run(each)}
    return found | {arm.name: found[arm.tuned_as] for arm in arms.values() if arm.tuned_as in found}


def all_run(trials: Sequence[Trial | None]) -> TypeGuard[Sequence[Trial]]:
    return None not in trials
