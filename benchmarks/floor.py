"""Profile of a training step, and its floor: the time of the arithmetic that no step can do without.

The floor counts matrix products and attention: each prompt once, the output head for response tokens only, a backward
pass of twice the forward pass, and one more forward pass for a live reference. It divides them by the measured rate at
which one thread multiplies matrices of the model's shapes. The profile sums the time of the operations by purpose; an
operation within attention counts as attention.

    python benchmarks/floor.py
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flops import useful_flops
from step import LENGTHS, ours, write_batch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from turns import quiet, weight_type, write

from lit_align.allocation import keep_freed_memory

PARTS = {
    "attention": r"RowAttention|scaled_dot_product|\b_(Attention|Move)(Backward)?\b",
    "output head and loss": r"_HeadLogps|log_sigmoid|softmax|cross_entropy",
    "optimizer and clipping": r"_foreach_|_fused_adam|linalg_vector_norm|aten::(lerp_|addcmul_|addcdiv_|sqrt)$",
    "linear layers": r"aten::(mm|addmm)$|LoRAProduct",
    "gradients added to weights": r"AccumulateGrad",
    "norms, rotary positions, activations, sums": r"",
}
"""Purpose of an operation, by its name and those of the operations that it is a part of; the first match counts."""


class Stopwatch:
    """A `Turn` that times all steps except the first and the last, and profiles the last."""

    def __init__(self, steps: int):
        self.left = steps
        self.seconds: list[float] = []
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def begin(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.profile.start()
        self.began = time.process_time()

    def end(self) -> None:
        self.seconds.append(time.process_time() - self.began)
        if self.left == 0:
            self.profile.stop()

    @property
    def step(self) -> float:
        return median(self.seconds[1:-1])

    def parts(self) -> dict[str, float]:
        """Share of the profiled step's time in each part."""
        seconds: Counter[str] = Counter()
        for event in self.profile.events() or []:
            path, part_of = event.name, event.cpu_parent
            while part_of is not None:
                path, part_of = f"{part_of.name} {path}", part_of.cpu_parent
            part = next(part for part, names in PARTS.items() if re.search(names, path))
            seconds[part] += event.self_cpu_time_total
        return {part: seconds[part] / seconds.total() for part in PARTS}


def matmul_rate(layers: Iterable[torch.nn.Linear], tokens: int) -> float:
    """Floating-point operations per second of these layers' matrix products over `tokens` tokens."""
    weights = [layer.weight.detach() for layer in layers]
    inputs = {weight.shape[1]: torch.randn(tokens, weight.shape[1], dtype=weight.dtype) for weight in weights}
    rates = []
    for _ in range(4):
        began = time.process_time()
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
        rates.append(2 * tokens * sum(weight.numel() for weight in weights) / (time.process_time() - began))
    return median(rates[1:])


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["tldr", "hh"])
    parser.add_argument("--references", nargs="+", choices=["live", "recorded"], default=["live"])
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step")
    parser.add_argument("--repeats", type=int, default=5, help="steps that count")
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/floor.json"))
    options = parser.parse_args(args)

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=weight_type())
    rows = []
    for lengths in options.lengths:
        prompt, response = LENGTHS[lengths]
        tokens = options.batch * (prompt + 2 * response)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        rate = matmul_rate([layer for layer in layers if layer is not model.get_output_embeddings()], tokens)
        for reference in options.references:
            watch = Stopwatch(options.repeats + 2)
            with tempfile.TemporaryDirectory() as folder:
                data = write_batch(Path(folder, "batch.jsonl"), options.model, options.batch, prompt, response)
                recorded = ("reference_logps",) if reference == "recorded" else ()
                common = {"model": options.model, "data": data, "batch_size": options.batch, "recorded": recorded}
                with quiet():
                    ours(watch, steps=options.repeats + 2, **common)
            flops = useful_flops(model, options.batch, prompt, response, 2, live=reference == "live")
            row = {"lengths": lengths, "reference": reference, "tokens": tokens, "step": watch.step}
            rows.append(row | {"flops": flops, "rate": rate, "floor": flops / rate, "parts": watch.parts()})
            print(f"{lengths}, {reference} reference: {tokens} tokens, {watch.step:.2f} s a step")
            print(f"  floor {flops / rate:.2f} s = {flops / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s", end="")
            print(f": {flops / rate / watch.step:.0%} of the step")
            for part, share in watch.parts().items():
                print(f"  {share:>4.0%}  {part}")
    write(options.out, rows, batch=options.batch, model=options.model)
    return rows


if __name__ == "__main__":
    keep_freed_memory()
    main()
