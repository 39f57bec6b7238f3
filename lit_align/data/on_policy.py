"""On-policy rounds: each epoch samples responses from the current policy, scores them, pairs them, and trains on them.

    prompts ──sample──▶ responses ──record──▶ log π_s, log π_ref ──score──▶ rewards ──pair──▶ the epoch's examples

A round is keyed by the optimizer step and the policy's fingerprint, never by "the loader was called", for Lightning
calls it more often than that when a run resumes. Everything is stored as it comes (`store.py`): a killed run goes on
in the middle of sampling, and one that resumes within an epoch trains on the very pairs it had.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_field, print_line
from lit_align.data.base import PairsDataModule
from lit_align.data.batches import Example
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Text
from lit_align.data.loader import ExampleLoader
from lit_align.data.pairing import BestWorst, PairingRule, Pairs, with_labels, with_mismatched
from lit_align.data.rounds.record import Make, Rows
from lit_align.data.rounds.store import RoundStore, digest
from lit_align.data.samplers import GenerateSampler, Sampler
from lit_align.data.sampling import Sampling, check_positions, check_stop, sampling_batches
from lit_align.data.scorers.base import PairwiseScorer, Scorer, compare, score
from lit_align.data.tokenization import listing
from lit_align.errors import UserError
from lit_align.objectives import PreferenceObjective
from lit_align.sharding import gathered, wait_for_all


class OnPolicyPairs(PairsDataModule):
    """Each epoch is a round: K responses per prompt from the current policy, scored, paired and trained on once.

    Args:
        prompts: A file, a saved data set or a hub name with prompts.
        scorer: Gives each response its reward; or compares them with each other (PairwiseScorer): then the reward of a
            response is its mean probability to beat the K−1 others, and SPPO learns from the comparisons themselves.
        prompts_split: Split of a saved or hub data set.
        prompts_per_round: all prompts in every round; chunk, an equal share for each of max_epochs rounds, as PRPO
            does; or a number, the next so many in each round, beginning anew when they are used up.
        responses_per_prompt: K.
        sampling: How responses are drawn.
        sampler: What draws them; None is transformers' generate.
        sampling_batch_size: Responses drawn at once. It decides the samples (to the bit), so keep it over a resume.
        sampling_dtype: Type of the weights that sample: bfloat16 is fastest, policy is the policy's own.
        record_sampler: Compute log π_s of every response. Proximal anchors read it, an estimated baseline of SPPO, and
            drift; where nothing does, false saves a tenth of a round.
        pairing: Which of the K responses are trained on.
        store: Folder of the rounds; None is `rounds` in the run's folder (trainer.default_root_dir).
    """

    def __init__(
        self,
        prompts: str,
        scorer: Scorer | PairwiseScorer,
        *,
        prompts_split: str | None = None,
        prompts_per_round: int | Literal["all", "chunk"] = "all",
        responses_per_prompt: int = 4,
        sampling: Sampling = Sampling(),  # noqa: B008  # read, never written
        sampler: Sampler | None = None,
        sampling_batch_size: int = 128,
        sampling_dtype: Literal["bfloat16", "policy"] = "bfloat16",
        record_sampler: bool = True,
        pairing: PairingRule | None = None,
        store: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if responses_per_prompt < 2:
            raise UserError(f"data.responses_per_prompt={responses_per_prompt}: a preference needs at least 2.")
        if sampling_batch_size < responses_per_prompt:
            raise UserError(
                f"data.sampling_batch_size={sampling_batch_size} cannot hold the {responses_per_prompt} responses of "
                "one prompt; raise it."
            )
        if isinstance(prompts_per_round, int) and prompts_per_round < 1:
            raise UserError(f"data.prompts_per_round={prompts_per_round} must be at least 1, or all, or chunk.")
        self.prompts = prompts
        self.scorer = scorer
        self.prompts_split = prompts_split
        self.prompts_per_round: int | Literal["all", "chunk"] = prompts_per_round
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.sampler = sampler or GenerateSampler()
        self.sampling_batch_size = sampling_batch_size
        self.sampling_dtype = sampling_dtype
        self.record_sampler = record_sampler
        self.pairing = pairing or BestWorst()
        self.store = store
        self.rounds_made = 0
        self._made_at: int | None = None  # the optimizer step of the present round
        self._key: dict[str, Any] = {}  # of the present round
        self._pairs: Pairs | None = None
        self._prompts: list[tuple[Row, list[int]]] = []
        self.groups: list[Example] = []  # all K responses of the present round, none selected
        self._line = ""

    # --- Lightning ---

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if isinstance(self.trainer.lightning_module, PreferenceObjective):
            self._check_file_pairs()
        if stage != "fit" or self._prompts:
            return
        if not isinstance(self.trainer.lightning_module, PreferenceObjective):
            raise UserError(
                "OnPolicyPairs samples from `lightning_module.policy`: train a lit_align objective with it."
            )
        if not self.trainer.lightning_module.samples:
            raise UserError(
                f"data.class_path=OnPolicyPairs: {type(self.trainer.lightning_module).__name__} learns from a file, "
                "not from responses of its own. Take OfflinePairs."
            )
        if self.trainer.lightning_module.reads_sampler and not self.record_sampler:
            raise UserError("data.record_sampler=false: this objective reads log π_s. Leave it out.")
        self.check_pairing(self.pairing)
        self.read_texts()
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self._check_rounds()
        wait_for_all("setup", self.wait_minutes)
        rows = read_rows(self.prompts, split=self.prompts_split, kind="prompts")
        self._prompts, counts = self.encoder.prompts(rows)
        if not self._prompts:
            raise UserError(f"{self.prompts}: no prompt is left: {listing(counts)}.")
        self._check_prompts()
        skipped = rows.skipped + counts
        self._line = f"{len(self._prompts)} prompts from {self.prompts}: {rows.description}"
        self._line += f"; {listing(skipped)}" if skipped else ""

    def _check_file_pairs(self) -> None:
        """Make sure that pairs of a file have what the objective reads: unlike a round's, they record no sampler."""
        name = type(self.module).__name__
        given = {
            "validation": (self.validation, self.validation_split, "win_rate.validation"),
            "test": (self.test, self.test_split, "win_rate.prompts"),
        }
        for option, (path, split, instead) in given.items():
            if path is None:
                continue
            mend = f"leave data.{option} out: {instead} compares the policy with its start on held-out prompts."
            if self.module.reads_sampler:
                raise UserError(
                    f"data.{option}={path}: {name}, as it is set, reads log π_s, which pairs of a file do not have. So "
                    + mend
                )
            if self.module.takes_groups and read_rows(path, split=split, kind=self.module.rows)[0].rewards is None:
                raise UserError(
                    f"data.{option}={path}: {name}, as it is set, learns from rewards, and these pairs have none. Give "
                    "some (columns score_chosen and score_rejected, or responses and rewards), or " + mend
                )

    def _check_rounds(self) -> None:
        assert self.trainer is not None
        if self.prompts_per_round == "chunk" and (self.trainer.max_epochs or 0) < 1:
            raise UserError("data.prompts_per_round=chunk cuts the prompts by trainer.max_epochs: set it.")

    def _check_prompts(self) -> None:
        """Make sure that every round has prompts, and none has one twice (its samples would be the same)."""
        assert self.trainer is not None
        count, asked = len(self._prompts), self.prompts_per_round
        if isinstance(asked, int) and asked > count:
            raise UserError(f"data.prompts_per_round={asked}: {self.prompts} has {count}. Lower it, or take all.")
        if asked == "chunk" and count < (self.trainer.max_epochs or 0):
            raise UserError(
                f"data.prompts_per_round=chunk: {self.prompts} has {count} prompts for trainer.max_epochs="
                f"{self.trainer.max_epochs} rounds, which leaves some without any. Lower max_epochs, or take all."
            )

    def train_dataloader(self) -> ExampleLoader | CombinedLoader:
        if self._is_new_round():
            self._begin_round()
        if self._pairs is None:
            self._pairs = self._fill_round()
        return self.with_texts(self._training_loader(self._pairs.examples, self.seed + self._key["round"]))

    def _is_new_round(self) -> bool:
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        if self._made_at is None:
            return True
        if self._made_at == self.trainer.global_step:
            return False
        if (self.trainer.max_epochs or -1) > 0 and loop.epoch_progress.current.processed >= self.trainer.max_epochs:  # type: ignore[attr-defined, operator]
            return False  # resumed behind the last round: there is nothing left to train
        return not (loop.restarting and not loop.epoch_loop.batch_progress.is_last_batch)

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_made": self.rounds_made, "made_at": self._made_at, "key": self._key}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds_made = state_dict["rounds_made"]
        self._made_at = state_dict["made_at"]
        self._key = state_dict["key"]
        self._pairs = None

    # --- a round ---

    @property
    def module(self) -> PreferenceObjective:
        assert self.trainer is not None
        return self.trainer.lightning_module  # type: ignore[return-value]

    @property
    def folder(self) -> Path:
        """Where the rounds are."""
        assert self.trainer is not None
        return Path(self.store or Path(self.trainer.default_root_dir, "rounds"))

    @property
    def is_fresh(self) -> bool:
        """Whether the policy still is the one that drew this round's responses."""
        return self._made_at == self.module.global_step

    def _begin_round(self) -> None:
        assert self.trainer is not None
        assert self.module.policy is not None
        self._key = self._settings(self.rounds_made) | {
            "step": self.trainer.global_step,
            "policy": self.module.policy.fingerprint(),
        }
        self._made_at = self.trainer.global_step
        self.rounds_made += 1
        self._pairs = None

    def _settings(self, index: int) -> dict[str, Any]:
        """What decides a round's samples beside the policy."""
        return {
            "round": index,
            "seed": self.seed,
            "sampling": vars(self.sampling),
            "sampler": self.sampler.identity,
            "responses_per_prompt": self.responses_per_prompt,
            "sampling_batch_size": self.sampling_batch_size,
            "sampling_dtype": self.sampling_dtype,
            "record_sampler": self.record_sampler,
            "policy.temperature": self.module.policy_config.temperature,  # of log π_s
            "prompts": digest(repr([ids for _, ids in self._chosen_prompts(index)])),
        }

    def _check_settings(self) -> None:
        """Make sure that a round that a checkpoint was in the middle of has the same prompts and settings now."""
        settings = self._settings(self._key["round"])
        if different := [name for name, value in settings.items() if self._key.get(name) != value]:
            options = [f"{'model' if name == 'policy.temperature' else 'data'}.{name}" for name in different]
            raise UserError(
                f"the checkpoint is in the middle of round {self._key['round'] + 1}, whose responses were drawn with "
                f"another {' and '.join(options)}. (A round's prompts follow from data.prompts, prompts_per_round, "
                "seed and, of chunks, trainer.max_epochs.) Resume with what it was begun with, or from a checkpoint at "
                "the end of a round."
            )

    def _chosen_prompts(self, index: int) -> list[tuple[Row, list[int]]]:
        """The prompts of one round; those of `all` in their own order, others from one shuffled order."""
        if self.prompts_per_round == "all":
            return self._prompts
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self._prompts), generator=generator).tolist()
        if self.prompts_per_round == "chunk":
            assert self.trainer is not None
            assert self.trainer.max_epochs
            return [self._prompts[i] for i in order[index :: self.trainer.max_epochs]]
        start = index * self.prompts_per_round
        return [self._prompts[order[i % len(order)]] for i in range(start, start + self.prompts_per_round)]

    def _fill_round(self) -> Pairs:
        """Sample, score, pair and record what is not stored yet."""
        assert self.trainer is not None
        self._check_settings()
        assert self.module.policy is not None
        check_positions(self.module.policy.positions, [ids for _, ids in self._prompts], self.sampling, self.prompts)
        index = self._key["round"]
        made = RoundStore(self.folder, index, self._key)
        prompts = self._chosen_prompts(index)
        of = f" of {self.trainer.max_epochs}" if (self.trainer.max_epochs or -1) > 0 else ""
        print_line(f"round {index + 1}{of}")

        batches = sampling_batches(
            [len(ids) for _, ids in prompts], self.sampling_batch_size // self.responses_per_prompt
        )
        times: dict[str, float] = {}
        with self._timed("sample", "samples", made, batches, times):
            samples = self.recorder.part("sample", "samples", made, batches, self._sampling(index, prompts))
        scores_name = f"scores-{digest(self.scorer.identity)}"
        with self._timed("score", scores_name, made, batches, times):
            scores = self.recorder.part("score", scores_name, made, batches, self._scoring(prompts, samples))
        groups = self.groups = [
            Example(
                prompt_ids=ids,
                response_ids=sampled["response_ids"],
                source=row.source,
                rewards=scored["scores"],
                sampler_logps=sampled["sampler_logps"],
                texts=sampled["responses"],
                preferences=scored.get("preferences"),
            )
            for (row, ids), sampled, scored in zip(prompts, samples, scores, strict=True)
        ]
        pairs = self.pairing(groups)
        left_out = listing(pairs.counts) + (
            f"; taken out: {listing(pairs.partial_drops)}" if pairs.partial_drops else ""
        )
        if not pairs.examples:
            raise UserError(f"round {index + 1} gives no pair to train on: of {len(groups)} prompts {left_out}.")
        if index == 0:
            for name, text in self._describe_example(pairs.examples[0]):
                print_field(name, text)
        left = self._training_loader(pairs.examples).dropped
        print_field(
            "pair",
            f"{len(pairs.examples)} pairs from {len(groups)} prompts"
            + (f", {left} of them in no full batch" if left else "")
            + (f"; {left_out}" if pairs.counts or pairs.partial_drops else ""),
        )
        if self.module.needs_mismatched:
            pairs = self._with_mismatched(made, pairs)
        pairs = replace(pairs, examples=self.recorder.with_reference(made, pairs.examples))
        self._log_round(samples, groups, scores, pairs, left, times)
        return pairs

    @contextmanager
    def _timed(
        self, name: str, part: str, made: RoundStore, batches: Sequence[Sequence[int]], times: dict[str, float]
    ) -> Iterator[None]:
        """Note how long a phase takes, and how many prompts a minute it gets done if any is left to do."""
        prompts = sum(len(places) for number, places in enumerate(batches) if not made.has(part, number))
        started = time.monotonic()
        yield
        seconds = times[f"seconds_{name}"] = time.monotonic() - started
        if prompts:
            times[f"prompts_per_minute_{name}"] = 60 * prompts / seconds

    @contextmanager
    def _sampling(self, index: int, prompts: Sequence[tuple[Row, list[int]]]) -> Iterator[Make]:
        """Draws the responses of a batch of prompts and records log π_s."""
        policy = self.module.policy
        assert policy is not None
        self._check_sampler()
        check_stop(self.sampling.stop, policy.tokenizer)
        dtype = torch.bfloat16 if self.sampling_dtype == "bfloat16" else policy.dtype

        def sample(places: Sequence[int]) -> Rows:
            ids = [prompts[i][1] for i in places]
            keys = [(self.seed, index, prompts[i][0].source) for i in places]
            responses = self.sampler.sample(
                policy, ids, keys, self.responses_per_prompt, self.sampling, self.encoder.end_ids()
            )
            examples = [
                Example(prompt, [r.ids for r in drawn], prompts[i][0].source)
                for i, prompt, drawn in zip(places, ids, responses, strict=True)
            ]
            logps = self.recorder.logps(policy, examples) if self.record_sampler else [None] * len(examples)
            return [
                {
                    "source": example.source,
                    "prompt": prompts[i][0].prompt,
                    "prompt_ids": example.prompt_ids,
                    "responses": [r.text for r in drawn],
                    "response_ids": example.response_ids,
                    "finished": [r.finished for r in drawn],
                    "sampler_logps": of_sampler,
                }
                for i, example, drawn, of_sampler in zip(places, examples, responses, logps, strict=True)
            ]

        with self.sampler.ready(policy, dtype), gathered(policy):
            yield sample

    def _check_sampler(self) -> None:
        """Make sure that the policy still is the one whose round this is."""
        if not self.is_fresh:
            raise UserError(
                f"the checkpoint is in the middle of round {self._key['round'] + 1}, whose responses were drawn at "
                f"step {self._made_at} and are no longer in {self.folder}. Give that folder back (data.store) or "
                "resume from a checkpoint at the end of an epoch."
            )

    @contextmanager
    def _scoring(self, prompts: Sequence[tuple[Row, list[int]]], samples: Rows) -> Iterator[Make]:
        def rate(places: Sequence[int]) -> Rows:
            rows = [prompts[i][0] for i in places]
            labels = self._labels([row.prompt for row in rows], [samples[i]["responses"] for i in places])
            return [
                {"source": row.source, "scorer": self.scorer.identity} | label
                for row, label in zip(rows, labels, strict=True)
            ]

        try:
            yield rate
        finally:
            self.scorer.release()

    def _labels(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> Rows:
        """Of each prompt, the scores of its K responses, and their comparisons or parts where the scorer gives any."""
        K = self.responses_per_prompt
        if isinstance(self.scorer, PairwiseScorer):
            compared = compare(self.scorer, prompts, responses)
            return [  # the mean over the others: without the ½ against itself
                {"scores": [(sum(wins) - 0.5) / (K - 1) for wins in P], "preferences": P} for P in compared
            ]
        repeated = [prompt for prompt in prompts for _ in range(K)]
        scores = score(self.scorer, repeated, [text for group in responses for text in group])
        places = [slice(start, start + K) for start in range(0, len(scores), K)]
        if not scores.parts:
            return [{"scores": scores[place]} for place in places]
        return [
            {"scores": scores[place], "parts": {name: part[place] for name, part in scores.parts.items()}}
            for place in places
        ]

    def _with_mismatched(self, made: RoundStore, pairs: Pairs) -> Pairs:
        """The pairs with labels, and with another prompt's response as one more branch, its log π_s recorded too."""
        examples = with_mismatched(with_labels(pairs.examples))
        if not self.record_sampler:
            return replace(pairs, examples=examples)
        alone = [replace(example, response_ids=example.response_ids[-1:]) for example in examples]
        recorded = self.recorder.column("mismatched", "", made, self._asking_sampler(alone), alone)
        return replace(
            pairs,
            examples=[
                replace(example, sampler_logps=[*(example.sampler_logps or []), *logps])
                for example, logps in zip(examples, recorded, strict=True)
            ],
        )

    @contextmanager
    def _asking_sampler(self, examples: Sequence[Example]) -> Iterator[Make]:
        policy = self.module.policy
        assert policy is not None
        self._check_sampler()
        with gathered(policy):
            yield lambda places: self.recorder.rows("mismatched", policy, [examples[i] for i in places])

    def _log_round(
        self, samples: Rows, groups: Sequence[Example], scores: Rows, pairs: Pairs, left: int, times: dict[str, float]
    ) -> None:
        """Log what a round gave; `self.log` is not to be had while Lightning asks for a loader.

        | metric | formula |
        |---|---|
        | round/reward | mean reward over all responses |
        | round/reward_best, round/reward_worst | mean over prompts of the highest and the lowest reward |
        | round/reward_NAME | mean of what rewards are made of: a judge's criteria, an ensemble's members |
        | round/reward_disagreement | mean of an ensemble's weighted standard deviation around its reward |
        | round/length | mean number of response tokens |
        | round/finished | share of responses that ended by themselves |
        | round/pairs, round/dropped | examples trained on; prompts left out by the pairing rule |
        | round/dropped_REASON | the same by reason, and responses or pairs that were taken out |
        | round/dropped_in_no_full_batch | pairs behind the last batch that every process has one of |
        | round/seconds_sample, round/seconds_score | wall-clock time of the two phases |
        | round/prompts_per_minute_sample, …_score | prompts done / that time, of those that were not stored before |
        """
        assert self.trainer is not None
        rewards = torch.tensor([group.rewards for group in groups])
        finished = torch.tensor([sample["finished"] for sample in samples])
        lengths = [len(ids) for group in groups for ids in group.response_ids]
        values = {
            "round": float(self._key["round"]),
            "round/reward": rewards.mean().item(),
            "round/reward_best": rewards.amax(1).mean().item(),
            "round/reward_worst": rewards.amin(1).mean().item(),
            "round/length": sum(lengths) / len(lengths),
            "round/finished": finished.float().mean().item(),
            "round/pairs": float(len(pairs.examples) - left),
            "round/dropped": float(sum(pairs.counts.values())),
        } | {f"round/{name}": value for name, value in times.items()}
        for name in scores[0].get("parts") or {}:
            values[f"round/reward_{name}"] = torch.tensor([row["parts"][name] for row in scores]).mean().item()
        for reason, count in (pairs.counts + pairs.partial_drops + Counter({"in no full batch": left})).items():
            values[f"round/dropped_{reason.replace(' ', '_')}"] = float(count)
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "data", self._line
        yield from super().describe()
        rounds = {"all": "all prompts", "chunk": "the next share of the prompts"}.get(
            str(self.prompts_per_round), f"{self.prompts_per_round} prompts"
        )
        yield (
            "rounds",
            f"{rounds} × {self.responses_per_prompt} responses of up to {self.sampling.max_new_tokens} tokens",
        )
        dtype = "bfloat16" if self.sampling_dtype == "bfloat16" else "the policy's type"
        yield (
            "sampler",
            f"{self.sampler.identity}, weights in {dtype}{'' if self.record_sampler else '; log π_s unrecorded'}",
        )
        yield "scorer", self.scorer.identity
