"""Cost of moving the reference, as a share of a training step: soft and hard, all weights, at TL;DR-like lengths.

A soft refresh at each step costs this share of the time; a hard one every tau steps costs 1/tau of it. A bfloat16
reference is mixed softly in a float32 accumulator and then rounded, so small alphas are not lost.

    python benchmarks/refresh.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from step import LENGTHS, ours, write_batch
from turns import Turn, as_row, ratio, take_turns, write

from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reference.config import RefreshRule


def refreshes(turn: Turn, *, model: str, dtype: Any, alpha: float, steps: int) -> None:
    """Repeat the refresh alone; the weights exceed the caches, so a step in between would not slow it down."""
    module = DPO(PolicyConfig(model, dtype=dtype))
    module.set_refresh_rule(RefreshRule(alpha, 1))
    module.configure_model()
    assert module.policy is not None
    assert module.reference is not None
    for _ in range(steps):
        turn.begin()
        module.reference.mix(module.policy, alpha)
        turn.end()


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", choices=LENGTHS, default="tldr")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/refresh.json"))
    options = parser.parse_args(args)

    rows = []
    print(f"{'weights':<10}{'step':>9}{'soft':>9}{'share':>8}{'hard':>9}{'share':>8}")
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            data = write_batch(Path(folder, "batch.jsonl"), options.model, options.batch, *LENGTHS[options.lengths])
            common = {"model": options.model, "dtype": dtype, "steps": 1 + options.repeats}
            sides = {
                "step": partial(ours, **common, data=data, batch_size=options.batch),
                "soft": partial(refreshes, **common, alpha=0.6),
                "hard": partial(refreshes, **common, alpha=1.0),
            }
            step, soft, hard = take_turns(sides, options.repeats)
        rows.append({"dtype": dtype, "lengths": options.lengths} | as_row(step=step, soft=soft, hard=hard))
        shares = [f"{refresh.cpu:>7.3f} s{ratio(refresh, step):>8.2%}" for refresh in (soft, hard)]
        print(f"{dtype:<10}{step.cpu:>7.2f} s{''.join(shares)}", flush=True)
    write(options.out, rows, batch=options.batch, model=options.model)
    return rows


if __name__ == "__main__":
    main()
