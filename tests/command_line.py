"""A configuration that the tests of the command line change, and what they read of it."""

from collections.abc import Callable
from pathlib import Path

from lit_align.cli import AlignCLI

DPO_YAML = """
model:
  class_path: DPO
  init_args:
    policy: {path: ./model, dtype: float32}
    lora: {r: 4}
    beta: 0.2
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: OfflinePairs
  init_args: {train: pairs.jsonl, batch_size: 2}
reference_refresh: {alpha: 0.6, tau: 1}
trainer:
  max_epochs: 1
  accelerator: cpu
  default_root_dir: run
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""

FIT = ("fit", "--config", "dpo.yaml")
Errors = Callable[..., str]
"""Run a command that must fail, and return its one paragraph."""


def parse(*args: str) -> AlignCLI:
    """All of it built, nothing run: no model is loaded before a run."""
    return AlignCLI(["--config", "dpo.yaml", *args], run=False)


def config(*args: str) -> dict:
    return parse(*args).config.as_dict()


def edited(old: str, new: str) -> str:
    """Name of a copy of dpo.yaml with one thing changed."""
    assert old in DPO_YAML
    Path("edited.yaml").write_text(DPO_YAML.replace(old, new))
    return "edited.yaml"
