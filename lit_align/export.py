"""Writes a checkpoint as a folder that plain transformers (or plain peft) loads, with a model card.

The card states the objective, the reference, the data, the verdict with its intervals, and the whole configuration, as
far as the run's folder holds them. The objective and the policy are read from the checkpoint. Reference adapters are
not exported.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lit_align.checkpoints import CheckedShardReader, check_hash
from lit_align.console import relative
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.errors import UserError, first_line
from lit_align.evaluation.summary import Summary
from lit_align.loading import from_fields
from lit_align.objectives import PreferenceObjective, RewardModel
from lit_align.policy import LoRAConfig, Policy, PolicyConfig, is_adapter_weight
from lit_align.reference.config import ReferenceConfig


def export(source: str | Path, out: str | Path, adapter: bool = False) -> Path:
    """Write model (or adapter), tokenizer, generation config and README.md; returns the folder.

    Args:
        source: A run's folder, or a checkpoint in one: a file, or a folder of shards.
        out: Folder to write.
        adapter: Write the LoRA adapter alone instead of the merged model.

    Raises:
        UserError: the checkpoint is missing, damaged, or without an adapter; or `out` holds something else.
    """
    folder = Path(out)
    _check_folder(folder, "adapter_config.json" if adapter else "config.json")
    path = find_checkpoint(source)
    policy, hyperparameters = load_policy(path)
    if adapter and policy.adapter is None:
        raise UserError(f"export: --adapter has no effect: {path} trained all weights. Leave --adapter out.")
    run = next((folder for folder in path.parents if (folder / "config.yaml").exists()), None)
    config = configuration_of(run) if run else {}
    folder.mkdir(parents=True, exist_ok=True)
    if adapter:
        assert policy.adapter is not None
        policy.adapter.save_pretrained(str(folder), selected_adapters=["default"])
        policy.tokenizer.save_pretrained(folder)
    else:
        policy.save(folder)
    if (generation := getattr(policy.model, "generation_config", None)) is not None and not _scores(hyperparameters):
        tokenizer = PreferenceTokenizer(policy.tokenizer, max_prompt_length=1, max_response_length=1)
        generation.eos_token_id = tokenizer.end_ids()
        sampling = config.get("data", {}).get("init_args", {}).get("sampling") or {}
        if sampling.get("temperature", 0) > 0:
            generation.update(do_sample=True, temperature=sampling["temperature"], top_p=sampling["top_p"])
        generation.save_pretrained(folder)
    (folder / "README.md").write_text(_card(hyperparameters, config, run, adapter), encoding="utf-8")
    return folder


def _check_folder(folder: Path, ours: str) -> None:
    """Refuse a folder that holds anything but an earlier export of the same kind, which is overwritten."""
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and there & {"config.json", "adapter_config.json"} != {ours}:
        raise UserError(
            f"export: --out={folder} must be a new folder or an earlier export; it holds other files. Name another."
        )


def configuration_of(run: Path) -> dict[str, Any]:
    """The configuration of the run in a folder.

    Raises:
        UserError: it is damaged.
    """
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("model", "data")):
            raise ValueError("it has no model and data")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{relative(path)} is damaged ({first_line(error)}). Restore it, or delete it to do without."
        ) from error
    return config


def find_checkpoint(source: str | Path) -> Path:
    """The given checkpoint, or the newest one of a run."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such folder or checkpoint. Name a run's folder or one of its checkpoints.")
    if path.is_dir() and not (path / ".metadata").exists():
        found = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda each: each.stat().st_mtime)
        if not found:
            raise UserError(
                f"{source}: there is no checkpoint in {path / 'checkpoints'}. Name a checkpoint, or use the model that "
                "the run wrote to model/."
            )
        path = found[-1]
    return path.resolve() if path.is_symlink() else path


def load_policy(path: Path) -> tuple[Policy, dict[str, Any]]:
    """The policy of a checkpoint with its weights, without reference adapters, and the objective's hyperparameters."""
    check_hash(path)
    try:
        rest = path / "meta.pt" if path.is_dir() else path  # a folder of shards keeps all but the tensors there
        checkpoint = torch.load(rest, map_location="cpu", weights_only=True, mmap=True)
        hyperparameters = checkpoint["hyper_parameters"]
        state = _shards(path) if path.is_dir() else checkpoint["state_dict"]
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything from pickle and zip
        raise UserError(
            f"{path}: not a valid checkpoint of lit_align ({type(error).__name__}). Is it truncated? Name another."
        ) from error
    config = from_fields(PolicyConfig, hyperparameters["policy"])
    lora = from_fields(LoRAConfig, hyperparameters["lora"]) if hyperparameters["lora"] else None
    kept = {name: checkpoint.get(name) for name in ("hparams_name", "output_name")}
    hyperparameters = {**kept, **hyperparameters, "policy": config, "lora": lora}
    policy = _policy_class(hyperparameters).load(config, lora)
    weights = {name.removeprefix("policy."): w for name, w in state.items() if name.startswith("policy.")}
    left, more = policy.load_state_dict(weights, strict=False)
    trained = {f"model.{name}" for name, _ in policy.trainable_weights()}
    if lost := [name for name in left if name in trained] + [name for name in more if not is_adapter_weight(name)]:
        raise UserError(
            f"{path}: {len(lost)} weights do not fit the model {config.path!r}, such as {lost[0]!r}. Restore the model "
            "that was trained."
        )
    return policy.eval(), hyperparameters


