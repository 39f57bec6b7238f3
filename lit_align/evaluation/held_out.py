"""Held-out prompts, answered and scored: by the policy, by the start, and by the data set itself."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from lit_align.console import phase, print_field
from lit_align.data.formats.rows import Row, Rows, Text
from lit_align.data.sampling import Response, in_order
from lit_align.data.tokenization import Encoder, listing
from lit_align.errors import UserError
from lit_align.metrics.win_rate import win_rates
from lit_align.objectives import PreferenceObjective

TAKEN = re.compile(
    r"data(_.*)?|forgetting|prompts|responses_per_prompt|win_rate.*|distinct_[12]|self_bleu|(.*_)?(start|end|low|high)"
)
"""What a judge cannot be called, since the summary has it already, or columns and reports read it as something else."""


@dataclass(frozen=True)
class Answers:
    """Responses to P prompts, n to each, with their rewards by scorer, [P, n], and log-probabilities."""

    responses: list[list[Response]]
    rewards: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what rewards are made of, such as grades
    logps: Tensor | None = None  # [P, n] under the policy
    start_logps: Tensor | None = None  # [P, n] under the start

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [P, n]."""
        return torch.tensor([[len(response.ids) for response in drawn] for drawn in self.responses])

    @property
    def texts(self) -> list[str]:
        return [response.text for drawn in self.responses for response in drawn]


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, and what the start and the data set itself answer to them."""

    name: str
    texts: list[Text]
    ids: list[list[int]]
    sources: list[str]
    batches: list[list[int]]
    start: Answers
    own: Answers | None


@dataclass(frozen=True)
class Verdict:
    """The policy on held-out prompts, against the start (and the data set's own responses)."""

    prompts: Prompts
    answers: Answers
    by_scorer: dict[str, dict[str, float]]
    against_data: dict[str, dict[str, float]]  # by scorer; empty without own responses
    kl: dict[str, float]  # nats per response
    diversity: dict[str, float]

    @property
    def kl_from_start(self) -> float:
        return self.kl["kl_from_start"]

    def rows(self) -> list[dict[str, Any]]:
        """One row per prompt, all that was asked and found."""
        assert self.answers.logps is not None and self.answers.start_logps is not None  # noqa: PT018
        start, ours, own = self.prompts.start, self.answers, self.prompts.own
        rows = []
        for place, source in enumerate(self.prompts.sources):
            text = self.prompts.texts[place]
            row: dict[str, Any] = {
                "source": source,
                "prompt": text if isinstance(text, str) else json.dumps(text, ensure_ascii=False),
                "responses": [response.text for response in ours.responses[place]],
                "responses_start": [response.text for response in start.responses[place]],
                "lengths": [len(response.ids) for response in ours.responses[place]],
                "lengths_start": [len(response.ids) for response in start.responses[place]],
                "logps": ours.logps[place].tolist(),  # type: ignore[index]
                "logps_start": ours.start_logps[place].tolist(),  # type: ignore[index]
            }
            for name in ours.rewards:
                suffix = f"_{name}" if name else ""
                row[f"rewards{suffix}"] = ours.rewards[name][place].tolist()
                row[f"rewards_start{suffix}"] = start.rewards[name][place].tolist()
                rates = win_rates(ours.rewards[name][place : place + 1], start.rewards[name][place : place + 1])
                row[f"win_rate{suffix}"] = rates.item()
                if own:
                    row["response_data"] = own.responses[place][0].text
                    row[f"reward_data{suffix}"] = own.rewards[name][place, 0].item()
            rows.append(row)
        return rows


def encoder_of(module: PreferenceObjective) -> Encoder:
    """The data module's, if it is one of ours."""
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(encoder := getattr(data, "encoder", None), Encoder):
        return encoder
    return Encoder(module.tokenizer, max_prompt_length=1 << 20, max_response_length=1 << 20)


def read_prompts(rows: Rows, encoder: Encoder, path: str, name: str) -> list[tuple[Row, list[int]]]:
    """The rows with the tokens of their prompts; of what is left out, or cut, a line says how much.

    Raises:
        UserError: no prompt is left.
    """
    kept, counts = encoder.prompts(rows)
    counts = rows.skipped + counts
    if not kept:
        raise UserError(f"{path}: no prompt is left: {listing(counts)}.")
    if counts:
        print_field(name, f"{len(kept)} prompts from {path}; {listing(counts)}")
    return kept


def share(
    trainer: Trainer, batches: Sequence[Sequence[int]], name: str, make: Callable[[Sequence[int]], list[Any]]
) -> dict[int, list[Any]]:
    """`make` of the places of every batch that is this process's, by the batch's number."""
    made = {}
    with phase(name, sum(map(len, batches)), "prompts") as bar:
        for number, places in enumerate(batches):
            if number % trainer.world_size == trainer.global_rank:
                made[number] = make(places)
            bar.advance(len(places))
    return made


def gather(trainer: Trainer, mine: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """The batches of all processes, on every one."""
    if trainer.world_size == 1:
        return mine
    parts: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(parts, mine)
    return {number: batch for part in parts for number, batch in part.items()}


def _answers(batches: Sequence[Sequence[int]], made: dict[int, list[dict[str, Any]]]) -> Answers:
    rows = in_order(batches, made)

    def column(name: str) -> Tensor | None:
        return torch.tensor([row[name] for row in rows]) if name in rows[0] else None

    rewards = {name: torch.tensor([row["rewards"][name, ""] for row in rows]) for name, _ in rows[0]["rewards"]}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in rewards}
    for name, key in rows[0].get("parts", {}):
        parts[name][key] = torch.tensor([row["parts"][name, key] for row in rows])
    return Answers([row["responses"] for row in rows], rewards, parts, column("logps"), column("start_logps"))


def _one_line(response: Response) -> str:
    return " ".join(response.text.split()) + ("" if response.finished else " …")
