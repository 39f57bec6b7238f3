"""Held-out prompts: does the policy beat the model it started from, by the training scorer and by other judges?

The policy and the start answer the same prompts with the same random streams, so that a policy that has not moved ties
with itself. `Evaluator` answers, scores and compares; the `WinRate` callback decides when. During training these values
are logged:

| metric | formula |
|---|---|
| val/reward | mean reward of the policy's responses |
| val/win_rate, val/win_rate_low, val/win_rate_high | win rate against the start, and its 95 % interval |
| val/win_rate_length_controlled | win rate at equal length (`metrics/win_rate.py`) |
| val/kl_from_start | E_π[log π(y|x) − log π_start(y|x)], nats per response, over the policy's fresh samples |
| val/length | mean number of response tokens |
| val/distinct_2, val/self_bleu | diversity of all the policy's responses (`metrics/diversity.py`) |
| val/seconds | wall-clock time of the evaluation |
| val/reward_NAME, val/win_rate_NAME | reward and win rate by each judge |

At the end of training the results are written to `summary.json` (`summary.py`), and by prompt to `held_out/`
(`rows.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.data.batches import Example, record_logps
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Rows, answer_text
from lit_align.data.sampling import Response, Sampling, check_positions, sampling_batches
from lit_align.data.scorers.base import Scorer
from lit_align.errors import UserError
from lit_align.evaluation.answering import (
    Answering,
    PromptScores,
    TokenizedPrompts,
    compute_share,
    gather_in_order,
    score_share,
    tokenize_prompts,
    tokenizer_of,
)
from lit_align.evaluation.forgetting import measure_forgetting
from lit_align.evaluation.rows import HeldOutRow, ScoredRow
from lit_align.evaluation.summary import (
    TRAINING,
    DataComparison,
    Diversity,
    Forgetting,
    PartSummary,
    ScorerSummary,
    Summary,
)
from lit_align.metrics import distinct_n, self_bleu
from lit_align.metrics.win_rate import Estimate, compare_rewards, win_rates
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy
from lit_align.sharding import gathered

METRICS = (
    "reward",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "win_rate_length_controlled",
    "kl_from_start",
    "length",
    "distinct_2",
    "self_bleu",
    "seconds",
)
"""What is logged as val/NAME."""


class Scored(NamedTuple):
    """The rewards of all responses by one scorer, and the parts that they are made of, [P, n] each."""

    rewards: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def stack(cls, scores: Sequence[PromptScores]) -> "Scored":
        parts = {name: torch.tensor([each.parts[name] for each in scores]) for name in scores[0].parts}
        return cls(torch.tensor([each.rewards for each in scores]), parts)


@dataclass(frozen=True)
class ScoredResponses:
    """Responses to P prompts, n each, with their rewards by scorer."""

    responses: list[list[Response]]
    scores: dict[str, Scored]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [P, n]."""
        return torch.tensor([[len(response.ids) for response in group] for group in self.responses])

    @property
    def texts(self) -> list[str]:
        return [response.text for group in self.responses for response in group]

    @property
    def diversity(self) -> Diversity:
        texts = self.texts
        return Diversity(distinct_n(texts, 1), distinct_n(texts, 2), self_bleu(texts))


@dataclass(frozen=True)
class HeldOutPrompts:
    """Held-out prompts with the responses of the start, and of the data set itself where these are compared."""

    prompts: TokenizedPrompts
    batches: list[list[int]]
    start: ScoredResponses
    own: ScoredResponses | None


@dataclass(frozen=True)
class Evaluation:
    """The policy on held-out prompts, against the start and against the data set's own responses."""

    held_out: HeldOutPrompts
    policy: ScoredResponses
    logps: Tensor  # [P, n] of the policy's responses, under the policy
    start_logps: Tensor  # and under the start
    summary: Summary

    def metrics(self) -> dict[str, float]:
        """Values to log during training, by name."""
        summary, ours = self.summary, self.summary.training
        values = {"reward": ours.reward_end.value} | ours.win_rate.named("win_rate")
        values["win_rate_length_controlled"] = ours.win_rate_length_controlled.value
        for name, judged in summary.scorers.items():
            if name != TRAINING:
                values |= {f"reward_{name}": judged.reward_end.value, f"win_rate_{name}": judged.win_rate.value}
        values |= {"kl_from_start": summary.kl_from_start.value, "length": summary.length_end}
        diversity = summary.diversity_end
        return values | {"distinct_2": diversity.distinct_2, "self_bleu": diversity.self_bleu}

    def rows(self) -> list[HeldOutRow]:
        """One row per prompt."""
        return [self._row(place, row) for place, row in enumerate(self.held_out.prompts.rows)]

    def _row(self, place: int, row: Row) -> HeldOutRow:
        ours, start = self.policy.responses[place], self.held_out.start.responses[place]
        own = self.held_out.own
        return HeldOutRow(
            source=row.source,
            prompt=row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False),
            prompt_ids=self.held_out.prompts.ids[place],
            responses=[response.text for response in ours],
            responses_start=[response.text for response in start],
            response_ids=[response.ids for response in ours],
            response_ids_start=[response.ids for response in start],
            finished=[response.finished for response in ours],
            finished_start=[response.finished for response in start],
            logps=self.logps[place].tolist(),
            logps_start=self.start_logps[place].tolist(),
            scorers=[self._scored_row(place, name, each.identity) for name, each in self.summary.scorers.items()],
            response_data=own.responses[place][0].text if own else None,
        )

    def _scored_row(self, place: int, name: str, identity: str) -> ScoredRow:
        rewards = self.policy.scores[name].rewards[place]
        start = self.held_out.start.scores[name].rewards[place]
        own = self.held_out.own
        return ScoredRow(
            name=name,
            identity=identity,
            rewards=rewards.tolist(),
            rewards_start=start.tolist(),
            win_rate=win_rates(rewards[None], start[None]).item(),
            reward_data=own.scores[name].rewards[place, 0].item() if own else None,
        )


