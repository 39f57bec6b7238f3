"""Correctness, speed and memory on a GPU, of a random model without any download: under 8 minutes on an H100.

    python benchmarks/gpu.py                      # on a GPU
    python benchmarks/gpu.py --parts steps trl    # a part of it
    python benchmarks/gpu.py --tiny               # on any machine, in seconds: that it runs

It needs torch, transformers, lightning and peft, and TRL for its part. `docs/speed.md` has the recipe for a machine
without network. It prints a table and writes JSON:

    correctness   log-probabilities and gradients against eager attention, one row per response, in float32 and bfloat16
    steps         seconds, MFU and peak memory of DPO with a live reference: ours, ours compiled, one row per response
    trl           the same steps by TRL's DPOTrainer, plain and with Liger kernels, if they are installed
    forms         a step with the reference in CPU memory, and with weights sharded by FSDP2 on this one device
    refreshes     a hard and a soft refresh
    sampling      tokens per second
    profile       where the time of a step goes, by kernel
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from flops import useful_flops
from gpu_trl import trl_times
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_align.compilation import compile_blocks
from lit_align.data.generation import generate
from lit_align.data.sampling import Sampling
from lit_align.logprobs import PreferenceBatch, response_logps
from lit_align.packing import PACKED
from lit_align.policy import Policy
from lit_align.reference.copied import CopiedReference

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
# prompts in a step, and tokens of a prompt and of a response
LENGTHS = {
    "tldr": (16, 350, 35),
    "hh": (16, 150, 80),
    "ultrafeedback": (8, 350, 300),
    "2k": (4, 2048, 512),
    "8k": (1, 7168, 1024),
}
TINY_LENGTHS = {"tldr": (2, 35, 4)}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 operations per second, dense


class Bench:
    """The model, the device and the options."""

    def __init__(self, options: argparse.Namespace):
        self.tiny = options.tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = "tiny" if options.tiny else options.size
        self.lengths = TINY_LENGTHS if options.tiny else {name: LENGTHS[name] for name in options.lengths}
        self.repeats = options.repeats
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.peak = next((peak for part, peak in PEAKS.items() if part in self.name), None)

    def policy(self, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Policy:
        """A policy of random weights, the same at each call."""
        torch.manual_seed(0)
        size: Any = SIZES[self.size] | ({"num_hidden_layers": layers} if layers else {})
        config = LlamaConfig(**size, max_position_embeddings=16384)
        config._attn_implementation = "sdpa"
        with torch.device(self.device):
            model: Any = LlamaForCausalLM(config)
        model.to(dtype)
        return Policy(model, None).train()  # type: ignore[arg-type]  # it needs no tokenizer here

    def random_batch(
        self, B: int, prompt: int, response: int, responses: int, *, unequal: bool = False
    ) -> PreferenceBatch:
        """B prompts with K responses, of these lengths or at most these lengths, as a loader gives them."""
        generator = torch.Generator().manual_seed(1)
        shape = (B, responses)

        def lengths(most: int, *shape: int) -> Tensor:
            return torch.randint(1, most + 1, shape, generator=generator) if unequal else torch.full(shape, most)

        def ids(*shape: int) -> Tensor:
            return torch.randint(1, 300, shape, generator=generator)

        prompt_mask = torch.arange(prompt) < lengths(prompt, B)[:, None]
        response_mask = torch.arange(response) < lengths(response, *shape)[..., None]
        batch = PreferenceBatch(
            ids(B, prompt), prompt_mask, ids(*shape, response), response_mask, index=torch.arange(B)
        )
        return batch.pinned() if self.device.type == "cuda" else batch

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> tuple[float, float | None]:
        """Median seconds of a call after one that does not count, and the GPU's peak of memory in 10⁹ bytes."""
        times = []
        for _ in range(1 + self.repeats):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        return median(times[1:]), peak


def in_gigabytes(peak: float | None) -> str:
    return "" if peak is None else f"  {peak:6.2f} GB"


