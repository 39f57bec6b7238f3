"""Callbacks: what cuts across objectives."""

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.callbacks.drift import Drift
from lit_align.callbacks.fsdp_sharding import FSDP2Strategy, FSDPSharding
from lit_align.callbacks.interruption import Interruption
from lit_align.callbacks.monitor_check import MonitorCheck
from lit_align.callbacks.peer_watching import PeerWatching
from lit_align.callbacks.phase_progress import PhaseProgress
from lit_align.callbacks.predictions import Predictions
from lit_align.callbacks.reference_refresh import ReferenceRefresh
from lit_align.callbacks.run_report import RunReport
from lit_align.callbacks.wandb_report import WandbReport
from lit_align.callbacks.win_rate import WinRate

__all__ = [
    "AlignCallback",
    "Drift",
    "DryRun",
    "FSDP2Strategy",
    "FSDPSharding",
    "Interruption",
    "MonitorCheck",
    "Order",
    "PeerWatching",
    "PhaseProgress",
    "Predictions",
    "ReferenceRefresh",
    "RunReport",
    "WandbReport",
    "WinRate",
]
