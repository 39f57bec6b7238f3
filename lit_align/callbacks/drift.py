"""How far the policy has drifted: from its reference, from the start, and from the sampler of its pairs.

Training pairs are selected (the best and the worst of K) and so estimate no KL. These metrics are over unselected
responses:

| metric | formula |
|---|---|
| drift/kl_policy_reference | E_π[log π(y|x) − log π_ref(y|x)], nats per response |
| drift/kl_policy_start | E_π[log π(y|x) − log π_start(y|x)] |
| drift/kl_reference_start | E_π[log π_ref(y|x) − log π_start(y|x)], the difference of the two |
| drift/kl_policy_sampler | mean of w log w − w + 1 over all K responses y ~ π_s, w = π(y|x)/π_s(y|x) over its mean |
| drift/kl_policy_sampler_begin | the same at the beginning of a round that was sampled ahead (data.rounds_ahead) |

With on-policy rounds, the first three are measured at a round's beginning, when its responses are the policy's own.
The fourth is measured at its end; λ may follow it (model.proximal_target). With offline pairs and rounds that were
sampled ahead, responses are sampled for the measurement. With offline pairs drift/kl_policy_sampler is not logged.

Expectations are means over `prompts` prompts. Their standard error is a few tenths of a nat: raise `prompts` for closer
estimates. At a sampling temperature other than the policy's (1), or with top_p or top_k, responses are not samples of
π: the values are means of log ratios over such responses, not E_π, and the screen says so. They are usually higher
(0.26 at temperature 0.7 with top_p 0.9 where E_π is 0.16), and can be below 0.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import print_field
from lit_align.data.base import PairsDataModule, data_module_of
from lit_align.data.batches import Example
from lit_align.data.offline_pairs import OfflinePairs
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.sampling import SampleRequest, Sampling
from lit_align.errors import UserError, counted
from lit_align.metrics import kl_from_sampler
from lit_align.objectives import AnchoredObjective
from lit_align.sharding import of_all_processes


class Drift(AlignCallback):
    """Logs the divergences between policy, reference, start and sampler.

    Args:
        prompts: Number of prompts that are measured, by all processes together.
        every_n_steps: For offline pairs: optimizer steps between measurements; None is once per epoch.
        sampling: For offline pairs: how responses are sampled.
    """

    option_name = "drift"
    order = Order.MEASURE
    in_dry_run = DryRun.ACT

    def __init__(self, prompts: int = 16, every_n_steps: int | None = None, sampling: Sampling | None = None):
        if prompts < 1:
            raise UserError(f"drift.prompts={prompts} must be at least 1. Leave the measurement out with --drift=null.")
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"drift.every_n_steps={every_n_steps} must be at least 1. Raise it, or use null: once per epoch."
            )
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.sampling = sampling
        self._measured_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._measured_at = -1  # a checkpoint's value is loaded after this

    def state_dict(self) -> dict[str, Any]:
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured_at = counted("measured_at", state_dict["measured_at"], least=-1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_module_of(trainer)
        if data is None and isinstance(pl_module, AnchoredObjective):
            print_field("drift", "not measured: the data are neither OnPolicyPairs nor OfflinePairs")
        if not isinstance(data, OnPolicyPairs):
            return
        for name, value in {"every_n_steps": self.every_n_steps, "sampling": self.sampling}.items():
            if value is not None:
                raise UserError(
                    f"drift.{name}={value} has no effect with OnPolicyPairs, whose rounds are measured. Leave it out."
                )
        if not isinstance(pl_module, AnchoredObjective):
            return
        if not data.record_sampler:
            raise UserError("drift reads log π_s. Set data.record_sampler=true, or leave drift out with --drift=null.")
        target = pl_module.proximal_target
        if target is None:
            return
        in_round = len(data.prompts_of_round(max(1, trainer.max_epochs or 1) - 1))  # the last chunk is the smallest
        measured = min(self.prompts, in_round)
        responses = measured * data.responses_per_prompt
        if target > math.log(responses):
            limit = f"drift.prompts={measured}" if measured < in_round else f"the {in_round} prompts of a round"
            raise UserError(
                f"model.proximal_target={target:g} must be at most log {responses} = {math.log(responses):.1f} nats: "
                f"{responses} responses never give a higher KL(policy‖sampler). Lower it, or raise {limit} or "
                f"data.responses_per_prompt={data.responses_per_prompt}."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_module_of(trainer)
        if not isinstance(pl_module, AnchoredObjective) or not isinstance(data, OnPolicyPairs):
            return
        current, step = data.current_round, trainer.global_step
        groups = self._share(current.groups, trainer)
        if current.step == step:
            self._measure(pl_module, data, groups)
        elif current.trained_at == step:  # the responses are those of an earlier policy
            self._log(pl_module, {"kl_policy_sampler_begin": self._kl_from_sampler(pl_module, data, groups)})
            self._measure(pl_module, data, self._sample_fresh(pl_module, data, groups))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, and set λ, right after the epoch's last step, so that a checkpoint of that step has both."""
        step, every = trainer.global_step, self.every_n_steps
        if trainer.is_last_batch or (every and step and step % every == 0):
            self._measure_now(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_now(trainer, pl_module)  # if the epoch ended before its last batch

    def _measure_now(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure after a step: offline pairs whenever due, rounds at their end."""
        data = data_module_of(trainer)
        if self._measured_at == trainer.global_step or not isinstance(module, AnchoredObjective):
            return
        self._measured_at = trainer.global_step
        if isinstance(data, OfflinePairs):
            by_prompt = (examples for _, examples in groupby(data.train_examples, lambda example: example.source))
            first = [next(examples) for examples in islice(by_prompt, self.prompts)]
            self._measure(module, data, self._sample_fresh(module, data, self._share(first, trainer)))
        if isinstance(data, OnPolicyPairs):
            kl = self._kl_from_sampler(module, data, self._share(data.current_round.groups, trainer))
            self._log(module, {"kl_policy_sampler": kl})
            module.adapt_proximal(kl)

    def _share(self, examples: Sequence[Example], trainer: Trainer) -> list[Example]:
        """This process's share of the measured examples; all of them if there are fewer than processes."""
        some = list(examples[: self.prompts])
        return some[trainer.global_rank :: trainer.world_size] if len(some) >= trainer.world_size else some

    def _sample_fresh(
        self, module: AnchoredObjective, data: PairsDataModule, examples: Sequence[Example]
    ) -> list[Example]:
        """A fresh response to each example's prompt, with log π."""
        policy = module.policy
        assert policy is not None
        longest = max(len(example.prompt_ids) for example in examples)
        sampling = self._sampling(data)
        if policy.positions is not None:  # an example's own response shows that there is room for one
            room = policy.positions - longest
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        request = SampleRequest(
            prompts=[example.prompt_ids for example in examples],
            keys=[("drift", data.seed, example.source) for example in examples],
            count=1,
            sampling=sampling,
            end_ids=data.preference_tokenizer.end_ids(),
        )
        with data.sampling_with(policy, longest + sampling.max_new_tokens) as sampler:
            sampled = sampler.sample_in_turn(policy, request)
        fresh = [
            Example(example.prompt_ids, [responses[0].ids], example.source)
            for example, responses in zip(examples, sampled, strict=True)
        ]
        with data.recorder.able_to_compute(policy):
            logps = data.recorder.logps(policy, fresh)
        return [
            Example(example.prompt_ids, example.response_ids, example.source, sampler_logps=logp)
            for example, logp in zip(fresh, logps, strict=True)
        ]

    def _measure(self, module: AnchoredObjective, data: PairsDataModule, examples: Sequence[Example]) -> None:
        """Measure over all processes' `examples`, responses of the current policy with their log-probabilities."""
        policy, reference = module.policy, module.reference
        assert policy is not None
        assert reference is not None
        recorder = data.recorder
        ours = torch.tensor([example.sampler_logps for example in examples])
        with recorder.able_to_compute(policy), reference.present() as present, recorder.able_to_compute(present):
            from_start = from_reference = ours - torch.tensor(recorder.logps(present.logps, examples))
        if not module.reference_is_start:
            with module.start() as start, recorder.able_to_compute(start):
                from_start = ours - torch.tensor(recorder.logps(start, examples))
        kl_reference, kl_start = (
            torch.tensor(of_all_processes(ratios.flatten().tolist())).mean().item()
            for ratios in (from_reference, from_start)
        )
        values = {
            "kl_policy_reference": kl_reference,
            "kl_policy_start": kl_start,
            "kl_reference_start": kl_start - kl_reference,
        }
        self._log(module, values)
        other = self._sampling(data).described_for(policy.temperature)
        print_field(
            "drift",
            f"KL from reference {kl_reference:z.2f}, start {kl_start:z.2f} nats" + (f", at {other}" if other else ""),
        )

    def _sampling(self, data: PairsDataModule) -> Sampling:
        """How the measured responses are sampled."""
        return data.sampling if isinstance(data, OnPolicyPairs) else self.sampling or Sampling()

    def _kl_from_sampler(self, module: AnchoredObjective, data: OnPolicyPairs, groups: Sequence[Example]) -> float:
        """KL(π‖π_s) over all processes' `groups`."""
        policy = module.policy
        assert policy is not None
        with data.recorder.able_to_compute(policy):
            logps = data.recorder.logps(policy, groups)
        both = of_all_processes([(now, group.sampler_logps) for now, group in zip(logps, groups, strict=True)])
        now, sampled = (torch.tensor(each) for each in zip(*both, strict=True))
        return kl_from_sampler(now, sampled).item()

    def _log(self, module: AnchoredObjective, values: dict[str, float]) -> None:
        for logger in module.trainer.loggers:
            logger.log_metrics(
                {f"drift/{name}": value for name, value in values.items()}, step=module.trainer.global_step
            )
