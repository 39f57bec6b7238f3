"""Make every table and figure from the results alone: `python -m studies.papers.analyse`.

It writes `docs/study.md` (the page `page.md` with the tables in their places) and the figures of `figures.py`. The same
results give the same bytes. Until the last planned seed is complete, estimates have neither p-values nor verdicts.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from lit_align.metrics.win_rate import length_controlled_win_rate, pair_wins
from studies.papers.cells import FIRST_SEEDS, SEEDS, Cell, counted_cells, read_arms, settings, tuning_cells
from studies.papers.comparison import MeanTest, holm
from studies.papers.hypotheses import (
    SECONDARY,
    VALUES,
    Study,
    findings,
    forgets_less,
    is_closed,
    planned_seeds,
    verdict,
)
from studies.papers.laws import laws
from studies.papers.results import Result, chosen, read_rows, read_trial

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# --- tables ---


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def points(value: float) -> str:
    """A difference of rates in percentage points."""
    return f"{100 * value:+.1f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean over seeds, with the standard deviation."""
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def status(study: Study) -> str:
    tuning = tuning_cells(study.arms)
    tuned = [result for cell in tuning if (result := Result.read(study.folder, cell.name))]
    first = counted_cells(study.arms)
    counted = list(study.counted.values())
    rows = []
    for name, results, planned in (("tuning", tuned, len(tuning)), ("counted", counted, len(first))):
        whole = [result.cpu_seconds / 60 for result in results if result.starts == 1 and not result.failed]
        failed = sum(bool(result.failed) for result in results)
        rows.append([name, f"{len(results)} of {planned}", f"{failed}", spread(whole, 1)])
    return table(["cells", "done", "failed", "CPU minutes per cell"], rows)


def provenance(study: Study) -> str:
    cells = [*tuning_cells(study.arms), *counted_cells(study.arms, len(SEEDS))]
    results = [result for cell in cells if (result := Result.read(study.folder, cell.name))]
    counts = Counter((result.commit, result.prepared, result.machine) for result in results)
    return table(
        ["commit", "prepared", "machine", "cells"], [[*key, f"{count}"] for key, count in sorted(counts.items())]
    )


def tuning(study: Study) -> str:
    """Gold reward (KL) of each configuration on the validation prompts; the chosen one in bold."""
    choices, rows = chosen(study.folder, study.arms), []
    for arm in study.arms.values():
        if arm.tuned_as is not None:
            continue
        cells = []
        for place, setting in enumerate(settings()):
            trial = read_trial(study.folder, Cell(arm, 0, place))
            text = "–" if trial is None else "failed" if np.isinf(trial.kl) else f"{trial.gold:.2f} ({trial.kl:.1f})"
            cells.append(f"**{text}**" if choices.get(arm.name) == setting else text)
        rows.append([arm.name, *cells])
    head = [f"lr {setting.lr:g}, β {setting.beta:g}" for setting in settings()]
    return table(["arm", *head], rows)


def arms_table(study: Study) -> str:
    """The end of each arm's runs on the test prompts, mean ± standard deviation over seeds."""
    rows = []
    for arm in study.arms:
        keys = [(arm, seed) for seed in SEEDS if (arm, seed) in study.frontiers["wins"]]
        wins, gold, proxy = ([study.frontiers[value][key] for key in keys] for value in VALUES)
        best = [int(run.values.mean(1).argmax()) for run in gold]
        rows.append(
            [
                arm,
                f"{len(keys)}",
                spread([100 * float(run.values[-1].mean()) for run in wins], 1),
                spread([100 * _length_controlled(study, *key) for key in keys], 1),
                spread([float(run.kl[-1]) for run in wins]),
                spread([float(run.values[-1].mean()) for run in gold]),
                spread([float(run.values[-1].mean()) for run in proxy]),
                spread([float(run.values.mean(1).max()) for run in gold]),
                spread([float(run.kl[place]) for run, place in zip(gold, best, strict=True)]),
                spread([study.counted[key].diversity["end"]["distinct_2"] for key in keys]),
                spread([study.forgetting("news", *key) for key in keys], 3),
                spread([study.forgetting("tweets", *key) for key in keys], 3),
                spread([study.counted[key].cpu_seconds / 60 for key in keys if study.counted[key].starts == 1], 1),
            ]
        )
    head = "arm, seeds, gold win rate %, at equal length %, KL, gold, proxy, peak of gold, its KL, distinct-2"
    return table([*head.split(", "), "NLL change: editorials", "tweets", "CPU minutes"], rows)


def _length_controlled(study: Study, arm: str, seed: int) -> float:
    rows = read_rows(study.folder, f"{arm}-{seed}").to_pandas()
    end = rows[rows.step == rows.step.max()]
    ours, start, lengths, lengths_start = (
        torch.tensor(end[name].to_numpy())[:, None].double()
        for name in ("gold", "gold_start", "length", "length_start")
    )
    return length_controlled_win_rate(pair_wins(ours, start), lengths, lengths_start)[0]


