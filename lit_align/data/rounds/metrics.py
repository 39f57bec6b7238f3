"""The metrics of a round, logged at the step at which it begins.

| metric | formula |
|---|---|
| round | number of the round, from 0 |
| round/reward | mean reward over all responses |
| round/reward_best, round/reward_worst | mean over prompts of the highest and the lowest reward |
| round/reward_NAME | mean of one part of the rewards: a judge's criterion, an ensemble's member |
| round/reward_disagreement | mean of an ensemble's weighted standard deviation around its reward |
| round/length | mean number of response tokens |
| round/finished | share of responses that ended by themselves |
| round/pairs, round/dropped | examples trained on; prompts left out by the pairing rule |
| round/dropped_REASON | the same by reason, and responses or pairs that were taken out |
| round/dropped_in_no_full_batch | pairs left over after the last batch that every process has one of |
| round/staleness | with data.rounds_ahead: rounds of training between the responses' policy and the round's beginning |
| round/seconds_sample, round/seconds_score | wall-clock time that training waits for the two phases |
| round/prompts_per_minute_sample, round/prompts_per_minute_score | new prompts / that time |
"""

from collections import Counter
from typing import Any

import torch

from lit_align.data.pairing import Pairs
from lit_align.data.rounds.numbers import RoundNumbers
from lit_align.data.rounds.recorder import Loaded
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.table import ExampleTable


def round_metrics(
    index: int,
    sampled: Loaded[SampleRow],
    scored: Loaded[ScoreRow],
    groups: ExampleTable,
    numbers: RoundNumbers,
    pairs: Pairs[ExampleTable],
    in_no_full_batch: int,
) -> dict[str, float]:
    """The metrics of a round.

    Args:
        groups: Every prompt with all its responses.
        numbers: The numbers of all responses.
        in_no_full_batch: Pairs left over because they do not fill a batch on every process.
    """
    by_prompt = groups.numbers("rewards")
    assert by_prompt is not None
    rewards = torch.from_numpy(by_prompt).float().view(len(groups), -1)
    responses = int((groups.lengths.total - groups.lengths.prompt).sum())
    values = {
        "round": float(index),
        "round/reward": rewards.mean().item(),
        "round/reward_best": rewards.amax(1).mean().item(),
        "round/reward_worst": rewards.amin(1).mean().item(),
        "round/length": responses / rewards.numel(),
        "round/finished": torch.from_numpy(numbers.finished).float().mean().item(),
        "round/pairs": float(len(pairs.examples) - in_no_full_batch),
        "round/dropped": float(sum(pairs.counts.values())),
    }
    for name, value in numbers.part_means.items():
        values[f"round/reward_{name}"] = value
    for reason, count in (pairs.counts + pairs.partial_drops + Counter({"in no full batch": in_no_full_batch})).items():
        values[f"round/dropped_{reason.replace(' ', '_')}"] = float(count)
    return values | _pace("sample", sampled) | _pace("score", scored)


def _pace(name: str, loaded: Loaded[Any]) -> dict[str, float]:
    pace = {f"round/seconds_{name}": loaded.seconds}
    if loaded.computed:
        pace[f"round/prompts_per_minute_{name}"] = 60 * loaded.computed / loaded.seconds
    return pace
