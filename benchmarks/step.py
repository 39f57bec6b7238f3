"""Time and peak memory of a training step against TRL's DPOTrainer, in the same run, on the same pairs.

Both sides run their own training loop on a model in bfloat16, or in float32 on CPUs that multiply bfloat16 slowly, with
fused AdamW, gradient clipping, no dropout and no activation checkpointing. A step is forward, backward and optimizer;
fetching the batch does not count. `live` computes the reference's log-probabilities in each step; `recorded` computes
them before (TRL: precompute_ref_log_probs). TRL supports pairs only: for K > 2 responses the rival is our own step with
one row per response, which repeats the prompt.

    python benchmarks/step.py                                   # the table of docs/speed.md, about an hour
    python benchmarks/step.py --lengths tldr --weights full     # a part of it
"""

import argparse
import json
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import AutoTokenizer
from turns import Side, Turn, as_row, ratio, take_turns, weight_type, words, write

from lit_align.data import Listwise, OfflinePairs
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reference.copied import CopiedReference

LENGTHS = {"tldr": (350, 35), "hh": (150, 80), "ultrafeedback": (350, 300)}  # tokens of prompt and response
RATE = 1e-6


class Turns(L.Callback):
    """Waits for its turn before each of our steps, and fills in the recorded log-probabilities.

    Args:
        recorded: Names of the batch's fields that receive the reference's log-probabilities.
    """

    def __init__(self, turn: Turn, recorded: tuple[str, ...] = ()):
        self.turn = turn
        self.recorded = recorded
        self.logps: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.recorded:
            order = batch.index.argsort()
            if self.logps is None:
                self.logps = torch.cat([pl_module.reference.logps(batch.select(slice(i, i + 1))) for i in order])
            for name in self.recorded:
                setattr(batch, name, self.logps[order.argsort()])
        self.turn.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.turn.end()


def ours(
    turn: Turn,
    *,
    model: str,
    data: str,
    batch_size: int,
    steps: int,
    lora: bool = False,
    recorded: tuple[str, ...] = (),
    shared_prefix: bool = True,
    callbacks: tuple[L.Callback, ...] = (),
    dtype: Any = None,
) -> None:
    """Run our loop; `data` holds the one batch that every step takes."""
    groups = "rewards" in Path(data).read_text().partition("\n")[0]
    module = DPO(
        PolicyConfig(model, dtype=dtype or weight_type()),
        lora=LoRAConfig(r=16, alpha=32) if lora else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True),
        schedule="constant",
        reward_temperature=1.0 if groups else None,
    )
    module.configure_model()
    for network in (module.policy, module.reference):
        if not shared_prefix and isinstance(network, Policy | CopiedReference):
            network.model.set_attn_implementation("sdpa")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns(turn, recorded), *callbacks],
    )
    trainer.fit(module, OfflinePairs(data, batch_size=batch_size, pairing=Listwise() if groups else None))


def trls(turn: Turn, *, model: str, data: str, batch_size: int, steps: int, lora: bool, recorded: bool) -> None:
    """Run TRL's loop over the same pairs."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn.end()

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            max_length=None,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            precompute_ref_log_probs=recorded,
            gradient_checkpointing=False,
            bf16=False,  # the weights are in that type already
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=weight_type()),
            args=settings,
            train_dataset=Dataset.from_list([json.loads(line) for line in Path(data).read_text().splitlines()]),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None,
            callbacks=[Steps()],
        )
        trainer.train()


def write_batch(
    path: Path, model: str, batch_size: int, prompt: int, response: int, responses: int = 2, beginning: int = 0
) -> str:
    """Write a batch of pairs, or of groups with rewards, with the given numbers of tokens; return its path."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = words(tokenizer, beginning, seed=-1)
    rows = []
    for b in range(batch_size):
        texts = [words(tokenizer, response - 1, seed=b * 1000 + k) for k in range(1, responses + 1)]  # 1 token ends it
        row = {"prompt": common + words(tokenizer, prompt - beginning, seed=b * 1000)}
        if responses == 2:
            row |= dict(zip(("chosen", "rejected"), texts, strict=True))
        else:
            row |= {"responses": texts, "rewards": list(range(responses))}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return str(path)


def measure(lengths: str, weights: str, reference: str, responses: int, options: Any) -> tuple[Side, Side]:
    """Measure our side and the rival's."""
    with tempfile.TemporaryDirectory() as folder:
        file, sizes = Path(folder, "batch.jsonl"), (*LENGTHS[lengths], responses, options.beginning)
        data = write_batch(file, options.model, options.batch, *sizes)
        steps = 1 + options.repeats
        common = {"model": options.model, "data": data, "batch_size": options.batch, "steps": steps}
        common["lora"] = weights == "lora"
        recorded = ("reference_logps",) if reference == "recorded" else ()
        one = partial(ours, **common, recorded=recorded)
        two = partial(trls, **common, recorded=bool(recorded))
        if responses > 2:
            two = partial(one, shared_prefix=False)
        ours_, theirs = take_turns({"ours": one, "the rival": two}, options.repeats)
        return ours_, theirs


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--weights", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--references", nargs="+", choices=["live", "recorded"], default=["live", "recorded"])
    parser.add_argument("--responses", nargs="+", type=int, default=[2, 8], metavar="K")
    parser.add_argument("--batch", type=int, default=4, help="prompts in a step")
    parser.add_argument("--beginning", type=int, default=0, help="tokens with which all prompts of the batch begin")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.json"))
    options = parser.parse_args(args)

    columns = "{:<14}{:>3}  {:<6}{:<10}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}  {}"
    print(
        columns.format(
            "lengths",
            "K",
            "weights"[:5],
            "reference",
            "ours",
            "rival",
            "faster",
            "(wall)",
            "ours",
            "rival",
            "share",
            "",
        )
    )
    rows = []
    for lengths, weights, reference, responses in product(
        options.lengths, options.weights, options.references, options.responses
    ):
        one, two = measure(lengths, weights, reference, responses, options)
        case = {"lengths": lengths, "responses": responses, "weights": weights, "reference": reference}
        case["rival"] = "TRL" if responses == 2 else "one row per response"
        rows.append(case | as_row(ours=one, theirs=two))
        numbers = [f"{one.cpu:.2f} s", f"{two.cpu:.2f} s", f"{ratio(two, one):.2f} ×"]
        numbers += [f"{ratio(two, one, 'wall_seconds'):.2f} ×", f"{one.peak:.1f} GB", f"{two.peak:.1f} GB"]
        numbers += [f"{one.peak / two.peak:.2f}", case["rival"]]
        print(columns.format(lengths, responses, weights, reference, *numbers), flush=True)
        write(options.out, rows, batch=options.batch, beginning=options.beginning, model=options.model)
    return rows


if __name__ == "__main__":
    main()
