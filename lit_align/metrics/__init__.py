"""torchmetrics for preference optimization; each file gives the formulas of its metrics."""

from lit_align.metrics.best_of_n import best_of_n, best_of_n_kl
from lit_align.metrics.diversity import distinct_n, self_bleu
from lit_align.metrics.kl import kl_from_sampler
from lit_align.metrics.preference import PreferenceMetrics
from lit_align.metrics.win_rate import WinRateMetric, bootstrap_interval, length_controlled_win_rate, win_rates

__all__ = [
    "PreferenceMetrics",
    "WinRateMetric",
    "best_of_n",
    "best_of_n_kl",
    "bootstrap_interval",
    "distinct_n",
    "kl_from_sampler",
    "length_controlled_win_rate",
    "self_bleu",
    "win_rates",
]