def best_of_n(study: Study) -> str:
    """The start's best of n by the proxy."""
    results = [result for (arm, _), result in sorted(study.counted.items()) if arm == "sft_best" and result.best_of_n]
    rows = []
    for n in results[0].best_of_n if results else []:
        found = [result.best_of_n[n] for result in results]
        rows.append(
            [n, f"{found[0]['kl']:.2f}", *(spread([each[name] for each in found]) for name in ("gold", "proxy"))]
        )
    return table(["n", "KL", "gold", "proxy"], rows)


def laws_table(study: Study) -> str:
    by_arm: dict[str, list[tuple[Result, float]]] = {}
    for (arm, seed), run in sorted(study.frontiers["wins"].items()):
        by_arm.setdefault(arm, []).append((study.counted[arm, seed], float(run.kl[-1])))
    rows = [
        [law.arm, law.quantity, "–" if law.predicted is None else f"{law.predicted:.2f}", spread(law.measured)]
        for law in laws(by_arm)
    ]
    return table(["arm", "quantity", "law", "measured"], rows)


def hypotheses(study: Study) -> str:
    found, mpo, closed = findings(study), forgets_less(study), is_closed(study)
    corrected: list[float] = []
    if closed and mpo:
        corrected = holm([*(finding.p for finding in found), min(mpo.p, mpo.contradicted)])
    rows = []
    for place, finding in enumerate(found):
        test, (low, high) = finding.test, finding.bootstrap
        rows.append(
            [
                f"{finding.name}: {finding.claim}",
                f"{test.seeds}",
                f"{finding.kl:.1f}",
                f"{points(test.mean)} [{points(test.low)}, {points(test.high)}]",
                f"[{points(low)}, {points(high)}]",
                points(finding.at_half),
                f"{100 * test.detectable:.1f}",
                f"{corrected[place]:.3f}" if closed else "–",
                verdict(corrected[place], test.mean) if closed else "open",
            ]
        )
    if mpo:
        less, quality = mpo.forgetting, mpo.quality
        change = f"NLL {-less.mean:+.3f} [{-less.high:+.3f}, {-less.low:+.3f}]"
        rate = f"win rate {points(quality.mean)} [{points(quality.low)}, {points(quality.high)}]"
        sign = 1.0 if mpo.p <= mpo.contradicted else -1.0
        p, said = (f"{corrected[-1]:.3f}", verdict(corrected[-1], sign)) if closed else ("–", "open")
        detectable = f"{100 * quality.detectable:.1f}"
        rows.append(
            ["H6: MPO forgets less", f"{quality.seeds}", "–", f"{change}; {rate}", "–", "–", detectable, p, said]
        )
    head = ["claim", "seeds", "KL", "difference in points [95 %]", "bootstrap", "at half the KL"]
    head += ["detectable", "p (Holm)", "verdict"]
    return table(head, rows)


def secondary(study: Study) -> str:
    rows = []
    for a, b in SECONDARY:
        differences, kls = study.differences([(a, b)])
        if len(differences) > 1:
            test = MeanTest.of(differences)
            interval = f"{points(test.mean)} [{points(test.low)}, {points(test.high)}]"
            wins = [100 * rate for rate in study.head_to_head(a, b)]
            rows.append([a, b, f"{test.seeds}", f"{fmean(kls):.1f}", interval, spread(wins, 1)])
    return table(["A", "B", "seeds", "KL", "A − B in points [95 %]", "A beats B at the end %"], rows)


def summary(study: Study) -> str:
    """The state of the study in one sentence."""
    planned = planned_seeds(study)
    total = len(counted_cells(study.arms, planned or FIRST_SEEDS))
    done = sum(seed <= SEEDS[(planned or FIRST_SEEDS) - 1] for _, seed in study.counted)
    if is_closed(study):
        return f"All {total} counted runs are in."
    return f"{done} of {total} counted runs are in; no claim is decided yet."


TABLES: dict[str, Callable[[Study], str]] = {
    "summary": summary,
    "status": status,
    "provenance": provenance,
    "tuning": tuning,
    "hypotheses": hypotheses,
    "arms": arms_table,
    "secondary": secondary,
    "best_of_n": best_of_n,
    "laws": laws_table,
}


def page(study: Study, template: str) -> str:
    """The page with the tables in the places that name them, {{name}}."""
    for name, make in TABLES.items():
        template = template.replace(f"{{{{{name}}}}}", make(study))
    return template


def main() -> None:
    parser = argparse.ArgumentParser(description="Make every table and figure of the study from its results.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of study.md and images/study/")
    args = parser.parse_args()
    from studies.papers.figures import draw

    study = Study(args.results, read_arms())
    images = args.out / "images" / "study"
    images.mkdir(parents=True, exist_ok=True)
    draw(study, images)
    (args.out / "study.md").write_text(page(study, (HERE / "page.md").read_text()))


if __name__ == "__main__":
    main()
