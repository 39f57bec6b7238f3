"""Our decoding against transformers' `generate`, both with our choice of tokens, in turns on one thread of a CPU.

Each side samples the same responses, which end by length only, from the same weights, in
bfloat16, or in float32 on CPUs that multiply bfloat16 slowly.

    python benchmarks/decoding.py
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from turns import Turn, as_row, ratio, take_turns, weight_type, write

from lit_align.data.sampling import Sampling, uniform_numbers


class Case(NamedTuple):
    prompt: int
    response: int
    prompts: int
    count: int


CASES = {
    "short": Case(prompt=50, response=24, prompts=32, count=4),
    "tldr": Case(prompt=350, response=53, prompts=8, count=4),
    "hh": Case(prompt=150, response=128, prompts=8, count=4),
}


def sample(turn: Turn, *, model: str, case: Case, batches: int, ours: bool) -> None:
    """Sample a batch of responses at each turn; prompts are of 3/4 to 5/4 of the case's length."""
    from lit_align.data.generation import generate, generate_with_transformers
    from lit_align.policy import Policy, PolicyConfig

    policy = Policy.load(PolicyConfig(model, dtype=weight_type())).merged_copy()
    end_ids = [policy.config.vocab_size]  # no token is this one
    spread = [case.prompt * 5 // 4 - i * case.prompt // 2 // max(1, case.prompts - 1) for i in range(case.prompts)]
    prompts = [[(7 * i + 11 * j) % 40000 + 100 for j in range(length)] for i, length in enumerate(spread)]
    uniforms = uniform_numbers(case.prompts * case.count * case.response, "benchmark").view(-1, case.response)
    options = Sampling(max_new_tokens=case.response)
    for _ in range(batches):
        turn.begin()
        if ours:
            generate(policy, prompts, options, uniforms, end_ids)
        else:
            generate_with_transformers(policy, prompts, options, uniforms, end_ids)
        turn.end()


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/decoding.json"))
    options = parser.parse_args(args)
    rows = []
    for name in options.cases:
        case = CASES[name]
        side = partial(sample, model=options.model, case=case, batches=1 + options.repeats)
        ours, theirs = take_turns(
            {"ours": partial(side, ours=True), "generate": partial(side, ours=False)}, options.repeats
        )
        tokens = case.prompts * case.count * case.response
        print(
            f"{name}: {case.prompts} × {case.count} × {case.response} tokens after about {case.prompt}: "
            f"{tokens / ours.cpu:.0f} tokens per second, generate {tokens / theirs.cpu:.0f}: "
            f"{ratio(theirs, ours):.2f} × (peak {ours.peak:.1f} : {theirs.peak:.1f} GB)"
        )
        rows.append({"case": name, **case._asdict()} | as_row(ours=ours, theirs=theirs))
        write(options.out, rows, model=options.model)
    return rows


if __name__ == "__main__":
    main()
