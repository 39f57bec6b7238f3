"""Time and memory of a large round: from its prompts to the first batch, with a stand-in for the sampler.

A real `fit` on OnPolicyPairs, in a process of its own, up to the first batch. The sampler returns random words, the
scorer a hash. The model has random weights, one layer of width 8 and 200 words, so that what is measured is the data:
writing and reading samples and scores, groups, pairs, batches. A round of few prompts is what a start costs by itself.

Memory is what belongs to the process alone (RssAnon), at its peak.

    python benchmarks/rounds.py                                  # 20,000 prompts × 8 responses × 200 tokens
    python benchmarks/rounds.py --prompts 100 2000 --logps       # log π_s and log π_ref, too, of the small model
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from turns import write

from data import Meter, run

PROMPT_WORDS = 60
VOCABULARY = ["</s>", *(f"word{number}" for number in range(199))]


def fit(
    report: Callable[[dict[str, float]], None],
    *,
    folder: str,
    count: int,
    responses: int,
    tokens: int,
    logps: bool,
    store: str,
) -> None:
    """One round up to its first batch."""
    meter = Meter()
    import lightning as L
    import numpy as np
    from lightning.pytorch.loggers.logger import DummyLogger

    from lit_align.data import FunctionScorer, OnPolicyPairs, Sampler, Sampling
    from lit_align.data.sampling import Response
    from lit_align.objectives import DPO, SimPO
    from lit_align.policy import PolicyConfig

    class StandIn(Sampler):
        """Random tokens at once."""

        def load(self, policy: Any, dtype: Any, longest: int) -> None:
            pass

        def weights_match(self, weights: Any) -> bool:
            return bool(list(weights))

        def sample(self, policy: Any, request: Any) -> list[list[Response]]:
            draw = np.random.default_rng(abs(hash(request.keys[0])) % 2**32)
            shape = (len(request.prompts), request.count, tokens)
            sampled = draw.integers(1, len(VOCABULARY), shape).tolist()
            return [
                [Response(ids, " ".join(map(VOCABULARY.__getitem__, ids)), True) for ids in each] for each in sampled
            ]

        def release(self) -> None:
            pass

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seconds = trainer.logger.seen
            report(
                meter.read() | {"sampling": seconds["round/seconds_sample"], "scoring": seconds["round/seconds_score"]}
            )
            os._exit(0)

    class Seen(DummyLogger):
        """Keeps the round's metrics."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen |= metrics

    rewards = Path(folder, "rewards.py")
    rewards.write_text("def reward(prompts, responses): return [float(hash(text) % 1009) for text in responses]\n")
    L.seed_everything(1, verbose=False)
    objective = DPO if logps else SimPO
    module = objective(PolicyConfig(f"{folder}/model", dtype="float32"))
    pairs = OnPolicyPairs(
        str(Path(folder, f"prompts_{count}.jsonl")),
        FunctionScorer(f"{rewards}:reward"),
        responses_per_prompt=responses,
        sampler=StandIn(),
        sampling=Sampling(max_new_tokens=tokens),
        record_sampler=logps,
        batch_size=4,
        store=store,
        cache_dir=str(Path(folder, "cache")),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=Seen(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[Watch()],
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=pairs)


def write_model(folder: str) -> None:
    """A model of one small layer, with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token=VOCABULARY[0]))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=VOCABULARY[0]).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=2048,
        )
    ).save_pretrained(folder)


def write_prompts(folder: str, count: int) -> None:
    draw = random.Random(0)
    with Path(folder, f"prompts_{count}.jsonl").open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": " ".join(draw.choices(VOCABULARY[1:], k=PROMPT_WORDS))}) + "\n")


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 20_000])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--logps", action="store_true", help="record log π_s and log π_ref")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/rounds.json"))
    options = parser.parse_args(args)

    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    rows: list[dict[str, Any]] = []
    print(
        f"{'prompts':>9}  {'start':<8}{'wall':>9}{'CPU':>9}{'sampling':>10}{'scoring':>9}{'peak':>10}{'at the end':>12}"
    )
    for count in options.prompts:
        with tempfile.TemporaryDirectory() as folder:
            write_model(f"{folder}/model")
            write_prompts(folder, count)
            side = partial(
                fit,
                folder=folder,
                count=count,
                responses=options.responses,
                tokens=options.tokens,
                logps=options.logps,
                store=str(Path(folder, "rounds")),
            )
            for start in ("first", "second"):
                of = run(side)
                rows.append({"prompts": count, "start": start} | of)
                line = (
                    f"{of['seconds']:>7.1f} s{of['cpu_seconds']:>7.1f} s{of['sampling']:>8.1f} s{of['scoring']:>7.1f} s"
                )
                print(
                    f"{count:>9,}  {start:<8}{line}{of['peak_bytes'] / 1e6:>7.0f} MB{of['bytes'] / 1e6:>9.0f} MB",
                    flush=True,
                )
    write(options.out, rows, **{name: value for name, value in vars(options).items() if name != "out"})
    return rows


if __name__ == "__main__":
    main()
