"""How far the policy has drifted: from its reference, from where it started, from the sampler of its pairs.

Training pairs are selected (the best and the worst of K), so they estimate no KL. These are over unselected responses:

| metric | formula |
|---|---|
| drift/kl_policy_reference | E_π[log π(y|x) − log π_ref(y|x)], nats per response |
| drift/kl_policy_start | E_π[log π(y|x) − log π_start(y|x)] |
| drift/kl_reference_start | E_π[log π_ref(y|x) − log π_start(y|x)], the difference of the two |
| drift/kl_policy_sampler | mean of w log w − w + 1 over all K responses y ~ π_s, w = π(y|x)/π_s(y|x) over its mean |

Of on-policy rounds the first three are measured where a round begins (its responses are the policy's own) and the last
where it ends, which is also what λ may follow (model.proximal_target). Of offline pairs fresh responses are drawn for
the purpose, and there is no sampler. Expectations are means over the prompts asked about, each with its standard error
of a few tenths of a nat: raise `prompts` for closer ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import print_field
from lit_align.data.base import PairsDataModule
from lit_align.data.batches import Example
from lit_align.data.offline_pairs import OfflinePairs
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.sampling import Sampling, sample_responses
from lit_align.errors import UserError
from lit_align.metrics import kl_from_sampler
from lit_align.objectives import AnchoredObjective
from lit_align.policy import Policy
from lit_align.sharding import gathered


class Drift(AlignCallback):
    """Logs the divergences between policy, reference, start and sampler.

    Args:
        prompts: How many prompts are asked about, of all processes together.
        every_n_steps: For offline pairs: optimizer steps from one measurement to the next; None is once per epoch.
        sampling: For offline pairs: how responses are drawn.
    """

    option_name = "drift"
    order = Order.MEASURE
    in_dry_run = DryRun.ACT

    def __init__(self, prompts: int = 16, every_n_steps: int | None = None, sampling: Sampling | None = None):
        if prompts < 1:
            raise UserError(f"drift.prompts={prompts} must be at least 1; --drift=null leaves the measurement out.")
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"drift.every_n_steps={every_n_steps} must be at least 1, or null for once per epoch.")
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.sampling = sampling
        self._measured_at = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = -1
        data = _data(trainer)
        if not isinstance(data, OnPolicyPairs):
            return
        for name, value in {"every_n_steps": self.every_n_steps, "sampling": self.sampling}.items():
            if value is not None:
                raise UserError(
                    f"drift.{name} has no effect with OnPolicyPairs, whose rounds are measured. Leave it out."
                )
        if not isinstance(pl_module, AnchoredObjective):
            return
        if not data.record_sampler:
            raise UserError("drift reads log π_s: set data.record_sampler=true, or leave drift out with --drift=null.")
        target = pl_module.proximal_target
        if target is None:
            return
        in_round = len(data._chosen_prompts(max(1, trainer.max_epochs or 1) - 1))  # of chunks the last is the smallest
        asked = min(self.prompts, in_round)
        responses = (asked // trainer.world_size or asked) * data.responses_per_prompt
        if target > math.log(responses):
            limit = f"drift.prompts={asked}" if asked < in_round else f"the {in_round} prompts of a round"
            raise UserError(
                f"model.proximal_target={target:g}: of {responses} responses, KL(policy‖sampler) is never estimated "
                f"above log {responses} = {math.log(responses):.1f} nats. Lower it, or raise {limit} or "
                f"data.responses_per_prompt={data.responses_per_prompt}."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = _data(trainer)
        if isinstance(pl_module, AnchoredObjective) and isinstance(data, OnPolicyPairs) and data.is_fresh:
            self._measure(pl_module, data, self._share(data.groups, trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An epoch is measured, and λ set, behind its last step already: a checkpoint of that step is to have both."""
        if trainer.is_last_batch or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._measure_now(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_now(trainer, pl_module)  # of an epoch that ended before its last batch

    def _measure_now(self, trainer: Trainer, module: LightningModule) -> None:
        """What is measured behind a step; of rounds, at their end alone."""
        data = _data(trainer)
        if self._measured_at == trainer.global_step or not isinstance(module, AnchoredObjective):
            return
        self._measured_at = trainer.global_step
        if isinstance(data, OfflinePairs):
            by_prompt = {example.source: example for example in data.train_examples}
            self._measure(module, data, self._draw(module, data, self._share(list(by_prompt.values()), trainer)))
        if isinstance(data, OnPolicyPairs):
            self._measure_from_sampler(module, data, self._share(data.groups, trainer))

    def _share(self, examples: Sequence[Example], trainer: Trainer) -> list[Example]:
        """This process's share of the examples asked about; all of them, where they are fewer than processes."""
        some = list(examples[: self.prompts])
        return some[trainer.global_rank :: trainer.world_size] if len(some) >= trainer.world_size else some

    def _draw(self, module: AnchoredObjective, data: PairsDataModule, examples: Sequence[Example]) -> list[Example]:
        """A fresh response to each example's prompt, with log π."""
        policy = module.policy
        assert policy is not None
        model = policy.merged_copy(torch.bfloat16)
        prompts = [example.prompt_ids for example in examples]
        keys = [("drift", data.seed, example.source) for example in examples]
        drawn = sample_responses(
            model, policy.tokenizer, prompts, keys, 1, self.sampling or Sampling(), data.encoder.end_ids()
        )
        fresh = [
            Example(example.prompt_ids, [responses[0].ids], example.source)
            for example, responses in zip(examples, drawn, strict=True)
        ]
        with gathered(policy):
            logps = data.recorder.logps(policy, fresh)
        return [
            Example(example.prompt_ids, example.response_ids, example.source, sampler_logps=logp)
            for example, logp in zip(fresh, logps, strict=True)
        ]

    def _measure(self, module: AnchoredObjective, data: PairsDataModule, examples: Sequence[Example]) -> None:
        """`examples` hold responses of the present policy, with its log-probabilities."""
        policy, reference = module.policy, module.reference
        assert policy is not None
        assert reference is not None
        ours = torch.tensor([example.sampler_logps for example in examples])
        start = Policy.load(module.policy_config, module.lora).to(policy.device).eval()
        from_start = ours - torch.tensor(data.recorder.logps(start, examples))
        with gathered(policy), reference.present() as present, gathered(present):
            from_reference = ours - torch.tensor(data.recorder.logps(present.logps, examples))
        kl_reference, kl_start = from_reference.mean().item(), from_start.mean().item()
        values = {
            "kl_policy_reference": kl_reference,
            "kl_policy_start": kl_start,
            "kl_reference_start": kl_start - kl_reference,
        }
        self._log(module, values)
        print_field(
            "drift", f"KL(policy‖reference) {kl_reference:.2f}, KL(policy‖start) {kl_start:.2f} nats per response"
        )

    def _measure_from_sampler(self, module: AnchoredObjective, data: OnPolicyPairs, groups: Sequence[Example]) -> None:
        policy = module.policy
        assert policy is not None
        with gathered(policy):
            logps = torch.tensor(data.recorder.logps(policy, groups))
        kl = kl_from_sampler(logps, torch.tensor([group.sampler_logps for group in groups])).item()
        self._log(module, {"kl_policy_sampler": kl})
        module.adapt_proximal(kl)

    def _log(self, module: AnchoredObjective, values: dict[str, float]) -> None:
        mine = torch.tensor(list(values.values()), device=module.device)
        means: Any = module.trainer.strategy.reduce(mine, reduce_op="mean")
        logged = {f"drift/{name}": mean for name, mean in zip(values, means.tolist(), strict=True)}
        for logger in module.trainer.loggers:
            logger.log_metrics(logged, step=module.trainer.global_step)


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
