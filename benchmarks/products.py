"""Rate of matrix products by type and number of rows, on one thread; why `auto` avoids bfloat16 on some CPUs.

A product multiplies rows of 576 numbers by a weight of 1536 × 576, which is a layer of SmolLM2-135M.

    python benchmarks/products.py
"""

import argparse
import time
from statistics import median

import torch
from torch.nn.functional import linear
from turns import processor

from lit_align.dtypes import dtype_name, is_fast

ROWS = (1, 16, 256, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rate(rows: int, dtype: torch.dtype, repeats: int) -> float:
    """Floating-point operations in a second."""
    x, weight = torch.randn(rows, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    seconds = []
    for _ in range(1 + repeats):
        began = time.process_time()
        for _ in range(max(1, 256 // rows)):
            linear(x, weight)
        seconds.append(time.process_time() - began)
    return 2 * rows * weight.numel() * max(1, 256 // rows) / median(seconds[1:])


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    print(f"{processor()}; GFLOP/s by rows")
    print(f"{'':<10}" + "".join(f"{rows:>8}" for rows in ROWS))
    for dtype in DTYPES:
        rates = "".join(f"{rate(rows, dtype, options.repeats) / 1e9:>8.0f}" for rows in ROWS)
        print(f"{dtype_name(dtype):<10}{rates}   {'fast' if is_fast(dtype) else 'slow'}")


if __name__ == "__main__":
    main()
