"""`lit-align init`: a commented configuration for an objective, a model, data and a machine.

Memory is estimated from bytes per weight: full training keeps weights, gradients and two moments in float32 (16), and
an anchored objective's reference (4 more). On GPUs, LoRA keeps the model in bfloat16 (2), and in 4 bits under QLoRA
(0.6). A third is left for activations. `doctor` measures what this estimates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_align import objectives
from lit_align.cli.classes import class_names, form_hint, options
from lit_align.cli.explain import did_you_mean
from lit_align.console import command
from lit_align.data import FunctionScorer
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Rows
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.errors import UserError, amount, check_number
from lit_align.model_files import naming_errors, read_architecture
from lit_align.objectives import EXO, MPO, SFT, SPPO, PreferenceObjective
from lit_align.policy import PolicyConfig

SAMPLE = 500
"""Rows whose lengths are looked up."""

ROWS_TO_HOLD_OUT = 200
"""Fewest rows of which a share is held out for validation."""

# Options without which an objective cannot learn, or learns badly: from any data, and from pairs in a file.
OPTIONS: dict[type[PreferenceObjective], dict[str, str]] = {
    MPO: {
        "beta: 0.0": "weight of texts in data.sft",
        "length_normalize: true": "sums differ so much that σ saturates",
    },
}
PAIRS_OPTIONS: dict[type[PreferenceObjective], dict[str, str]] = {
    SPPO: {"hard_labels: true": "the chosen response wins; in rounds, the scorer gives win probabilities"},
    EXO: {"label_smoothing: 0.001": "ε of the target (1−ε, ε)"},
}


@dataclass(frozen=True)
class Machine:
    """The hardware that a run may use."""

    gpus: int
    memory: float  # GB of each GPU; without GPUs, of the machine

    @classmethod
    def here(cls) -> Machine:
        if torch.cuda.is_available():
            return cls(torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory / 1e9)
        return cls(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)

    def with_options(self, gpus: int | None, memory: float | None) -> Machine:
        """This machine, or the one that the options name.

        Raises:
            UserError: an option is not possible.
        """
        check_number("init: --devices", gpus, least=0)
        check_number("init: --memory", memory, above=0)
        changes = {"gpus": gpus, "memory": memory}
        return replace(self, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fit:
    """How the weights are trained so that they fit."""

    lora: bool
    quantized: bool
    sharded: bool

    @classmethod
    def of(cls, weights: float, machine: Machine, anchored: bool) -> Fit:
        """The first of full training, sharded full training, LoRA and QLoRA that fits.

        Args:
            weights: Number of the model's weights.
        """
        room = machine.memory * 1e9 * 2 / 3
        full = weights * (20 if anchored else 16)
        if full <= room:
            return cls(False, False, False)
        if machine.gpus > 1 and full / machine.gpus <= room:
            return cls(False, False, True)
        return cls(True, quantized=machine.gpus > 0 and 2 * weights > room, sharded=False)


def objective_of(name: str) -> type[PreferenceObjective]:
    """The objective of a name.

    Raises:
        UserError: there is none.
    """
    names = class_names(PreferenceObjective)
    if name not in names:
        hint = form_hint(name) or did_you_mean(name, names)
        raise UserError(f"init: there is no objective {name!r}.{hint} Known: {', '.join(names)}.")
    return getattr(objectives, name)


def columns_of(text: str | None) -> dict[str, str]:
    """The mapping of columns that the option spells out.

    Raises:
        UserError: it is not a mapping of names to texts.
    """
    try:
        columns = yaml.safe_load(text or "{}")
    except yaml.YAMLError:
        columns = None
    if not isinstance(columns, dict) or not all(isinstance(each, str) for item in columns.items() for each in item):
        raise UserError(f"init: --columns={text} must be like '{{chosen: good, rejected: bad}}'. Change it.")
    return columns


@dataclass(frozen=True)
class Request:
    """The choices that the configuration is made for.

    Args:
        policy: Hub name or folder of the model.
        data: Rows to train on; None with `prompts`.
        prompts: Prompts of rounds, whose responses `scorer` rewards.
        scorer: path/to/file.py:function.
        columns: Source of each column, as in data.columns.
        file: Name of the configuration's file, for the commands in its comments.
    """

    objective: type[PreferenceObjective]
    policy: str
    data: str | None
    prompts: str | None
    scorer: str | None
    machine: Machine
    columns: dict[str, str]
    file: str = "THIS_FILE"


@dataclass(frozen=True)
class Data:
    """The rows of a configuration's data, and their lengths.

    Args:
        looked_at: Rows whose lengths are known.
        prompt: Tokens of the longest prompt among them.
        response: Tokens of the longest response among them; of rounds, those that are sampled at most.
        prompt_limit: Most tokens of a prompt that is kept.
    """

    rows: Rows
    looked_at: int
    prompt: int
    response: int
    prompt_limit: int

    @classmethod
    def read(cls, request: Request) -> Data:
        """Look up the data of a configuration.

        Raises:
            UserError: it cannot be read, the objective cannot learn from rounds, or there is no such scorer.
        """
        source, module = request.data or str(request.prompts), request.objective(PolicyConfig(request.policy))
        if not request.data and not module.data_needs().can_sample:
            name = request.objective.__name__
            raise UserError(
                f"init: --prompts={source} must be --data=FILE: {name} learns from a file, not from its own responses."
            )
        kind = module.data_needs().data_kind if request.data else "prompts"
        rows = read_rows(source, kind=kind, columns=request.columns)
        sample = rows.rows[:SAMPLE]
        tokenizer = PreferenceTokenizer(module.tokenizer)
        prompt = max((len(ids) for _, ids in tokenizer.prompts(sample)), default=1)
        if request.data:
            response = max((len(ids) for row in sample for ids in tokenizer.response_ids(row)), default=1)
            return cls(rows, len(sample), prompt, response, _limit(prompt))
        FunctionScorer(str(request.scorer))  # raises if the function does not exist
        positions = module.positions or 1 << 20
        response = min(256, max(positions - prompt, positions // 8))
        return cls(rows, len(sample), prompt, response, min(_limit(prompt), positions - response))


def configuration(request: Request) -> str:
    """The configuration's text.

    Raises:
        UserError: the model or the data cannot be read, the objective cannot learn from rounds, or there is
            no such scorer.
    """
    weights = count_weights(request.policy)
    fit = Fit.of(weights, request.machine, request.objective.anchored)
    data = Data.read(request)
    given = {name: getattr(request, name) for name in ("policy", "data", "prompts", "scorer")}
    given["columns"] = _columns(request)
    words = (word for name, value in given.items() if value for word in (f"--{name}", value))
    config = ("--config", request.file)
    lines = [
        f"# Made by: {command('init', request.objective.__name__, *words)}",
        f"# Try it: {command('doctor', *config)}; train: {command('fit', *config)}",
        *_model(request, weights, fit),
        *_data(request, data),
        *_trainer(request, fit),
    ]
    return "\n".join(lines) + "\n"


def count_weights(policy: str) -> int:
    """Number of a model's weights, from its configuration alone.

    Raises:
        UserError: the model does not exist, or it is a GGUF file, whose head comes with its weights.
    """
    if policy.endswith(".gguf"):
        raise UserError(
            f"init: --policy={policy} must be a folder or a hub name, since a GGUF file does not tell its size. Name "
            "the model that it was made from."
        )
    config = read_architecture(PolicyConfig(policy), "init: --policy")
    with naming_errors(f"init: --policy: cannot load {policy!r}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def _model(request: Request, weights: int, fit: Fit) -> Iterator[str]:
    objective = request.objective
    yield "model:"
    yield _noted(f"  class_path: {objective.__name__}", objective.formula)
    yield "  init_args:"
    yield "    policy:"
    yield _noted(f"      path: {_scalar(request.policy)}", f"{weights / 1e6:.0f} M weights")
    if weights > 5e8:
        yield _noted("      gradient_checkpointing: true", "less memory, a third more time")
    if fit.quantized:
        yield _noted("      quantize: nf4", "frozen weights in 4 bits: pip install 'lit-align[quantize]'")
    if fit.lora:
        yield _noted("    lora:", "full training would not fit into memory")
        yield "      r: 16"
        yield "      alpha: 32"
    if objective.anchored:
        yield _noted(f"    beta: {options(objective)['beta']}", "weight of staying near the reference")
    own = OPTIONS.get(objective, {}) | (PAIRS_OPTIONS.get(objective, {}) if request.data else {})
    for option, note in own.items():
        yield _noted(f"    {option}", note)
    yield "    optimizer:"
    yield "      class_path: torch.optim.AdamW"
    yield "      init_args:"
    rate = "1.0e-4" if fit.lora else "1.0e-5" if weights < 1e9 else "1.0e-6"
    yield _noted(f"        lr: {rate}", "the first option to tune, then beta")
    yield "        weight_decay: 0.0"


def _data(request: Request, data: Data) -> Iterator[str]:
    rows = data.rows
    yield "data:"
    yield f"  class_path: {'OfflinePairs' if request.data else 'OnPolicyPairs'}"
    yield "  init_args:"
    yield f"    # {amount(len(rows), 'rows')}: {rows.description}"
    if rows.unread:
        yield f"    # not read: {', '.join(rows.unread)}"
    yield f"    train: {_scalar(request.data)}" if request.data else f"    prompts: {_scalar(str(request.prompts))}"
    if request.columns:
        yield f"    columns: {_columns(request)}"
    if request.data and len(rows) >= ROWS_TO_HOLD_OUT:
        yield _noted("    validation: 0.05", "a held-out share of the prompts")
    longest = f"the longest of {data.looked_at} has {amount(data.prompt, 'tokens')}"
    yield _noted(f"    max_prompt_length: {data.prompt_limit}", longest)
    if data.prompt > data.prompt_limit:
        yield _noted("    long_prompts: drop", "the model has no room for a response to them")
    if request.data:
        yield _noted(f"    max_response_length: {_limit(data.response)}", f"the longest has {data.response}")
    else:
        yield from _round(request, data.response)
    yield _noted(f"    batch_size: {8 if request.machine.gpus else 4}", "prompts for each device and micro-batch")


def _columns(request: Request) -> str:
    """The mapping of columns on one line of YAML; empty without one."""
    return yaml.safe_dump(request.columns, default_flow_style=True, width=1 << 20).strip() if request.columns else ""


def _round(request: Request, longest: int) -> Iterator[str]:
    yield "    responses_per_prompt: 4"
    if request.objective is SFT:
        yield "    pairing:"
        yield _noted("      class_path: Best", "imitate the best response to each prompt")
    yield "    sampling:"
    yield _noted(f"      max_new_tokens: {longest}", "longer responses are cut")
    yield "    scorer:"
    yield _noted("      class_path: FunctionScorer", "or a reward model, or a language model as judge")
    yield "      init_args:"
    yield f"        function: {_scalar(str(request.scorer))}"


def _trainer(request: Request, fit: Fit) -> Iterator[str]:
    machine = request.machine
    yield "trainer:"
    yield "  max_epochs: 1" if request.data else _noted("  max_epochs: 3", "rounds")
    yield f"  default_root_dir: runs/{request.objective.__name__.lower()}"
    yield "  gradient_clip_val: 1.0"
    yield _noted("  accumulate_grad_batches: 4", "a step's batch is this × batch_size × devices")
    yield "  log_every_n_steps: 1"
    if machine.gpus:
        yield f"  devices: {machine.gpus}"
    if machine.gpus > 1:
        yield f"  strategy: {'fsdp2' if fit.sharded else 'ddp'}"
    if fit.sharded:
        yield "fsdp_sharding:"
        yield _noted("  compute_dtype: bfloat16", "shards and optimizer stay in float32")


def _noted(line: str, note: str) -> str:
    return f"{line:<39} # {note}"


def _scalar(text: str) -> str:
    """The text as a value of YAML, quoted where it would mean something else."""
    try:
        return text if yaml.safe_load(text) == text else json.dumps(text, ensure_ascii=False)
    except yaml.YAMLError:
        return json.dumps(text, ensure_ascii=False)


def _limit(length: int) -> int:
    """A limit of length with a little room, a multiple of 64."""
    return -(-int(length * 1.1) // 64) * 64
