"""Writes a checkpoint as a folder that plain transformers (or plain peft) loads, with a model card (`model_card.py`).

The objective and the policy are read from the checkpoint; the data, the verdict and the configuration from the run's
folder, as far as it holds them. Reference adapters are not exported.
"""

import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import GenerationConfig

from lit_align import provenance
from lit_align.checkpoints import CheckedShardReader, check_hash, newest_first
from lit_align.console import relative
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.errors import UserError, amount, first_line
from lit_align.files import writing
from lit_align.model_card import MADE_BY, model_card
from lit_align.objectives.reward_model import Scored
from lit_align.objectives.saved import SavedObjective
from lit_align.policy import Policy, is_adapter_weight
from lit_align.reporting.run_folder import run_of

FILTERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of transformers that only sampling reads."""

PART = ".export"
"""Folder in an export's folder while it is written."""

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)
"""Patterns of an export's files. Others in its folder, such as a conversion of the model, stay."""


def export(source: str | Path, out: str | Path, adapter: bool = False) -> Path:
    """Write model (or adapter), tokenizer, generation config and README.md; returns the folder.

    Args:
        source: A run's folder, its checkpoints/, or a checkpoint in it: a file, or a folder of shards.
        out: Folder to write. The files of an earlier export in it are replaced.
        adapter: Write the LoRA adapter alone instead of the merged model.

    Raises:
        UserError: the checkpoint is missing, damaged, or without an adapter; or `out` holds something else.
    """
    folder = Path(out)
    _check_folder(folder)
    path = find_checkpoint(source)
    policy, objective = load_policy(path)
    if adapter and policy.adapter is None:
        raise UserError(f"export: --adapter has no effect: {path} trained all weights. Leave --adapter out.")
    if adapter and objective.scores:
        raise UserError(
            "export: --adapter would leave out the reward model's output head, which the adapter changes. Leave it out "
            "to export the merged model."
        )
    run = run_of(path)
    config = configuration_of(run) if run else {}
    with _replacing(folder) as part:
        if adapter:
            assert policy.adapter is not None
            policy.adapter.save_pretrained(str(part), selected_adapters=["default"])
            policy.tokenizer.save_pretrained(part)
        else:
            policy.save(part)
        sampling = config.get("data", {}).get("init_args", {}).get("sampling") or {}
        tokenizer = PreferenceTokenizer(policy.tokenizer, model_ends=lambda: policy.ends)
        save_generation_config(policy, tokenizer, sampling, part)
        (part / "README.md").write_text(model_card(objective, config, run, adapter), encoding="utf-8")
    return folder


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds files, unless its model card says that they are an earlier export."""
    card = folder / "README.md"
    is_ours = (folder / PART).exists() or (card.is_file() and MADE_BY in card.read_text("utf-8", errors="replace"))
    if folder.exists() and any(folder.iterdir()) and not is_ours:
        raise UserError(
            f"export: --out={folder} must be a new folder or an earlier export; it holds other files. Name another."
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a folder for the files of an export, which take the place of an earlier one's once all are written."""
    part = folder / PART
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir(parents=True)
        try:
            yield part
            for path in [path for pattern in FILES for path in folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in part.iterdir():
                path.rename(folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def save_generation_config(
    policy: Policy, tokenizer: PreferenceTokenizer, sampling: Mapping[str, Any], folder: Path
) -> None:
    """Write the generation config: the tokens that end a response, and how the model is sampled.

    After rounds, that is with their temperature and filters and nothing else: they ignored the base model's own
    settings, such as a repetition penalty. Without rounds, these stay. A reward model has none.

    Args:
        tokenizer: Knows the tokens that end a response.
        sampling: The options of the rounds' sampling; empty if there were no rounds.
    """
    own = getattr(policy.model, "generation_config", None)
    if own is None or isinstance(policy, Scored):
        return
    generation = copy.deepcopy(own)
    if sampling.get("temperature", 0) > 0:
        filters = {name: sampling[name] for name in ("temperature", "top_p", "top_k")}  # transformers' top_k is 50
        generation = GenerationConfig(
            bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id, do_sample=True, **filters
        )
    if not generation.do_sample:  # greedy decoding ignores them, and transformers then refuses to save them
        for name in FILTERS:
            setattr(generation, name, None)
    generation._from_model_config = False  # from here on it has settings of its own
    generation.eos_token_id = tokenizer.end_ids()
    with writing(folder):
        generation.save_pretrained(folder)


def configuration_of(run: Path) -> dict[str, Any]:
    """The configuration of the run in a folder.

    Raises:
        UserError: it is damaged.
    """
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("model", "data")):
            raise ValueError("it has no model and data")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{relative(path)} is damaged ({first_line(error)}). Restore it, or delete it to do without."
        ) from error
    return config


def find_checkpoint(source: str | Path) -> Path:
    """The given checkpoint, or the newest one of a run.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such folder or checkpoint. Name a run's folder or one of its checkpoints.")
    if path.is_dir() and not (path / ".metadata").exists():
        found = newest_first([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")])
        if not found:
            raise UserError(
                f"{source}: there is no checkpoint in it, or in its checkpoints/. Name a checkpoint, or use the "
                "model that the run wrote to model/."
            )
        path = found[0]
    return path.resolve() if path.is_symlink() else path


def load_policy(path: Path) -> tuple[Policy, SavedObjective]:
    """The policy of a checkpoint with its weights, without reference adapters, and the objective that trained it.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the model that it names.
    """
    checkpoint, objective = _read(path)
    policy = (Scored if objective.scores else Policy).load(objective.policy, objective.lora)
    base = checkpoint.get(provenance.KEY, {}).get(provenance.BASE_MODEL)
    if objective.lora and base and base != policy.base_fingerprint():
        raise UserError(
            f"{path}: its adapter was trained on a base model with other weights than {objective.policy.path!r} has "
            "now. Restore the model that was trained."
        )
    state = checkpoint["state_dict"]
    weights = {name.removeprefix("policy."): w for name, w in state.items() if name.startswith("policy.")}
    left, more = policy.load_state_dict(weights, strict=False)
    trained = {f"model.{name}" for name, _ in policy.trainable_weights()}
    if lost := [name for name in left if name in trained] + [name for name in more if not is_adapter_weight(name)]:
        raise UserError(
            f"{path} does not fit the model {objective.policy.path!r} in {amount(len(lost), 'weights')}, such as "
            f"{lost[0]!r}. Restore the model that was trained."
        )
    return policy.eval(), objective


def _read(path: Path) -> tuple[dict[str, Any], SavedObjective]:
    """A checkpoint with the policy's weights as its `state_dict`, and the objective that wrote it."""
    check_hash(path)
    try:
        rest = path / "meta.pt" if path.is_dir() else path  # a folder of shards keeps all but the tensors there
        checkpoint = torch.load(rest, map_location="cpu", weights_only=True, mmap=True)
        objective = SavedObjective.read(checkpoint)
        state = _shards(path) if path.is_dir() else checkpoint["state_dict"]
        return checkpoint | {"state_dict": state}, objective
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything from pickle and zip
        raise UserError(
            f"{path}: not a valid checkpoint of lit_align ({type(error).__name__}). Is it truncated? Name another."
        ) from error


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
