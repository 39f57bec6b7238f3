"""Tables, marks and the report of a run in W&B, beside the metrics and the configuration; offline too.

| metric | content |
|---|---|
| reference/refreshed | a mark at each refresh of the reference: the count, logged at that step alone |
| responses/validation, responses/test | held-out prompts with a response of the start and of the policy, and rewards |
| report | report.html of the run |
| (summary) | the results in summary.json: verdict/NAME by the training scorer, verdict/JUDGE/NAME by each judge |
| (artifacts) | the folder of each round, if `artifacts` is set |
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.callbacks.reference_refresh import ReferenceRefresh
from lit_align.data.base import data_module_of
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.rounds.store import RoundStore
from lit_align.errors import check_number
from lit_align.evaluation.rows import read_held_out
from lit_align.evaluation.summary import Summary
from lit_align.reporting.run_folder import held_out_files, metric_of, step_of, verdict_file

if TYPE_CHECKING:
    import wandb


class WandbReport(AlignCallback):
    """Response tables, refresh marks and the report for W&B; added automatically to a run with a WandbLogger.

    Args:
        rows: Prompts in each table.
        artifacts: Upload every round (responses, scores, log-probabilities) as an artifact.
    """

    option_name = "wandb_report"
    order = Order.PUBLISH
    in_dry_run = DryRun.SKIP

    def __init__(self, rows: int = 50, artifacts: bool = False):
        check_number("wandb_report.rows", rows, least=1)
        self.rows = rows
        self.artifacts = artifacts
        self._refreshes = 0
        self._logged: set[Path] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refreshes = _refreshes(trainer)
        self._logged = set(held_out_files(trainer.default_root_dir))  # written before the checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count = _refreshes(trainer)
        if count > self._refreshes:
            for logger in _loggers(trainer):
                logger.log_metrics({"reference/refreshed": float(count)}, step=trainer.global_step)
        self._refreshes = count

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for path in held_out_files(trainer.default_root_dir):
            if path not in self._logged:
                self._logged.add(path)
                self._log(trainer, step_of(path), {"responses/validation": self._table(path)})
        data = data_module_of(trainer)
        if self.artifacts and isinstance(data, OnPolicyPairs):
            import wandb

            now = data.current_round
            folder = RoundStore(data.folder, now.index, now.key).path  # other runs may share data.store
            for logger in _loggers(trainer):
                artifact = wandb.Artifact(f"{logger.experiment.id}-round-{now.index:03d}", type="round")
                artifact.add_dir(str(folder), name=folder.name)
                logger.experiment.log_artifact(artifact)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not _loggers(trainer):
            return
        import wandb

        shown: dict[str, Any] = {}
        if verdict_file(folder).exists():
            shown["responses/test"] = self._table(verdict_file(folder))
        if (folder / "report.html").exists():
            shown["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)
        self._log(trainer, trainer.global_step, shown)
        if summary := Summary.read(folder):
            for logger in _loggers(trainer):
                logger.experiment.summary.update({f"verdict/{name}": value for name, value in summary.flat().items()})

    def _log(self, trainer: Trainer, step: int, values: dict[str, Any]) -> None:
        for logger in _loggers(trainer) if values else []:
            logger.experiment.log(values | {"trainer/global_step": step})

    def _table(self, path: Path) -> "wandb.Table":
        import wandb

        rows = read_held_out(path)[: self.rows]
        columns = ["prompt", "start", "policy"]
        for scorer in rows[0].scorers:
            columns += [metric_of("rewards_start", scorer.name), metric_of("rewards", scorer.name)]
        data = []
        for row in rows:
            rewards = [value for each in row.scorers for value in (each.rewards_start[0], each.rewards[0])]
            data.append([row.prompt, row.responses_start[0], row.responses[0], *rewards])
        return wandb.Table(columns=columns, data=data)  # type: ignore[arg-type]


def _loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _refreshes(trainer: Trainer) -> int:
    return sum(callback.count for callback in trainer.callbacks if isinstance(callback, ReferenceRefresh))  # type: ignore[attr-defined]
