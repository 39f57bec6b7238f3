"""Coverage and width of a win rate's 95 % interval: `python benchmarks/intervals.py`, a minute on a CPU.

Printed are three Markdown tables: the share of the simulated experiments whose interval (`rate_interval`) holds the
true rate, its mean width, and the share for a percentile bootstrap. Each column is a true rate, and by symmetry its
complement: 99 % is also 1 %. Each line is a number of prompts, a number of comparisons for each prompt, and their
correlation ρ within a prompt. The prompts' own rates have a beta distribution with that mean and ρ.
"""

import argparse
import math

import torch
from torch import Tensor

from lit_align.metrics.win_rate import bootstrap_interval, rate_interval

RATES = (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
DESIGNS = [
    (prompts, comparisons, within)
    for comparisons, within in ((1, 0.0), (16, 0.0), (16, 0.3), (16, 0.6))
    for prompts in (16, 64, 128)
]
TITLES = ("Coverage in %", "Mean width in points", "Coverage of a percentile bootstrap in %")


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


def measure(rate: float, values: Tensor, bootstraps: int) -> tuple[float, float, float]:
    """Coverage and mean width of our interval, and the bootstrap's coverage in the first experiments."""
    ours = torch.tensor([rate_interval(each) for each in values], dtype=torch.float64)
    others = torch.tensor([bootstrap_interval(each, resamples=1000) for each in values[:bootstraps]])
    width = (ours[:, 1] - ours[:, 0]).mean().item()
    return _coverage(rate, ours), width, _coverage(rate, others)


def _coverage(rate: float, intervals: Tensor) -> float:
    low, high = intervals.double().T
    return ((low <= rate) & (rate <= high)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiments", type=int, default=4000, help="for each figure; a tenth of them for the bootstrap"
    )
    count = parser.parse_args().experiments
    torch.manual_seed(0)
    found = [[measure(rate, experiments(rate, *design, count), count // 10) for rate in RATES] for design in DESIGNS]
    for place, title in enumerate(TITLES):
        of_bootstrap = place == 2
        error = 100 * math.sqrt(0.05 * 0.95 / (count // 10 if of_bootstrap else count))
        print(f"\n{title}" + ("" if place == 1 else f" (standard error {error:.1f} at 95 %)"))
        print(f"\n| prompts | comparisons | ρ | {' | '.join(f'{rate:.0%}' for rate in RATES)} |\n|{'---|' * 9}")
        for (prompts, comparisons, within), row in zip(DESIGNS, found, strict=True):
            figures = " | ".join(f"{100 * each[place]:.1f}" for each in row)
            print(f"| {prompts} | {comparisons} | {within:g} | {figures} |")


if __name__ == "__main__":
    main()