def correctness(bench: Bench) -> list[dict[str, Any]]:
    """Distance of log-probabilities and gradients from eager attention in float32, one row per response."""
    batch = bench.random_batch(*((2, 40, 9) if bench.tiny else (4, 600, 300)), 4, unequal=True).to(bench.device)
    weights = torch.linspace(-1, 1, batch.lengths.numel(), device=bench.device).view(batch.lengths.shape)

    def measured(dtype: torch.dtype, attention: str) -> tuple[Tensor, Tensor]:
        policy = bench.policy(dtype, layers=2)
        if policy.model.config._attn_implementation != attention:
            policy.model.set_attn_implementation(attention)
        logps = policy(batch)
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])
        return logps.detach(), gradient

    logps, gradient = measured(torch.float32, "eager")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("eager", PACKED):
            other, slope = measured(dtype, attention)
            off = {"logps": (other - logps).abs().max().item() / logps.abs().mean().item()}
            off["gradient"] = ((slope - gradient).norm() / gradient.norm()).item()
            rows.append({"part": "correctness", "dtype": str(dtype)[6:], "attention": attention, **off})
            print(f"{'correctness':<13}{str(dtype)[6:]:<10}{attention:<18}", end="")
            print(f"log-probabilities {off['logps']:.1e}  gradient {off['gradient']:.1e} of it", flush=True)
    float32_off = rows[1]["gradient"]
    assert float32_off < 1e-3, f"the gradient in float32 is off by {float32_off:.1e}"
    return rows


