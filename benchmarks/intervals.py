"""Coverage and width of a win rate's 95 % interval: `python benchmarks/intervals.py`, some minutes on a CPU.

Each line is a true rate, a number of prompts, a number of comparisons for each prompt, and their correlation ρ within a
prompt. The prompts' own rates have a beta distribution with that mean and ρ. Printed are the share of the simulated
experiments whose interval holds the true rate, and the mean width (`rate_interval`, percentile bootstrap).
"""

import argparse

import torch
from torch import Tensor

from lit_align.metrics.win_rate import bootstrap_interval, rate_interval

CASES = [
    (rate, prompts, comparisons, within)
    for comparisons, within in ((1, 0.0), (16, 0.0), (16, 0.3), (16, 0.6))
    for prompts in (16, 64, 128)
    for rate in (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
]


def experiments(rate: float, prompts: int, comparisons: int, within: float, count: int) -> Tensor:
    """Win rates of prompts, [count, prompts].

    Args:
        within: Correlation of two comparisons of one prompt, ρ.
    """
    means = torch.full((count, prompts), rate, dtype=torch.float64)
    if within:
        size = (1 - within) / within
        high, low = torch.tensor([rate * size, (1 - rate) * size], dtype=torch.float64)
        means = torch.distributions.Beta(high, low).sample((count, prompts))
    return torch.distributions.Binomial(comparisons, means).sample() / comparisons


def measure(rate: float, values: Tensor, bootstraps: int) -> list[float]:
    """Coverage and mean width of both intervals."""
    wilson = [rate_interval(each) for each in values]
    bootstrap = [bootstrap_interval(each, resamples=1000) for each in values[:bootstraps]]
    found: list[float] = []
    for intervals in (wilson, bootstrap):
        found.append(sum(low <= rate <= high for low, high in intervals) / len(intervals))
        found.append(sum(high - low for low, high in intervals) / len(intervals))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000, help="simulated for each line")
    parser.add_argument("--case", nargs="*", type=int, help="numbers of lines, from 0; all if left out")
    given = parser.parse_args()
    count = given.experiments
    print("rate  prompts  comparisons    ρ    coverage  width    bootstrap's  width")
    for number, (rate, prompts, comparisons, within) in enumerate(CASES):
        if given.case and number not in given.case:
            continue
        torch.manual_seed(number)
        values = experiments(rate, prompts, comparisons, within, count)
        covered, width, other, other_width = measure(rate, values, count // 10)
        print(
            f"{rate:.2f}  {prompts:7}  {comparisons:11}  {within:.1f}    {covered:8.3f}  {width:.3f}    {other:11.3f}  "
            f"{other_width:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
