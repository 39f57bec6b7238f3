"""torchmetrics for preference optimization; each file explains its metrics with their formulas."""

from lit_align.metrics.preference import PreferenceMetrics
from lit_align.metrics.win_rate import WinRateMetric, bootstrap_interval, win_rates

__all__ = ["PreferenceMetrics", "WinRateMetric", "bootstrap_interval", "win_rates"]
