"""What a run says of itself: a header before it begins, and at the end curves, the model, and how to go on."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from rich.table import Table
from rich.text import Text

from lit_align.console import say
from lit_align.loggers import MetricsCSV, read_metrics
from lit_align.objectives import PreferenceObjective


class RunReport(Callback):
    """Prints the header and the end of a run; keeps metrics.csv, curves.png and the trained model in its folder.

    Args:
        save_model: Write the trained model in transformers' format to `model` in the run's folder.
    """

    def __init__(self, save_model: bool = True):
        self.save_model = save_model

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(logger, MetricsCSV) for logger in trainer.loggers):
            trainer.loggers = [*trainer.loggers, MetricsCSV(trainer.default_root_dir)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            return
        lines = list(pl_module.describe())
        describe_data = getattr(trainer.datamodule, "describe", None)  # type: ignore[attr-defined]
        lines += list(describe_data()) if describe_data else []
        lines += [("memory", _memory(pl_module)), ("run", trainer.default_root_dir)]
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in lines:
            table.add_row(Text(name, style="bold"), Text(text))
        say(table)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        if not trainer.is_global_zero or not isinstance(pl_module, PreferenceObjective):
            return
        folder = Path(trainer.default_root_dir)
        say()
        if self.save_model and pl_module.policy is not None:
            pl_module.policy.save(folder / "model")
            say(f"model      {folder / 'model'} (transformers format, with tokenizer)")
        if rows := read_metrics(folder / "metrics.csv"):
            plot_curves(rows, folder / "curves.png")
            say(f"curves     {folder / 'curves.png'}, from {folder / 'metrics.csv'}")
        checkpoint = trainer.checkpoint_callback
        path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
        if path:
            say(f"go on      python train.py fit --config {folder / 'config.yaml'} --ckpt_path {_relative(path)}")


def _memory(module: PreferenceObjective) -> str:
    """What weights, gradients, AdamW's two moments and a second model take; activations depend on the batch."""
    assert module.policy is not None
    weights = sum(w.numel() * w.element_size() for w in module.policy.parameters())
    trained = sum(w.numel() * w.element_size() for _, w in module.policy.trainable_weights())
    reference = getattr(module, "reference", None)
    copied = reference.parameters() if isinstance(reference, torch.nn.Module) else []
    second = sum(w.numel() * w.element_size() for w in copied)
    parts = {"policy": weights, "gradients": trained, "AdamW": 2 * trained, "reference": second}
    listed = " + ".join(f"{size / 1e9:.2f} {name}" for name, size in parts.items() if size)
    return f"about {sum(parts.values()) / 1e9:.2f} GB = {listed}; activations come on top"


def _relative(path: str) -> str:
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


PANELS = {
    "loss": ["train/loss", "val/loss"],
    "reward margin": ["train/reward_margin", "val/reward_margin"],
    "reward accuracy": ["train/reward_accuracy", "val/reward_accuracy"],
    "log ratio to the anchor (nats)": ["train/log_ratio_chosen", "train/log_ratio_rejected"],
    "reward of fresh responses": ["round/reward", "val/reward"],
    "KL(policy‖start), nats per response": ["val/kl_from_start"],
}


def plot_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Draw the panels that have values, with marks where rounds begin and where the reference is refreshed."""
    panels = {title: [n for n in names if any(n in row for row in rows)] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.2 * columns, 3 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    rounds = [row["step"] for row in rows if row.get("round", 0) > 0]
    marks = {"refresh of the reference": ("tab:red", _refresh_steps(rows)), "new round": ("0.8", rounds)}
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, title, names, rows, marks)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _refresh_steps(rows: list[dict[str, float]]) -> list[float]:
    """The steps at which the count of refreshes went up."""
    counts = [(row["step"], row["reference/refreshes"]) for row in rows if "reference/refreshes" in row]
    before = [0.0, *(count for _, count in counts)]
    return [step for (step, count), last in zip(counts, before, strict=False) if count > last]


def _draw(
    axis: Axes,
    title: str,
    names: list[str],
    rows: list[dict[str, float]],
    marks: dict[str, tuple[str, list[float]]],
) -> None:
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 12 else None, markersize=3, label=name)
    for label, (color, steps) in marks.items():
        for number, step in enumerate(steps if len(steps) <= 40 else []):
            line = {"color": color, "linewidth": 0.8, "linestyle": ":", "zorder": 0}
            axis.axvline(step, label=label if number == 0 else None, **line)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