class Evaluator:
    """Answers held-out prompts with the policy and the start, scores the responses, and compares them.

    All processes call its methods together. The start answers each file of prompts once.

    Args:
        scorers: By name; the one that training uses is "training".
        responses_per_prompt: n, sampled from the policy and from the start.
        batch_size: Responses sampled at once.
        own_responses: Compare with the data set's own responses, too.
        seed: Of the random streams.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        *,
        responses_per_prompt: int,
        sampling: Sampling,
        batch_size: int,
        own_responses: bool,
        seed: int,
    ):
        self.scorers = dict(scorers)
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.batch_size = batch_size
        self.own_responses = own_responses
        self.answering = Answering(("held out", seed), responses_per_prompt, sampling)
        self._tokenized: dict[tuple[str, str], TokenizedPrompts] = {}
        self._held_out: dict[str, HeldOutPrompts] = {}

    def read_prompts(self, path: str) -> Rows:
        """The prompts of a file; with its own responses where they are compared, each prompt once.

        Raises:
            UserError: the file cannot be read.
        """
        if not self.own_responses:
            return read_rows(path, kind="prompts")
        rows = read_rows(path, kind="texts")
        first = {json.dumps(row.prompt): row for row in reversed(rows.rows)}
        return replace(rows, rows=list(first.values())[::-1])

    def check_prompts(self, path: str, name: str, module: PreferenceObjective) -> None:
        """Raise a `UserError` if the policy has too few positions for a prompt of the file and its response."""
        assert module.policy is not None
        check_positions(module.policy.positions, self._prompts(path, name, module).ids, self.sampling, path)

    def check_texts(self, path: str, module: PreferenceObjective) -> None:
        """Raise a `UserError` if the texts of the file cannot be read."""
        self._texts(path, module)

    def evaluate(
        self, path: str, name: str, module: PreferenceObjective, texts: Mapping[str, str] | None = None
    ) -> Evaluation:
        """Answer the prompts of a file, score the responses and compare them.

        Args:
            name: Of the evaluation, on the terminal.
            texts: Files of texts whose likelihood before and after is compared, by name.
        """
        policy = module.policy
        assert policy is not None
        start = Policy.load(module.policy_config, module.lora).to(policy.device)
        if path not in self._held_out:
            self._held_out[path] = self._answer_with_start(path, name, start, module)
        held_out = self._held_out[path]
        prompts, batches = held_out.prompts, held_out.batches
        model = policy.merged_copy(torch.bfloat16)
        responses = self.answering.respond(module, model, prompts, batches, f"{name} policy")
        answers = self._scored(responses, prompts, batches, module)
        with gathered(policy):
            logps = self._logps(responses, held_out, policy, start, module)
            forgetting = {
                key: measure_forgetting(self._texts(file, module), policy, start, module, max(1, self.batch_size // 4))
                for key, file in (texts or {}).items()
            }
        summary = self._summarize(held_out, answers, logps, forgetting)
        return Evaluation(held_out, answers, logps[..., 0], logps[..., 1], summary)

    def _prompts(self, path: str, name: str, module: PreferenceObjective) -> TokenizedPrompts:
        if (path, name) not in self._tokenized:
            tokenizer = tokenizer_of(module)
            self._tokenized[path, name] = tokenize_prompts(self.read_prompts(path), tokenizer, path, name)
        return self._tokenized[path, name]

    def _texts(self, path: str, module: PreferenceObjective) -> TokenizedPrompts:
        if (path, "forgetting") not in self._tokenized:
            rows = read_rows(path, kind="texts")
            self._tokenized[path, "forgetting"] = tokenize_prompts(rows, tokenizer_of(module), path, "forgetting")
        return self._tokenized[path, "forgetting"]

    def _answer_with_start(self, path: str, name: str, start: Policy, module: PreferenceObjective) -> HeldOutPrompts:
        prompts = self._prompts(path, name, module)
        batches = sampling_batches(prompts.lengths, self.batch_size // self.responses_per_prompt)
        model = start.merged_copy(torch.bfloat16)
        responses = self.answering.respond(module, model, prompts, batches, f"{name} start")
        answers = self._scored(responses, prompts, batches, module)
        own = None
        if self.own_responses:
            tokenizer = tokenizer_of(module)

            def respond(places: Sequence[int]) -> list[list[Response]]:
                rows = [prompts.rows[i] for i in places]
                texts = [answer_text(row.responses[0]) for row in rows]
                return [
                    [Response(tokenizer.response(text, chat=not isinstance(row.prompt, str)), text, True)]
                    for row, text in zip(rows, texts, strict=True)
                ]

            given = compute_share(module.trainer, batches, f"{name} data", respond)
            own = self._scored(given, prompts, batches, module)
        return HeldOutPrompts(prompts, batches, answers, own)

    def _scored(
        self,
        responses: dict[int, list[list[Response]]],
        prompts: TokenizedPrompts,
        batches: list[list[int]],
        module: PreferenceObjective,
    ) -> ScoredResponses:
        """All processes' responses, from this process's share, with their rewards."""
        shares = {name: score_share(scorer, prompts, batches, responses) for name, scorer in self.scorers.items()}
        gathered_responses = gather_in_order(module.trainer, batches, responses)
        scores = {name: Scored.stack(gather_in_order(module.trainer, batches, share)) for name, share in shares.items()}
        return ScoredResponses(gathered_responses, scores)

    def _logps(
        self,
        responses: dict[int, list[list[Response]]],
        held_out: HeldOutPrompts,
        policy: Policy,
        start: Policy,
        module: PreferenceObjective,
    ) -> Tensor:
        """Log-probabilities of the policy's responses under the policy and under the start, [P, n, 2]."""
        size = max(1, self.batch_size // self.responses_per_prompt // 4)
        prompts = held_out.prompts
        share = {}
        for number, groups in responses.items():
            examples = [
                Example(prompts.ids[i], [response.ids for response in group], prompts.rows[i].source)
                for i, group in zip(held_out.batches[number], groups, strict=True)
            ]
            both = (record_logps(model, model, examples, size) for model in (policy, start))
            share[number] = [list(zip(ours, theirs, strict=True)) for ours, theirs in zip(*both, strict=True)]
        return torch.tensor(gather_in_order(module.trainer, held_out.batches, share))

    def _summarize(
        self, held_out: HeldOutPrompts, policy: ScoredResponses, logps: Tensor, forgetting: dict[str, Forgetting]
    ) -> Summary:
        start, own = held_out.start, held_out.own
        scorers = {
            name: _summarize_scorer(scorer.identity, name, policy, start, own) for name, scorer in self.scorers.items()
        }
        return Summary(
            prompts=len(held_out.prompts.ids),
            responses_per_prompt=self.responses_per_prompt,
            kl_from_start=Estimate.of((logps[..., 0] - logps[..., 1]).mean(1)),
            length_start=start.lengths.double().mean().item(),
            length_end=policy.lengths.double().mean().item(),
            length_data=own.lengths.double().mean().item() if own else None,
            diversity_start=start.diversity,
            diversity_end=policy.diversity,
            scorers=scorers,
            forgetting=forgetting,
        )


def check_judge_names(names: Sequence[str]) -> None:
    """Refuse names of judges that a metric, a file or the training scorer already has.

    Raises:
        UserError: names the judge.
    """
    for name in names:
        if not name or not name.replace("_", "a").replace("-", "a").isalnum():
            raise UserError(
                f"win_rate.judges: {name!r} must be letters, digits, _ and -. Rename the judge, since metrics are "
                "named after it."
            )
        if name == TRAINING:
            raise UserError(f"win_rate.judges: {name!r} is the scorer that training uses. Rename the judge.")
        for metric in (f"reward_{name}", f"win_rate_{name}"):
            if metric in METRICS:
                raise UserError(f"win_rate.judges: val/{metric} already exists. Rename the judge {name!r}.")


def _summarize_scorer(
    identity: str, name: str, policy: ScoredResponses, start: ScoredResponses, own: ScoredResponses | None
) -> ScorerSummary:
    ours, before = policy.scores[name], start.scores[name]
    against_start = compare_rewards(ours.rewards, before.rewards, policy.lengths, start.lengths)
    data = None
    if own:
        against_data = compare_rewards(ours.rewards, own.scores[name].rewards, policy.lengths, own.lengths)
        data = DataComparison(
            reward=against_data.other_reward,
            win_rate=against_data.win_rate,
            win_rate_ties_as_wins=against_data.win_rate_ties_as_wins,
            win_rate_length_controlled=against_data.win_rate_length_controlled,
        )
    parts = {
        part: PartSummary(
            start=Estimate.of(before.parts[part].double().mean(1)),
            end=Estimate.of(grades.double().mean(1)),
            data=Estimate.of(own.scores[name].parts[part].double().mean(1)) if own else None,
        )
        for part, grades in ours.parts.items()
    }
    return ScorerSummary(
        identity=identity,
        reward_start=against_start.other_reward,
        reward_end=against_start.reward,
        win_rate=against_start.win_rate,
        win_rate_ties_as_wins=against_start.win_rate_ties_as_wins,
        win_rate_length_controlled=against_start.win_rate_length_controlled,
        parts=parts,
        data=data,
    )
