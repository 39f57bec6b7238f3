"""Cost of the proximal term: a step of PR-DPO against one of iterative DPO.

Both train on a round's pairs with recorded log π_ref and log π_s, so both hold one model only. The proximal form mixes
the two recorded numbers of each response.

    python benchmarks/proximal.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from step import LENGTHS, ours, write_batch
from turns import as_row, ratio, take_turns, write


class Proximal(L.Callback):
    """Turns DPO into PR-DPO, for batches with recorded log π_s."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.proximal = 0.1


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["tldr", "hh"])
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/proximal.json"))
    options = parser.parse_args(args)

    rows = []
    print(f"{'lengths':<14}{'iterative DPO':>14}{'PR-DPO':>10}{'ratio':>9}{'memory':>9}")
    for lengths in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            data = write_batch(Path(folder, "batch.jsonl"), options.model, options.batch, *LENGTHS[lengths])
            side = partial(
                ours,
                model=options.model,
                data=data,
                batch_size=options.batch,
                steps=1 + options.repeats,
                recorded=("reference_logps", "sampler_logps"),
            )
            sides = {"iterative DPO": side, "PR-DPO": partial(side, callbacks=(Proximal(),))}
            base, proximal = take_turns(sides, options.repeats)
        rows.append({"lengths": lengths} | as_row(iterative=base, proximal=proximal))
        share = f"{ratio(proximal, base):.3f} ×"
        memory = f"{proximal.peak / base.peak:.2f} ×"
        print(f"{lengths:<14}{base.cpu:>12.2f} s{proximal.cpu:>8.2f} s{share:>9}{memory:>9}", flush=True)
    write(options.out, rows, batch=options.batch, model=options.model)
    return rows


if __name__ == "__main__":
    main()
