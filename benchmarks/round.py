"""A whole on-policy round against one of TRL's OnlineDPOTrainer: sample, score, pair, one step.

Both sides have the same prompts, two responses of a fixed number of tokens each, a reward that costs nothing, full
weights in `turns.weight_type`, and a fixed reference. Neither records log π_s, which online DPO does not need. By
default TRL recomputes activations and samples without a key-value cache. Its best setting here turns off both that and
mixed precision. On CPUs that multiply bfloat16 slowly its default takes minutes: leave it out with --settings best.

    python benchmarks/round.py
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from step import RATE
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import Turn, as_row, ratio, take_turns, weight_type, words, write

from lit_align.data import FunctionScorer, OnPolicyPairs, Sampling
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig

REWARD = "def reward(prompts, responses): return [sum(map(ord, text)) % 997 / 997 for text in responses]\n"
SETTINGS = {"default": {}, "best": {"gradient_checkpointing": False, "bf16": False}}


class Rounds(OnPolicyPairs):
    """Waits for its turn before each round; responses end by length only."""

    turn: Turn

    def train_dataloader(self) -> Any:
        self.turn.begin()
        self.preference_tokenizer.end_ids = lambda: [self.tokenizer.all_special_ids[-1]]
        return super().train_dataloader()


class EndOfRound(L.Callback):
    def __init__(self, turn: Turn):
        self.turn = turn

    def on_train_batch_end(self, *args: Any) -> None:
        self.turn.end()


def ours(turn: Turn, *, model: str, folder: str, texts: list[str], tokens: int, rounds: int) -> None:
    Path(folder, "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    Path(folder, "reward.py").write_text(REWARD)
    module = DPO(
        PolicyConfig(model, dtype=weight_type()),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True),
        schedule="constant",
    )
    data = Rounds(
        f"{folder}/prompts.jsonl",
        FunctionScorer(f"{folder}/reward.py:reward"),
        responses_per_prompt=2,
        sampling=Sampling(max_new_tokens=tokens),
        batch_size=len(texts),
        record_sampler=False,
        store=f"{folder}/rounds",
    )
    data.turn = turn
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EndOfRound(turn)],
    )
    trainer.fit(module, data)


def trls(
    turn: Turn, *, model: str, folder: str, texts: list[str], tokens: int, rounds: int, settings: dict[str, Any]
) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn.end()

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(map(ord, text)) % 997 / 997 for text in completions]

    arguments = OnlineDPOConfig(
        f"{folder}/trl",
        per_device_train_batch_size=len(texts),
        max_steps=rounds,
        max_new_tokens=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        temperature=1.0,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=weight_type()),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    trainer.train()


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per round; two responses each")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="tokens per response")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="of TRL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/round.json"))
    options = parser.parse_args(args)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        texts = [words(tokenizer, options.prompt_tokens, seed) for seed in range(options.prompts)]
        common = {"model": options.model, "folder": folder, "texts": texts, "tokens": options.tokens}
        common["rounds"] = 1 + options.repeats
        sides = {"ours": partial(ours, **common)}
        sides |= {name: partial(trls, **common, settings=SETTINGS[name]) for name in options.settings}
        first, *others = take_turns(sides, options.repeats)

    print(f"{'':<15}{'a round':>9}{'peak':>9}{'ours is faster':>17}{'(wall)':>9}")
    print(f"{'ours':<15}{first.cpu:>7.2f} s{first.peak:>6.1f} GB")
    for name, other in zip(options.settings, others, strict=True):
        faster, wall = f"{ratio(other, first):.2f} ×", f"{ratio(other, first, 'wall_seconds'):.2f} ×"
        print(f"{f'TRL, {name}':<15}{other.cpu:>7.2f} s{other.peak:>6.1f} GB{faster:>17}{wall:>9}")
    rows = [as_row(**dict(zip(sides, (first, *others), strict=True)))]
    write(options.out, rows, prompts=options.prompts, tokens=options.tokens, model=options.model)
    return rows


if __name__ == "__main__":
    main()