def one_step(policy: torch.nn.Module, reference: Callable[[PreferenceBatch], Tensor], batch: PreferenceBatch) -> Any:
    """A closure that makes a step of DPO on pairs of neighbouring responses."""
    device = next(policy.parameters()).device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=device.type == "cuda")

    def step() -> None:
        present = batch.to(device)
        with torch.no_grad():
            anchor = reference(present)
        margins = 0.1 * (policy(present) - anchor)
        loss = -torch.nn.functional.logsigmoid(margins[:, 0::2] - margins[:, 1::2]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(bench: Bench) -> list[dict[str, Any]]:
    """A step at each length and K: ours, ours compiled, and with one row per response."""
    rows = []
    policy = bench.policy()
    reference = policy.merged_copy()
    models = (policy.model, reference)

    def measure(form: str, name: str, K: int) -> None:
        B, prompt, response = bench.lengths[name]
        batch = bench.random_batch(B, prompt, response, K)
        row = {"part": "step", "lengths": name, "B": B, "K": K, "form": form}
        print(f"{'step':<13}{name:<15}B={B:<4}K={K}  {form:<10}", end="")
        try:
            seconds, peak = bench.seconds(one_step(policy, lambda b: response_logps(reference, b), batch))
        except torch.OutOfMemoryError:
            policy.zero_grad()
            rows.append(row | {"out of memory": True})
            print("out of memory", flush=True)
        else:
            flops = useful_flops(policy.model, B, prompt, response, K, live=True)
            mfu = flops / seconds / bench.peak if bench.peak else None
            rows.append(row | {"seconds": seconds, "peak": peak, "mfu": mfu})
            print(f"{seconds:8.4f} s{in_gigabytes(peak)}" + (f"  MFU {mfu:.1%}" if mfu else ""), flush=True)
        torch.cuda.empty_cache()

    cases = [(name, K) for name in bench.lengths for K in (2, 8)]
    for name, K in cases:
        for form, attention in (("rows", "sdpa"), ("ours", PACKED)):
            for model in models:
                model.set_attn_implementation(attention)
            measure(form, name, K)
    for model in models:
        compile_blocks(model)
    for name, K in cases:
        measure("compiled", name, K)
    return rows


def trl_steps(bench: Bench) -> list[dict[str, Any]]:
    """The same steps of pairs by TRL's trainer, with a live reference."""
    rows = []
    for form, name in product(("TRL", "TRL, Liger"), bench.lengths):  # Liger patches transformers for good
        B, prompt, response = bench.lengths[name]
        print(f"{'step':<13}{name:<15}B={B:<4}K=2  {form:<10}", end="")
        row = {"part": "step", "lengths": name, "B": B, "K": 2, "form": form}
        try:
            times, peak = trl_times(bench.policy, *bench.lengths[name], bench.repeats, liger=form != "TRL")
        except ImportError as error:
            print(f"  {error.name} is not installed", flush=True)
            continue
        except torch.OutOfMemoryError:
            rows.append(row | {"out of memory": True})
            print("out of memory", flush=True)
        else:
            seconds = median(times)
            flops = useful_flops(bench.policy().model, B, prompt, response, 2, live=True)
            mfu = flops / seconds / bench.peak if bench.peak else None
            rows.append(row | {"seconds": seconds, "peak": peak, "mfu": mfu})
            print(f"{seconds:8.4f} s{in_gigabytes(peak)}" + (f"  MFU {mfu:.1%}" if mfu else ""), flush=True)
        if bench.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def forms(bench: Bench) -> list[dict[str, Any]]:
    """A step with a live reference in CPU memory, and one with sharded weights."""
    batch = bench.random_batch(*(TINY_LENGTHS if bench.tiny else LENGTHS)["tldr"], 2)
    policy = bench.policy()
    offloaded = CopiedReference(policy, offload=True)
    offloaded._device = bench.device
    times = {"reference in CPU memory": bench.seconds(one_step(policy, offloaded.logps, batch))}

    policy = bench.policy()
    reference = policy.merged_copy()
    present = batch.to(bench.device)
    with torch.no_grad():
        whole = policy(present)
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(bench.device.type, (1,))
        for layer in policy.model.base_model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        with torch.no_grad():
            torch.testing.assert_close(policy(present), whole, rtol=1e-3, atol=1e-2)
        times["FSDP2"] = bench.seconds(one_step(policy, lambda b: response_logps(reference, b), batch))
    finally:
        dist.destroy_process_group()
    for name, (seconds, peak) in times.items():
        print(f"{'form':<13}{name:<24}{seconds:8.4f} s{in_gigabytes(peak)}", flush=True)
    return [{"part": "form", "form": name, "seconds": s, "peak": peak} for name, (s, peak) in times.items()]


def refreshes(bench: Bench) -> list[dict[str, Any]]:
    """Hard and soft refreshes of a copied reference, the soft one with a float32 accumulator."""
    policy, rows = bench.policy(), []
    for name, alpha in (("hard", 1.0), ("soft", 0.6)):
        reference = CopiedReference(policy, accumulate=alpha < 1)
        seconds, peak = bench.seconds(lambda reference=reference, alpha=alpha: reference.mix(policy, alpha))
        rows.append({"part": "refresh", "form": name, "seconds": seconds, "peak": peak})
        print(f"{'refresh':<13}{name:<24}{seconds:8.4f} s", flush=True)
    return rows


def profile(bench: Bench) -> list[dict[str, Any]]:
    """Milliseconds of the kernels that take the most time, in one step."""
    name, K = "2k" if "2k" in bench.lengths else next(iter(bench.lengths)), 8
    policy = bench.policy()
    reference = policy.merged_copy()
    batch = bench.random_batch(*bench.lengths[name], K)
    step = one_step(policy, lambda b: response_logps(reference, b), batch)
    step()
    activities = [getattr(ProfilerActivity, "CUDA" if bench.device.type == "cuda" else "CPU")]
    with torch_profile(activities=activities) as found:
        step()
    of = (lambda e: e.self_device_time_total) if bench.device.type == "cuda" else (lambda e: e.self_cpu_time_total)
    kernels = sorted(found.key_averages(), key=of, reverse=True)[:25]
    rows = [{"part": "profile", "kernel": k.key, "ms": of(k) / 1000, "calls": k.count} for k in kernels]
    for row in rows:
        print(f"{'profile':<13}{row['ms']:8.2f} ms{row['calls']:6}  {row['kernel'][:80]}", flush=True)
    return rows


def sampling(bench: Bench) -> list[dict[str, Any]]:
    """Tokens per second of `generate`, with 4 responses to each prompt."""
    prompts, tokens = (2, 5) if bench.tiny else (32, 64)
    model: PreTrainedModel = bench.policy().merged_copy()
    ids = torch.randint(1, 300, (prompts, 20 if bench.tiny else 350), generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(prompts * 4, tokens, generator=torch.Generator().manual_seed(3))
    work = lambda: generate(model, ids.tolist(), Sampling(max_new_tokens=tokens), uniforms, [0])  # noqa: E731
    seconds, peak = bench.seconds(work)
    rate = prompts * 4 * tokens / seconds
    print(f"{'sampling':<13}{rate:,.0f} tokens per second", flush=True)
    return [{"part": "sampling", "tokens per second": rate, "seconds": seconds, "peak": peak}]


PARTS = {
    "correctness": correctness,
    "steps": steps,
    "trl": trl_steps,
    "forms": forms,
    "refreshes": refreshes,
    "sampling": sampling,
    "profile": profile,
}


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens, on any device")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=["1b", "3b"], default="1b", help="a Llama of so many parameters")
    parser.add_argument(
        "--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="for steps, trl and profile"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu.json"))
    options = parser.parse_args(args)
    bench = Bench(options)
    if bench.device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: use --tiny to try the program")
    print(f"{bench.name}, {bench.size}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for name in options.parts:
        rows += PARTS[name](bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "device": bench.name,
            "model": bench.size,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        about["seconds"] = time.perf_counter() - began
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1))  # what is measured so far
        print(f"{'':<13}{time.perf_counter() - began:.0f} s so far", flush=True)
    print(f"written to {options.out}")
    return rows


if __name__ == "__main__":
    main()
