"""Builders of tiny real models and tokenizers for the tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lit_align.data import FunctionScorer, OnPolicyPairs, Sampling
from lit_align.data.rounds.store import RoundStore
from lit_align.files import write_whole

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(**changes: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**sizes, **changes})


REWARDS = "def reward(prompts, responses): return [float(sum(map(ord, r)) % 17) for r in responses]\n"


def write_text(path: Path, text: str) -> str:
    """Write a whole file, since another process of the test may be reading it; gives its path."""
    write_whole(path, lambda beside: beside.write_text(text))
    return str(path)


def write_prompts(folder: Path, count: int = 24) -> str:
    """Prompts of different lengths, and a reward function beside them; gives the prompts' path."""
    rows = [{"prompt": f"Prompt number {i}" + " and more" * (i % 3)} for i in range(count)]
    write_text(folder / "rewards.py", REWARDS)
    return write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(folder: Path, count: int = 8) -> str:
    """Preference pairs of plain text; gives their path."""
    rows = [{"prompt": f"p{i}:", "chosen": f" yes {i}" * (1 + i % 3), "rejected": f" no {i}"} for i in range(count)]
    return write_text(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def give_weights(path: str, weights: Sequence[float] = tuple(0.3 * (1 + 5 * i % 8) for i in range(20))) -> None:
    """Give the rows of a file weights, unequal ones by default."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    weighted = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=False)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in weighted))


def on_policy(folder: Path, **options: Any) -> OnPolicyPairs:
    """Rounds over `write_prompts`' prompts, 8 each."""
    defaults = {
        "sampling": Sampling(max_new_tokens=8),
        "prompts_per_round": 8,
        "batch_size": 3,
        "sampling_batch_size": 16,
        "store": str(folder / "rounds"),
        "seed": 1,
    }
    prompts = write_prompts(folder)
    return OnPolicyPairs(prompts, FunctionScorer(f"{folder / 'rewards.py'}:reward"), **(defaults | options))


def round_store(data: OnPolicyPairs) -> RoundStore:
    """The current round on disk."""
    return RoundStore(data.folder, data.current_round.index, data.current_round.key)


def adamw(lr: float = 1e-3) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def sgd(lr: float = 0.1) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def fit(module: Any, data: Any, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> L.Trainer:
    """A real fit on this machine, as quiet as it can be. The seed is set before, for LoRA's first weights."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(**(defaults | options), callbacks=list(callbacks))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Watch(Callback):
    """Keeps the logged values of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


class Steps(Callback):
    """Keeps what is logged of each optimizer step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def weights(module: Any) -> dict[str, torch.Tensor]:
    """A copy of a module's trained weights."""
    assert module.policy is not None
    return {name: weight.detach().clone() for name, weight in module.policy.trainable_weights()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
