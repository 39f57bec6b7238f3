"""Speed of a sampler: new weights and their check, then 32 prompts × 4 responses × 48 tokens from SmolLM2.

All is done once to warm up. By default the weights are bfloat16, or float32 on CPUs that multiply bfloat16 slowly.

Run each sampler in its own environment, since vLLM brings other versions:

    .venv/bin/python benchmarks/samplers.py GenerateSampler
    .venv-vllm/bin/python benchmarks/samplers.py VLLMSampler
    .venv-vllm/bin/python benchmarks/samplers.py VLLMSampler --dtype bfloat16 --repeats 0 --refreshes 5   # weights only
"""

import argparse
import time

import psutil
import torch
from turns import weight_type

from lit_align import data
from lit_align.data import SampleRequest, Sampling
from lit_align.policy import Policy, PolicyConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sampler", choices=["GenerateSampler", "ContinuousBatchingSampler", "VLLMSampler"])
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="type of the weights")
    parser.add_argument("--refreshes", type=int, default=1, help="times that new weights are taken")
    parser.add_argument("--repeats", type=int, default=3, help="batches that are sampled")
    parser.add_argument("--memory", type=float, default=0.1, help="share of the machine's memory for VLLMSampler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    dtype = getattr(torch, options.dtype) if options.dtype else weight_type()
    policy = Policy.load(PolicyConfig(options.model, dtype=options.dtype or "auto"))
    prompts = [policy.tokenizer.encode(f"Write one sentence about the number {i}:") for i in range(32)]
    end_ids = [policy.tokenizer.eos_token_id]
    request = SampleRequest(prompts, range(32), 4, Sampling(max_new_tokens=48), end_ids)  # type: ignore[arg-type]
    longest = max(map(len, prompts)) + 48
    sampler = data.VLLMSampler(options.memory) if options.sampler == "VLLMSampler" else getattr(data, options.sampler)()
    with sampler.ready(policy, dtype, longest):
        if options.repeats:
            sampler.sample(policy, request)
    for _ in range(options.refreshes):
        start, used = time.perf_counter(), cpu_seconds()
        with sampler.ready(policy, dtype, longest):
            seconds, used = time.perf_counter() - start, cpu_seconds() - used
            print(f"new weights and their check: {seconds:.2f} s, {used:.2f} s of CPU")
    with sampler.ready(policy, dtype, longest):
        for _ in range(options.repeats):
            start, used = time.perf_counter(), cpu_seconds()
            responses = [response for group in sampler.sample(policy, request) for response in group]
            tokens = sum(len(response.ids) for response in responses)
            seconds, used = time.perf_counter() - start, cpu_seconds() - used
            print(f"{tokens} tokens: {tokens / seconds:.0f} per second, {tokens / used:.0f} per second of CPU")


def cpu_seconds() -> float:
    """CPU time of this process and of its children, such as vLLM's."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()
