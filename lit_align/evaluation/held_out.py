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

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_align.data.batches import Example
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Rows, answer_text
from lit_align.data.formats.spool import Spool
from lit_align.data.sampling import Response, Sampling, check_positions, sampling_batches
from lit_align.data.scorers.base import Scorer
from lit_align.evaluation.answering import (
    Answering,
    TokenizedPrompts,
    score_share,
    tokenize_prompts,
    tokenizer_of,
)
from lit_align.evaluation.forgetting import measure_forgetting
from lit_align.evaluation.likelihoods import Likelihoods
from lit_align.evaluation.results import Evaluation, HeldOutPrompts, Scored, ScoredResponses, summarize_scorer
from lit_align.evaluation.shares import Share, compute_share, gather_in_order
from lit_align.evaluation.summary import Forgetting, Summary
from lit_align.metrics.win_rate import Estimate, length_gap
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy


class Evaluator:
    """Answers held-out prompts with the policy and the start, scores the responses, and compares them.

    All processes call its methods together. The start answers each file of prompts once, and so does a policy that is
    evaluated twice in succession.

    Args:
        module: Its policy is evaluated.
        scorers: By name; the one that training uses is "training".
        responses_per_prompt: n, sampled from the policy and from the start.
        columns: Source of each column of the prompts' files.
        ignore_columns: Columns of these files that are left out.
        batch_size: Responses sampled at once.
        own_responses: Compare with the data set's own responses, too.
        best_of: Number of the start's responses of which the verdict takes the best.
        seed: Seed of the random streams.
    """

    def __init__(
        self,
        module: PreferenceObjective,
        scorers: Mapping[str, Scorer],
        *,
        responses_per_prompt: int,
        sampling: Sampling,
        columns: Mapping[str, str] | None,
        ignore_columns: Sequence[str],
        batch_size: int,
        own_responses: bool,
        best_of: int,
        seed: int,
    ):
        self.module = module
        self.scorers = dict(scorers)
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.reading: dict[str, Any] = {"columns": columns, "ignore_columns": ignore_columns}
        self.batch_size = batch_size
        self.own_responses = own_responses
        self.answering = Answering(module, ("held out", seed), responses_per_prompt, sampling)
        more = max(0, best_of - responses_per_prompt)
        self.answering_more = Answering(module, ("best of n", seed), more, sampling) if more else None
        self._tokenized: dict[tuple[str, str], TokenizedPrompts] = {}
        self._held_out: dict[str, HeldOutPrompts] = {}
        self._answered: tuple[tuple[str, str], ScoredResponses, Tensor] | None = None  # file and policy; last answers

    @property
    def policy(self) -> Policy:
        assert self.module.policy is not None
        return self.module.policy

    def read_prompts(self, path: str) -> Rows:
        """The prompts of a file; with its own responses where they are compared, each prompt once.

        Raises:
            UserError: the file cannot be read.
        """
        if not self.own_responses:
            return read_rows(path, kind="prompts", **self.reading)
        rows = read_rows(path, kind="texts", turns="last", **self.reading)
        return replace(rows, rows=Spool(_first_of_each_prompt(rows)))

    def check_prompts(self, path: str, name: str) -> None:
        """Check that the policy can answer the prompts of the file, and that the scorers can score them.

        Raises:
            UserError: there are too few positions for a prompt and its response, or a scorer lacks a prompt's columns.
        """
        prompts = self._prompts(path, name)
        check_positions(self.policy.positions, max(prompts.lengths), self.sampling, path)
        for scorer in self.scorers.values():
            scorer.check(row.prompt for row in prompts.rows)

    def check_texts(self, path: str) -> None:
        """Raise a `UserError` if the texts of the file cannot be read, or one is too long for the model."""
        tokenizer = tokenizer_of(self.module)
        for row in self._texts(path).rows:
            tokenizer.row(row)

    def evaluate(
        self, path: str, name: str, *, texts: Mapping[str, str] | None = None, best_of_n: bool = False
    ) -> Evaluation:
        """Answer the prompts of a file, score the responses and compare them.

        Args:
            name: The evaluation's name on the terminal.
            texts: Files of texts whose likelihood before and after is compared, by name.
            best_of_n: Also report the best of n of the start's responses.
        """
        with self.module.start() as start:
            if path not in self._held_out:
                self._held_out[path] = self._answer_with_start(path, name, start)
            held_out = self._held_out[path]
            key = (path, self.policy.fingerprint())
            if self._answered is None or self._answered[0] != key:  # the verdict may be on what was just validated
                self._answered = key, *self._answer_with_policy(held_out, name, start)
            _, answers, logps = self._answered
            likelihoods = Likelihoods(self.module, self.policy, start, max(1, self.batch_size // 4))
            forgetting = {
                each: measure_forgetting(each, self._texts(file), likelihoods) for each, file in (texts or {}).items()
            }
            samples = self._samples_of_start(held_out, name, start) if best_of_n else None
        summary = self._summarize(held_out, answers, logps, forgetting, samples)
        return Evaluation(held_out, answers, logps[..., 0], logps[..., 1], summary)

    def _prompts(self, path: str, name: str) -> TokenizedPrompts:
        return self._tokenize(path, name, self.read_prompts)

    def _texts(self, path: str) -> TokenizedPrompts:
        return self._tokenize(path, "forgetting", partial(read_rows, kind="texts"))

    def _tokenize(self, path: str, name: str, read: Callable[[str], Rows]) -> TokenizedPrompts:
        if (path, name) not in self._tokenized:
            self._tokenized[path, name] = tokenize_prompts(read(path), tokenizer_of(self.module), path, name)
        return self._tokenized[path, name]

    def _answer_with_start(self, path: str, name: str, start: Policy) -> HeldOutPrompts:
        self.check_prompts(path, name)
        prompts = self._prompts(path, name)
        batches = sampling_batches(prompts.lengths, self.batch_size // self.responses_per_prompt)
        responses = self.answering.respond(start, prompts, batches, f"{name} start")
        answers = self._scored(responses, prompts, batches)
        own = None
        if self.own_responses:
            tokenizer = tokenizer_of(self.module)

            def own_response(place: int) -> list[Response]:
                row = prompts.rows[place]
                return [Response(tokenizer.response_ids(row)[0], answer_text(row.responses[0]), finished=True)]

            given = compute_share(
                self.module.trainer, batches, f"{name} data", lambda places: list(map(own_response, places))
            )
            own = self._scored(given, prompts, batches)
        return HeldOutPrompts(prompts, batches, answers, own)

    def _answer_with_policy(self, held_out: HeldOutPrompts, name: str, start: Policy) -> tuple[ScoredResponses, Tensor]:
        """The policy's responses, and their log-probabilities under the policy and under the start, [P, n, 2]."""
        prompts, batches = held_out.prompts, held_out.batches
        responses = self.answering.respond(self.policy, prompts, batches, f"{name} policy")
        answers = self._scored(responses, prompts, batches)
        size = max(1, self.batch_size // self.responses_per_prompt // 4)
        groups = iter(responses.values())

        def examples(places: Sequence[int]) -> list[Example]:
            """This process's next batch."""
            return [
                Example(prompts.ids[i], [response.ids for response in group], prompts.rows[i].source)
                for i, group in zip(places, next(groups), strict=True)
            ]

        share = Likelihoods(self.module, self.policy, start, size).share(batches, examples)
        logps = torch.tensor(list(gather_in_order(self.module.trainer, batches, share)))  # [P, 2, n]
        return answers, logps.transpose(1, 2)

    def _samples_of_start(self, held_out: HeldOutPrompts, name: str, start: Policy) -> dict[str, Scored]:
        """The start's rewards by scorer, with those of more responses if best of n needs more."""
        if self.answering_more is None:
            return held_out.start.scores
        prompts = held_out.prompts
        batches = sampling_batches(prompts.lengths, max(1, self.batch_size // self.answering_more.count))
        more = self.answering_more.respond(start, prompts, batches, f"{name} best of n")
        scored = self._scored(more, prompts, batches).scores
        return {key: each.with_more(scored[key]) for key, each in held_out.start.scores.items()}

    def _scored(
        self, responses: Share[list[Response]], prompts: TokenizedPrompts, batches: list[list[int]]
    ) -> ScoredResponses:
        """All processes' responses, from this process's share, with their rewards."""
        trainer = self.module.trainer
        shares = {name: score_share(scorer, prompts, batches, responses) for name, scorer in self.scorers.items()}
        gathered_responses = gather_in_order(trainer, batches, responses)
        scores = {name: Scored.stack(gather_in_order(trainer, batches, share)) for name, share in shares.items()}
        return ScoredResponses(gathered_responses, scores)

    def _summarize(
        self,
        held_out: HeldOutPrompts,
        policy: ScoredResponses,
        logps: Tensor,
        forgetting: dict[str, Forgetting],
        samples: Mapping[str, Scored] | None,
    ) -> Summary:
        start, own = held_out.start, held_out.own
        scorers = {
            name: summarize_scorer(scorer.identity, name, policy, start, own, samples)
            for name, scorer in self.scorers.items()
        }
        return Summary(
            prompts=len(held_out.prompts.ids),
            responses_per_prompt=self.responses_per_prompt,
            kl_from_start=Estimate.of((logps[..., 0] - logps[..., 1]).mean(1)),
            length_start=start.lengths.double().mean().item(),
            length_end=policy.lengths.double().mean().item(),
            length_gap=length_gap(policy.lengths, start.lengths),
            finished_start=start.finished,
            finished_end=policy.finished,
            length_data=own.lengths.double().mean().item() if own else None,
            diversity_start=start.diversity,
            diversity_end=policy.diversity,
            kl_sampling=self.sampling.described_for(self.policy.temperature) or None,
            scorers=scorers,
            forgetting=forgetting,
            step=self.module.weights_step,
        )


def _first_of_each_prompt(rows: Iterable[Row]) -> Iterator[Row]:
    seen: set[bytes] = set()
    for row in rows:
        key = hashlib.sha256(json.dumps(row.prompt).encode()).digest()
        if key not in seen:
            seen.add(key)
            yield row
