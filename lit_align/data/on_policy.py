"""On-policy rounds: each epoch samples responses from the current policy, scores and pairs them, and trains on them.

    prompts ──sample──▶ responses, log π_s ──score──▶ rewards ──pair──▶ examples ──record──▶ log π_ref

`rounds/make.py` holds these steps. A round is keyed by the optimizer step and the policy's fingerprint, never by "the
loader was called", since Lightning calls it more often when a run resumes. Every batch is stored as it comes
(`rounds/store.py`): a killed run resumes in the middle of sampling, and a run resumed within an epoch trains on exactly
the pairs that it had.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader

from lit_align.console import print_line
from lit_align.data.base import PairsDataModule
from lit_align.data.cache import TokenCache
from lit_align.data.checks import check_can_sample, check_file_pairs
from lit_align.data.examples import Examples
from lit_align.data.given_rows import reading_rows
from lit_align.data.loader import ExampleLoader
from lit_align.data.pairing import BestWorst, PairingRule
from lit_align.data.prompts import digest_of_prompts, identity_of_prompts, read_prompts, texts_of
from lit_align.data.rounds.ahead import SamplingAhead, check_samples_ahead
from lit_align.data.rounds.current import CurrentRound, RoundsState, check_settings
from lit_align.data.rounds.make import RoundMaker
from lit_align.data.rounds.metrics import round_metrics
from lit_align.data.rounds.outcome import check_pairs, print_pairs
from lit_align.data.rounds.recorder import Recorder
from lit_align.data.rounds.sample import RoundSamples
from lit_align.data.rounds.schedule import (
    PromptsPerRound,
    check_known,
    check_prompts,
    check_rounds,
    places_of_round,
    prompts_in_words,
    share_of_round,
)
from lit_align.data.rounds.store import RoundStore
from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.fastest import fastest_sampler
from lit_align.data.samplers.generate import GenerateSampler
from lit_align.data.sampling import Sampling, check_positions
from lit_align.data.scorers.base import SCORER_FIXES, PairwiseScorer, Scorer
from lit_align.data.table import ExampleTable
from lit_align.dtypes import dtype_name, fast_dtype, warn_if_slow
from lit_align.errors import check_types
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy
from lit_align.provenance import Table, of_options
from lit_align.saved_state import restoring
from lit_align.sharding import barrier_with_timeout


class OnPolicyPairs(PairsDataModule):
    """Each epoch is a round: K responses per prompt from the current policy, scored, paired and trained on once.

    Args:
        prompts: A file, a saved data set or a hub name with prompts.
        scorer: Gives each response its reward. A PairwiseScorer compares responses instead: the reward of a response is
            then its mean probability to beat the K−1 others, and SPPO learns from the comparisons themselves.
        prompts_split: Split of a saved or hub data set.
        prompts_per_round: all, every prompt each round; chunk, an equal share for each of max_epochs rounds, as in
            PRPO; or a number N, the next N prompts each round, cycling when exhausted.
        responses_per_prompt: Number K of responses to each prompt.
        sampling: Temperature, length and filters of sampling.
        sampler: The engine that samples. None is GenerateSampler; auto is VLLMSampler on one GPU if vLLM is installed;
            the header says which.
        sampling_batch_size: Responses sampled at once. It determines the samples to the bit, so keep it when resuming.
        sampling_dtype: Type of the sampler's weights. auto is the faster of bfloat16 and float32; policy the policy's.
        rounds_ahead: 1 samples the next round while the policy trains on the present one, with the weights from before
            that training; 0 samples each round when it begins. log π_s is always the sampler's.
        record_sampler: Compute log π_s of every response. Proximal anchors, SPPO's estimated baseline and drift read
            it; if you use none of them, false saves a tenth of a round.
        pairing: The rule that selects which of the K responses are trained on; None is BestWorst.
        store: Folder of the rounds; None is `rounds` in the run's folder (trainer.default_root_dir).
    """

    argument_fixes = SCORER_FIXES
    argument_conversions = PairsDataModule.argument_conversions | reading_rows("prompts")

    def __init__(
        self,
        prompts: str,
        scorer: Scorer | PairwiseScorer,
        *,
        prompts_split: str | None = None,
        prompts_per_round: int | Literal["all", "chunk"] = "all",
        responses_per_prompt: int = 4,
        sampling: Sampling = Sampling(),  # noqa: B008  # read, never written
        sampler: Sampler | Literal["auto"] | None = None,
        sampling_batch_size: int = 128,
        sampling_dtype: Literal["auto", "bfloat16", "float32", "policy"] = "auto",
        rounds_ahead: Literal[0, 1] = 0,
        record_sampler: bool = True,
        pairing: PairingRule | None = None,
        store: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_rounds(responses_per_prompt, sampling_batch_size, prompts_per_round)
        self.prompts = prompts
        self.scorer = scorer
        self.prompts_split = prompts_split
        self.prompts_per_round: PromptsPerRound = prompts_per_round
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self._given_sampler: Sampler | Literal["auto"] = sampler or GenerateSampler()
        self.sampling_batch_size = sampling_batch_size
        self.sampling_dtype = dtype_name(fast_dtype(torch.bfloat16)) if sampling_dtype == "auto" else sampling_dtype
        self.rounds_ahead = rounds_ahead
        self.record_sampler = record_sampler
        self.pairing = pairing or BestWorst()
        self.store = store
        self.rounds_made = 0
        self._round: CurrentRound | None = None
        self._next: CurrentRound | None = None  # sampled while the current round is trained on
        self._ahead = SamplingAhead()
        self._logged: int | None = None  # the round whose metrics are in the log that a resumed run continues
        self._epoch: int | None = None  # the epoch that the current round belongs to
        self._read: Examples | None = None

    # --- Lightning ---

    def setup(self, stage: str) -> None:
        super().setup(stage)
        module = self.module
        _check_held_out_pairs(self, module)
        if stage != "fit":
            return
        self._epoch = self._next = None  # a round of an earlier fit is not this one's
        module.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        check_can_sample(module)
        self.check_needs(self.pairing, sampled=True)
        check_samples_ahead(self.sampler, self.rounds_ahead)
        check_known(self.prompts_per_round, self._rounds)
        if self._read is None:
            self.read_beside()
            barrier_with_timeout("setup", self.wait_minutes)
            source = self.source(self.prompts, self.prompts_split)
            self.settle_sampling_prompt(self.texts.examples, sampled=lambda: source.read("prompts"))
            self._read = read_prompts(source, self.prompt_tokenizer, TokenCache.at(self.cache_dir))
            self.scorer.check(texts_of(self._read.examples))
        check_prompts(self.prompt_count, self.prompts_per_round, self._rounds, self.prompts)

    def train_dataloader(self) -> ExampleLoader | CombinedLoader:
        if self._is_new_round():
            self._begin_round()
        if not self.current_round.examples:
            self._make_round()
        self._begin_next()
        return self.with_texts(self._training_loader(self.current_round.examples, self.seed + self.current_round.index))

    def _is_new_round(self) -> bool:
        """Whether this epoch's round is still to be made. After the last epoch there is none to make."""
        epoch = self.module.current_epoch
        return self._epoch != epoch and not (self._epoch is not None and 0 < self._rounds <= epoch)

    def state_dict(self) -> dict[str, Any]:
        state = RoundsState.of(self.rounds_made, self._epoch, self._round, self._next)
        return super().state_dict() | state._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the place of a checkpoint.

        Raises:
            KeyError, TypeError: the state lacks a field of `RoundsState`, or a field has another type.
        """
        super().load_state_dict(state_dict)
        own = {name: value for name, value in state_dict.items() if name in RoundsState._fields}
        state = check_types(RoundsState(**own))
        json.dumps([state.key, state.next_key])  # they name folders
        self.rounds_made = state.rounds_made
        self._epoch = state.epoch
        self._round = CurrentRound.of(state.made_at, state.key, state.trained_at)
        self._next = CurrentRound.of(state.next_at, state.next_key or {})
        self._logged = self._round and self._round.index

    def teardown(self, stage: str) -> None:
        self._ahead.cancel()

    def on_exception(self, exception: BaseException) -> None:
        self._ahead.cancel()

    # --- what others read ---

    @cached_property
    def sampler(self) -> Sampler:
        """The engine that samples."""
        given = self._given_sampler
        return given if isinstance(given, Sampler) else fastest_sampler(self.module.trainer)

    @property
    def recorder(self) -> Recorder:
        return Recorder(self.module, self.batch_size, self.wait_minutes, on_shards=self.sampler.streams_weights)

    def sampling_with(self, policy: Policy, longest: int) -> AbstractContextManager[Sampler]:
        if not self.sampler.streams_weights:
            return super().sampling_with(policy, longest)
        return self._ahead.lend(self.sampler, policy, self._sampling_type(policy), longest)

    def _sampling_type(self, policy: Policy) -> torch.dtype:
        return policy.dtype if self.sampling_dtype == "policy" else getattr(torch, self.sampling_dtype)

    @property
    def records_sampler(self) -> bool:
        return self.record_sampler

    @property
    def module(self) -> PreferenceObjective:
        return super().module

    @property
    def folder(self) -> Path:
        """Where the rounds are."""
        return Path(self.store or Path(self.module.trainer.default_root_dir, "rounds"))

    @property
    def current_round(self) -> CurrentRound:
        """The round that is trained on."""
        assert self._round is not None, "no round has begun"
        return self._round

    @property
    def prompt_count(self) -> int:
        """How many prompts there are, in all rounds together."""
        return len(self._all_prompts)

    def prompts_of_round(self, index: int) -> ExampleTable:
        """The prompts of one round, without responses; see prompts_per_round."""
        places = places_of_round(self.prompt_count, self.prompts_per_round, index, self._rounds, self.seed)
        return self._all_prompts.reordered(places)

    @property
    def _all_prompts(self) -> ExampleTable:
        return ExampleTable([]) if self._read is None else self._read.examples

    @property
    def _rounds(self) -> int:
        """How many rounds the run has; 0 or less if that is not known."""
        return self.module.trainer.max_epochs or 0

    # --- a round ---

    def _begin_round(self) -> None:
        begun = self._next or self._round_from_now(self.rounds_made)
        self._round, self._next = replace(begun, trained_at=self.module.global_step), None
        self._epoch = self.module.current_epoch
        self.rounds_made += 1

    def _begin_next(self) -> None:
        """Sample the next round while the current one is trained on, if rounds are sampled ahead and there is one."""
        if self.rounds_ahead and not 0 < self._rounds <= self.module.current_epoch + 1:
            self._next = self._next or self._round_from_now(self.rounds_made)
            self._ahead.start(self._samples_of(self._next))

    def _round_from_now(self, index: int) -> CurrentRound:
        """A round that the present policy samples."""
        assert self.module.policy is not None
        step = self.module.global_step
        key = self._settings(index) | {"step": step, "policy": self.module.policy.fingerprint()}
        return CurrentRound(index, step, key, trained_at=step)

    def _settings(self, index: int) -> dict[str, Any]:
        """All that determines a round's samples, except the policy."""
        return {
            "round": index,
            "seed": self.seed,
            "sampling": vars(self.sampling),
            "sampler": self.sampler.identity,
            "end_ids": self.preference_tokenizer.end_ids(),
            "responses_per_prompt": self.responses_per_prompt,
            "sampling_batch_size": self.sampling_batch_size,
            "sampling_dtype": self.sampling_dtype,
            "record_sampler": self.record_sampler,
            "policy.temperature": self.module.policy_config.temperature,  # of log π_s
            "prompts": digest_of_prompts(self.prompts_of_round(index)),
        }

    def _make_round(self) -> None:
        """Sample, score, pair and record; stored parts are read."""
        begun, samples = self.current_round, self._samples_of(self.current_round)
        with restoring(self.module.trainer):
            check_settings(begun, self._settings(begun.index))
        print_line(f"round {begun.index + 1}" + (f" of {self._rounds}" if self._rounds > 0 else ""))

        waited = self._ahead.finish()
        if samples.all_stored():
            self._begin_next()  # the sampler is free
        maker = RoundMaker(samples, self.scorer)
        with samples.sampling_policy():
            sampled = maker.sample()
            scored = maker.score(sampled)
            groups, numbers = maker.group(sampled, scored)
            pairs = maker.pair(self.pairing, groups)
            check_pairs(pairs, len(groups), begun.index)
            unused = self._training_loader(pairs.examples).dropped
            print_pairs(pairs, len(groups), unused, example_of=self.tokenizer if begun.index == 0 else None)
            examples = maker.record(pairs.examples, mismatched=self.needs.needs_mismatched)
        samples.forget_ahead()
        self._round = replace(begun, groups=groups, examples=examples)

        sampled = replace(sampled, seconds=waited + sampled.seconds)
        metrics = round_metrics(begun.index, sampled, scored, groups, numbers, pairs, unused)
        metrics |= {"round/staleness": float(begun.step < begun.trained_at)} if self.rounds_ahead else {}
        if begun.index != self._logged:  # before the checkpoint
            for logger in self.module.trainer.loggers:  # `self.log` cannot be used while Lightning asks for a loader
                logger.log_metrics(metrics, step=self.module.global_step)

    def _samples_of(self, round: CurrentRound) -> RoundSamples:
        policy = self.module.policy
        assert policy is not None
        longest = int(self._all_prompts.lengths.prompt.max())
        check_positions(policy.positions, longest, self.sampling, self.prompts)
        return RoundSamples(
            round=round,
            store=RoundStore(self.folder, round.index, round.key),
            recorder=self.recorder,
            prompts=self.prompts_of_round(round.index),
            sampler=self.sampler,
            sampling=self.sampling,
            sampling_dtype=self._sampling_type(policy),
            longest=longest + self.sampling.max_new_tokens,
            end_ids=self.preference_tokenizer.end_ids(),
            seed=self.seed,
            responses_per_prompt=self.responses_per_prompt,
            prompts_per_batch=self.sampling_batch_size // self.responses_per_prompt,
            record_sampler=self.record_sampler,
        )

    def identity(self) -> Table:
        own = {
            "data.prompts": identity_of_prompts(self._all_prompts),
            "data.prompts_per_round": share_of_round(self.prompts_per_round, self._rounds),
            "data.responses_per_prompt": self.responses_per_prompt,
            "data.sampler": self.sampler.identity,
            "data.sampling_batch_size": self.sampling_batch_size,
            "data.sampling_dtype": self.sampling_dtype,
            "data.record_sampler": self.record_sampler,
            "data.scorer": self.scorer.identity,
            "data.pairing": type(self.pairing).__name__,
        }
        rules = of_options("data.pairing", vars(self.pairing)) | of_options("data.sampling", vars(self.sampling))
        ahead = {"data.rounds_ahead": self.rounds_ahead} if self.rounds_ahead else {}  # older ones lack the key
        return super().identity() | own | ahead | rules

    def describe(self) -> Iterator[tuple[str, str]]:
        yield from self._read.describe("data", self.scorer.reads) if self._read else ()
        yield from super().describe()
        prompts, most = prompts_in_words(self.prompts_per_round), self.sampling.max_new_tokens
        ahead = ", sampled one round ahead" if self.rounds_ahead else ""
        yield "rounds", f"{prompts} × {self.responses_per_prompt} responses of up to {most} tokens{ahead}"
        yield from _describe_sampler(self.sampler, self.sampling_dtype, self.record_sampler)
        yield "scorer", self.scorer.identity


def _describe_sampler(sampler: Sampler, sampling_dtype: str, records: bool) -> Iterator[tuple[str, str]]:
    dtype = "the policy's type" if sampling_dtype == "policy" else sampling_dtype
    yield "sampler", f"{sampler.identity}, weights in {dtype}{'' if records else '; log π_s not recorded'}"
    if sampling_dtype != "policy" and not sampler.streams_weights:  # a server has its own machine
        yield from warn_if_slow(getattr(torch, sampling_dtype), "data.sampling_dtype=float32")


def _check_held_out_pairs(data: OnPolicyPairs, module: object) -> None:
    """Check the pairs of data.validation and data.test; see `check_file_pairs`."""
    for name, path, split, instead in (
        ("validation", data.validation, data.validation_split, "win_rate.validation"),
        ("test", data.test, data.test_split, "win_rate.prompts"),
    ):
        if path is not None and isinstance(module, PreferenceObjective):
            check_file_pairs(module, f"data.{name}={path}", data.source(str(path), split), instead)
