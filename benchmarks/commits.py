"""Log-probabilities with their gradients, at this commit and at another one, in turns on one thread.

Both sides compute `response_logps` of the same batch of random tokens, forward and backward, with all weights in
bfloat16, or in float32 on CPUs that multiply bfloat16 slowly.

    git worktree add ../before 80641ec
    python benchmarks/commits.py ../before
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from turns import Turn, as_row, ratio, take_turns, weight_type, write

from lit_align.dtypes import dtype_name


class Case(NamedTuple):
    """Tokens of a batch."""

    prompts: int
    prompt: int
    responses: int
    response: int
    beginning: int = 0  # with which all prompts begin

    @property
    def tokens(self) -> int:
        """Tokens when each prompt counts once."""
        return self.prompts * (self.prompt + self.responses * self.response)


CASES = {
    "K8": Case(prompts=4, prompt=64, responses=8, response=32),
    "K16": Case(prompts=4, prompt=64, responses=16, response=32),
    "256": Case(prompts=1, prompt=256, responses=2, response=256),
    "1024": Case(prompts=1, prompt=256, responses=2, response=1024),
    "examples": Case(prompts=8, prompt=45, responses=4, response=15, beginning=38),
    "system prompt": Case(prompts=4, prompt=350, responses=2, response=35, beginning=100),
}


def passes(turn: Turn, *, checkout: str, model: str, dtype: str, case: Case, count: int) -> None:
    """Compute the batch `count` times with a checkout's code."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lit_align"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    import torch

    from lit_align.logprobs import PreferenceBatch, response_logps
    from lit_align.policy import Policy, PolicyConfig

    policy = Policy.load(PolicyConfig(model, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    words = policy.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    prompts = torch.randint(words, (case.prompts, case.prompt), generator=generator)
    prompts[:, : case.beginning] = prompts[0, : case.beginning]
    responses = torch.randint(words, (case.prompts, case.responses, case.response), generator=generator)
    prompt_mask, response_mask = (torch.ones_like(ids, dtype=torch.bool) for ids in (prompts, responses))
    for _ in range(count):
        batch = PreferenceBatch(prompts, prompt_mask, responses, response_mask, torch.arange(case.prompts))
        turn.begin()
        response_logps(policy.model, batch).sum().backward()
        turn.end()
        policy.zero_grad()


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="folder of a checkout of the other commit")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/commits.json"))
    options = parser.parse_args(args)
    rows = []
    for name in options.cases:
        case = CASES[name]
        model = str(Path(options.model).resolve())
        side = partial(passes, model=model, dtype=dtype_name(weight_type()), case=case, count=1 + options.repeats)
        checkouts = {"before": options.before, "now": str(Path(__file__).parents[1])}
        sides = {each: partial(side, checkout=folder) for each, folder in checkouts.items()}
        before, now = take_turns(sides, options.repeats)
        each = (f"{side.cpu:.2f} s ({1e3 * side.cpu / case.tokens:.2f} ms a token)" for side in (before, now))
        print(f"{name:<14} before {next(each)}, now {next(each)}: {ratio(now, before):.2f} ×", flush=True)
        rows.append({"case": name, **case._asdict()} | as_row(before=before, now=now))
        write(options.out, rows, before=options.before, model=options.model)
    return rows


if __name__ == "__main__":
    main()
