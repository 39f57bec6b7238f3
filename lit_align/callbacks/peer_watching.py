"""Ends a run on several processes in all of them when one dies or hangs (`peers.py`)."""

from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import Phase
from lit_align.peers import PeerWatch


class PeerWatching(AlignCallback):
    """Watches the other processes from the setup of a run to its end; added automatically.

    Args:
        minutes: How long a process may be silent or keep the others waiting; the command line gives data.wait_minutes.
    """

    order = Order.LAST
    in_dry_run = DryRun.SKIP

    def __init__(self, minutes: float = 60):
        self.minutes = minutes
        self._watch: PeerWatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and self._watch is None:
            self._watch = PeerWatch(self.minutes, lambda: _phase(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the other processes after an error; they agree about an interruption themselves."""
        if self._watch is not None:
            failed = isinstance(exception, Exception)
            if failed:
                self._watch.settle()
            self._watch.close(failed=failed)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _phase(trainer: Trainer) -> str:
    """The phase that prints its progress, or the step."""
    running = Phase.running[-1:]
    return running[0].name if running else f"after step {trainer.global_step}"
