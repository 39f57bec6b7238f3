"""The model card of an export: objective, reference, data, the verdict with its intervals, the whole configuration."""

import re
from pathlib import Path
from typing import Any

import yaml

from lit_align.errors import amount
from lit_align.evaluation.summary import RESULTS_HEAD, Summary
from lit_align.objectives.saved import SavedObjective

MADE_BY = "Trained with lit_align."
"""Sentence by which an export is recognized."""


def model_card(objective: SavedObjective, config: dict[str, Any], run: Path | None, adapter: bool) -> str:
    """The text of README.md.

    Args:
        config: The run's configuration; empty if there is none.
        run: The run's folder, which may hold a summary.
        adapter: Whether the export is an adapter alone.
    """
    name, base = objective.name, objective.policy.path
    front = {
        **({"base_model": base} if _is_hub_name(base) else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if objective.scores else "text-generation",
        "tags": ["lit_align", name],
    }
    facts = {
        "objective": f"{name}: {objective.formula}" if objective.formula else name,
        "start": base,
        "beta": _number(objective.beta),
        "proximal (λ)": _number(objective.proximal),
        "reference": _reference(objective),
        "LoRA": _lora(objective),
        "data": _data(config),
        "arguments of the chat template": _template_args(config),
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value)]
    lines = ["---", _yaml(front), "---", "", f"# {base} after {name}", "", MADE_BY, "", *table, ""]
    lines += [*_verdict(run, objective.step), *_use(base, objective.scores, adapter)]
    if config:
        lines += ["## Configuration", "", "```yaml", _yaml(config), "```"]
    return "\n".join(lines) + "\n"


def _is_hub_name(model: str) -> bool:
    """Whether a model may be on the hub, which refuses the card of a model that was made from a folder."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is not None and not Path(model).exists()


def _lora(objective: SavedObjective) -> str:
    """The options of LoRA that are set."""
    if objective.lora is None:
        return "no: all weights"
    return ", ".join(f"{name}={value}" for name, value in vars(objective.lora).items() if value not in (None, False))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def _reference(objective: SavedObjective) -> str:
    if objective.reference is None:
        return "none"
    return f"{objective.reference.path or 'the start'}, {objective.refresh or 'fixed'}"


def _data(config: dict[str, Any]) -> str:
    data = config.get("data") or {}
    options = data.get("init_args") or {}
    parts = [
        str(data.get("class_path", "")).rpartition(".")[2],
        str(options.get("prompts") or options.get("train") or ""),
    ]
    if scorer := options.get("scorer") or {}:
        arguments = scorer.get("init_args") or {}
        parts.append(f"scored by {arguments.get('function') or arguments.get('model') or scorer.get('class_path')}")
    return ", ".join(filter(None, parts))


def _template_args(config: dict[str, Any]) -> str:
    """Arguments with which the model was trained, and has to be prompted."""
    arguments = ((config.get("data") or {}).get("init_args") or {}).get("template_args") or {}
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _verdict(run: Path | None, step: int | None) -> list[str]:
    """The run's results, if they are those of the checkpoint at a step."""
    summary = Summary.read(run) if run else None
    if summary is None:
        return []
    if None not in (step, summary.step) and step != summary.step:
        return [f"This model is of step {step}. The run's results on held-out prompts are of step {summary.step}.", ""]
    lines = [
        f"## On {amount(summary.prompts, 'held-out prompts')}, against the start",
        "",
        _cell(summary.sentence()),
        "",
    ]
    if caution := summary.caution():
        lines += [_cell(caution), ""]
    lines += [f"| {' | '.join(RESULTS_HEAD)} |", "|---|---|---|---|"]
    for name, scorer in summary.scorers.items():
        cells = [f"{_cell(name)}: {_cell(scorer.identity)}", *scorer.cells(is_equal=summary.has_equal_lengths)]
        lines.append(f"| {' | '.join(cells)} |")
    kl = f"KL(policy‖start) = {summary.kl_from_start.value:z.2f} nats per response{summary.kl_condition}."
    return [*lines, "", kl, ""]


def _use(base: str, scores: bool, adapter: bool) -> list[str]:
    """How the exported folder is loaded, as Python."""
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    imports = ["from peft import PeftModel"] if adapter else []
    imports += [f"from transformers import {auto}, AutoTokenizer"]
    loaded = f"PeftModel.from_pretrained({auto}.from_pretrained({base!r}), FOLDER)"
    model = loaded if adapter else f"{auto}.from_pretrained(FOLDER)"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"
    return ["## Use", "", "```python", *imports, "", f"model = {model}", tokenizer, "```", ""]


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