def _shards(folder: Path) -> dict[str, Tensor]:
    """The policy's full weights from a folder of shards, without a process group."""
    prefix = "state_dict."
    reader = CheckedShardReader(folder)
    weights = {
        name.removeprefix(prefix): torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"{prefix}policy.") and isinstance(saved, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the missing process group
        load({"state_dict": weights}, storage_reader=reader, no_dist=True)
    return weights


def _policy_class(hyperparameters: dict[str, Any]) -> type[Policy]:
    from lit_align.objectives.reward_model import Scored

    return Scored if _scores(hyperparameters) else Policy


def _scores(hyperparameters: dict[str, Any]) -> bool:
    return hyperparameters["output_name"] == "reward"


def _card(hyperparameters: dict[str, Any], config: dict[str, Any], run: Path | None, adapter: bool) -> str:
    from lit_align import objectives

    scores = _scores(hyperparameters)
    written = hyperparameters.get("_class_path") or config.get("model", {}).get("class_path", "")
    name = written.rpartition(".")[2]
    cls = getattr(objectives, name, RewardModel if scores else PreferenceObjective)
    base, lora = hyperparameters["policy"].path, hyperparameters["lora"]
    front: dict[str, Any] = {"base_model": base, "library_name": "peft" if adapter else "transformers"}
    front |= {
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["lit_align", name or "DPO"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, allow_unicode=True).strip(),
        "---",
        "",
        f"# {base} after {name or 'training'}",
        "",
    ]
    lines += ["Trained with lit_align.", "", "| | |", "|---|---|"]
    facts = {"objective": f"{name}: {getattr(cls, 'formula', '')}" if name else "", "start": base}
    for key, value in (("beta", "beta"), ("proximal", "proximal (λ)")):
        facts[value] = str(hyperparameters.get(key, ""))
    facts |= {
        "reference": _reference(hyperparameters, config),
        "LoRA": str(lora or "no: all weights"),
        "data": _data(config),
    }
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    lines += ["", *_verdict(run)]
    use = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    lines += ["## Use", "", "```python"]
    if adapter:
        lines += ["from peft import PeftModel", f"from transformers import {use}, AutoTokenizer", ""]
        lines += [f"model = PeftModel.from_pretrained({use}.from_pretrained({base!r}), FOLDER)"]
    else:
        lines += [f"from transformers import {use}, AutoTokenizer", "", f"model = {use}.from_pretrained(FOLDER)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(FOLDER)", "```", ""]
    if config:
        lines += [
            "## Configuration",
            "",
            "```yaml",
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _reference(hyperparameters: dict[str, Any], config: dict[str, Any]) -> str:
    if "reference" not in hyperparameters:
        return "none"
    path = from_fields(ReferenceConfig, hyperparameters["reference"]).path
    rule = (config.get("reference_refresh") or {}).get("init_args")
    moved = f"; every {rule['tau']} {rule['unit']}(s) ← {_mixture(rule['alpha'])}" if rule else ", fixed"
    return f"{path or 'the start'}{moved}"


def _mixture(alpha: float) -> str:
    return "policy" if alpha == 1 else f"{alpha:g}·policy + {1 - alpha:g}·reference"


def _data(config: dict[str, Any]) -> str:
    data = config.get("data") or {}
    options = data.get("init_args") or {}
    scorer = options.get("scorer") or {}
    parts = [
        str(data.get("class_path", "")).rpartition(".")[2],
        str(options.get("prompts") or options.get("train") or ""),
    ]
    if scorer:
        arguments = scorer.get("init_args") or {}
        parts.append(f"scored by {arguments.get('function') or arguments.get('model') or scorer.get('class_path')}")
    return ", ".join(filter(None, parts))


def _verdict(run: Path | None) -> list[str]:
    summary = Summary.read(run) if run else None
    if summary is None:
        return []
    lines = [f"## On {summary.prompts} held-out prompts, against the start", "", _cell(summary.sentence()), ""]
    if summary.is_truncated:
        lines += [_cell(summary.truncation()), ""]
    lines += ["| scorer | reward | win rate (95 %) | at equal length |", "|---|---|---|---|"]
    for name, scorer in summary.scorers.items():
        rate, equal = scorer.win_rate, scorer.win_rate_length_controlled
        reward = f"{scorer.reward_start.value:.3f} → {scorer.reward_end.value:.3f}"
        fair = "n/a" if summary.is_truncated else f"{equal.value:.1%}"
        interval = f"{rate.value:.1%} ({rate.low:.1%} – {rate.high:.1%})"
        lines.append(f"| {_cell(name)}: {_cell(scorer.identity)} | {reward} | {interval} | {fair} |")
    return [*lines, "", f"KL(policy‖start) = {summary.kl_from_start.value:.2f} nats per response.", ""]


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
