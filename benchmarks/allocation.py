"""A training step with glibc's own thresholds, with freed memory kept (`lit_align/allocation.py`), and with huge pages.

The sides take turns on one thread, each with full weights in `turns.weight_type` and a live reference. Huge pages are
asked for by GLIBC_TUNABLES, with which `keep_freed_memory` leaves glibc alone; they need a kernel that gives them on
request (/sys/kernel/mm/transparent_hugepage/enabled).

    python benchmarks/allocation.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from step import LENGTHS, ours, write_batch
from turns import as_row, ratio, take_turns, write

from lit_align.allocation import SWITCH

KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
SIDES = {
    "plain": {SWITCH: "0"},
    "kept": {},
    "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "huge_kept": {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:{KEPT}"},
}


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=4, help="prompts in a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/allocation.json"))
    options = parser.parse_args(args)
    rows = []
    for lengths in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            data = write_batch(Path(folder, "batch.jsonl"), options.model, options.batch, *LENGTHS[lengths])
            side = partial(ours, model=options.model, data=data, batch_size=options.batch, steps=1 + options.repeats)
            sides = dict.fromkeys(options.sides, side)
            measured = dict(zip(sides, take_turns(sides, options.repeats, environments=SIDES), strict=True))
        for name, each in measured.items():
            first = measured[options.sides[0]]
            print(
                f"{lengths:<14} {name:<10} {each.cpu:6.2f} s, {ratio(each, first):.2f} ×, {each.peak:.1f} GB",
                flush=True,
            )
        rows.append({"lengths": lengths} | as_row(**measured))
        write(options.out, rows, batch=options.batch, model=options.model)
    return rows


if __name__ == "__main__":
    main()
