"""Held-out prompts: does the policy beat the model it started from, by the training scorer and by judges it never saw?

At the end of training (and, on other prompts, after each round) the policy and the start answer the same prompts,
with the same random streams, so that a policy that has not moved ties with itself. Logged after each round:

| metric | formula |
|---|---|
| val/reward | mean reward of the policy's responses |
| val/win_rate | win rate against the start (`metrics/win_rate.py`) |
| val/kl_from_start | E_π[log π(y|x) − log π_start(y|x)], nats per response, over the policy's fresh samples |
| val/length | mean number of response tokens |
| val/reward_NAME, val/win_rate_NAME | the same by each judge |
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from rich.text import Text as Styled
from torch import Tensor

from lit_align.console import phase, say, tell
from lit_align.data.collate import Encoder, Example, record_logps
from lit_align.data.formats import Text, read_rows
from lit_align.data.sampling import Response, Sampling, sample_responses, sampling_batches
from lit_align.data.scorers import Scorer, score
from lit_align.errors import UserError
from lit_align.metrics import WinRateMetric
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, and what the start answers to them."""

    name: str
    texts: list[Text]
    ids: list[list[int]]
    sources: list[str]
    start: list[list[Response]]
    start_rewards: dict[str, Tensor]  # [P, n] by scorer


@dataclass(frozen=True)
class Verdict:
    """The policy on held-out prompts, against the start."""

    responses: list[list[Response]]
    by_scorer: dict[str, dict[str, float]]
    kl_from_start: float  # nats per response

    @property
    def length(self) -> float:
        """Mean number of response tokens."""
        lengths = [len(response.ids) for drawn in self.responses for response in drawn]
        return sum(lengths) / len(lengths)


class WinRate(Callback):
    """Win rate against the start on held-out prompts, after each round, at the end, and by `python train.py test`.

    The verdict at the end is printed and written to `summary.json` in the run's folder.

    Args:
        prompts: Held-out prompts for the end of training: a file, a saved data set or a hub name.
        scorer: Gives rewards; the one that training uses, as a rule.
        judges: Further scorers by name, which training never saw.
        validation: Other held-out prompts, answered after each round.
        responses_per_prompt: n, drawn from the policy and from the start.
        sampling: How responses are drawn; None is as the data module draws them.
        batch_size: Responses drawn at once.
        shown: How many prompts are shown with a response before and after.
        seed: Of the random streams, which training never uses.
    """

    def __init__(
        self,
        prompts: str,
        scorer: Scorer,
        *,
        judges: dict[str, Scorer] | None = None,
        validation: str | None = None,
        responses_per_prompt: int = 4,
        sampling: Sampling | None = None,
        batch_size: int = 128,
        shown: int = 5,
        seed: int = 0,
    ):
        if responses_per_prompt < 1 or batch_size < responses_per_prompt:
            raise UserError(
                f"win_rate: responses_per_prompt={responses_per_prompt} must be at least 1 and at most "
                f"batch_size={batch_size}."
            )
        self.prompts = prompts
        self.validation = validation
        self.scorers = {"": scorer} | (judges or {})
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.batch_size = batch_size
        self.shown = shown
        self.seed = seed
        self.verdict: Verdict | None = None
        self._read: dict[str, Prompts] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            raise UserError("win_rate samples from `lightning_module.policy`: train a lit_align objective with it.")
        if self.sampling is None:
            self.sampling = getattr(trainer.datamodule, "sampling", None) or Sampling()  # type: ignore[attr-defined]
        for path in filter(None, [self.prompts, self.validation]):
            read_rows(path, kind="prompts")  # a missing file is found now, not after hours

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation is None:
            return
        if trainer.is_global_zero:
            verdict = self._judge(self.validation, "held-out", pl_module)
            values = {"reward": verdict.by_scorer[""]["reward_end"], "win_rate": verdict.by_scorer[""]["win_rate"]}
            for name in filter(None, self.scorers):
                values |= {
                    f"{key}_{name}": verdict.by_scorer[name][key.replace("reward", "reward_end")]
                    for key in list(values)[:2]
                }
            values |= {"kl_from_start": verdict.kl_from_start, "length": verdict.length}
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{key}": value for key, value in values.items()}, step=trainer.global_step)
            kl = f"KL from start {verdict.kl_from_start:.2f} nats"
            tell("", f"reward {values['reward']:.3f}, win rate {values['win_rate']:.1%}, {kl}")
        trainer.strategy.barrier("validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final_verdict(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final_verdict(trainer, pl_module)

    def _final_verdict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.verdict = self._judge(self.prompts, "test", pl_module)
            summary = dict(self.verdict.by_scorer[""].items())
            summary["kl_from_start"] = self.verdict.kl_from_start
            summary |= {name: self.verdict.by_scorer[name] for name in filter(None, self.scorers)}  # type: ignore[dict-item]
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            self._show(self._read[self.prompts], self.verdict)
        trainer.strategy.barrier("test")

    def _judge(self, path: str, name: str, module: LightningModule) -> Verdict:
        assert isinstance(module, PreferenceObjective)
        assert module.policy is not None
        start = Policy.load(module.policy_config, module.lora).to(module.policy.device)
        if path not in self._read:
            self._read[path] = self._prepare(path, name, start, module)
        prompts = self._read[path]
        responses = self._answers(prompts.ids, prompts.sources, f"{name} policy", module.policy, module)
        by_scorer = {}
        for scorer_name, scorer in self.scorers.items():
            metric = WinRateMetric()
            metric.update(self._rewards(scorer, prompts.texts, responses), prompts.start_rewards[scorer_name])
            by_scorer[scorer_name] = metric.compute()
            scorer.release()

        examples = [
            Example(ids, [response.ids for response in drawn], source)
            for ids, drawn, source in zip(prompts.ids, responses, prompts.sources, strict=True)
        ]
        size = max(1, self.batch_size // self.responses_per_prompt // 4)
        ours = torch.tensor(record_logps(module.policy, module.policy, examples, size))
        theirs = torch.tensor(record_logps(start, start, examples, size))
        return Verdict(responses, by_scorer, (ours - theirs).mean().item())

    def _prepare(self, path: str, name: str, start: Policy, module: PreferenceObjective) -> Prompts:
        encoder = self._encoder(module)
        read = [(row, encoder.prompt(row.prompt, row.source)) for row in read_rows(path, kind="prompts")]
        kept = [(row, ids) for row, ids in read if ids is not None]
        texts = [row.prompt for row, _ in kept]
        ids = [ids for _, ids in kept]
        sources = [row.source for row, _ in kept]
        responses = self._answers(ids, sources, f"{name} start", start, module)
        rewards = {name: self._rewards(scorer, texts, responses) for name, scorer in self.scorers.items()}
        return Prompts(name, texts, ids, sources, responses, rewards)

    def _encoder(self, module: PreferenceObjective) -> Encoder:
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(encoder := getattr(data, "encoder", None), Encoder):
            return encoder
        return Encoder(module.tokenizer, max_prompt_length=1 << 20, max_response_length=1 << 20)

    def _answers(
        self, ids: list[list[int]], sources: list[str], name: str, policy: Policy, module: PreferenceObjective
    ) -> list[list[Response]]:
        assert self.sampling is not None
        model = policy.merged_copy(torch.bfloat16)
        n = self.responses_per_prompt
        end_ids = self._encoder(module).end_ids()
        answers: list[list[Response]] = [[] for _ in ids]
        with phase(name, len(ids), "prompts") as bar:
            for places in sampling_batches([len(prompt) for prompt in ids], self.batch_size // n):
                keys = [("held out", self.seed, sources[i]) for i in places]
                drawn = sample_responses(
                    model, module.tokenizer, [ids[i] for i in places], keys, n, self.sampling, end_ids
                )
                for place, responses in zip(places, drawn, strict=True):
                    answers[place] = responses
                bar.advance(len(places))
        return answers

    def _rewards(self, scorer: Scorer, texts: Sequence[Text], responses: list[list[Response]]) -> Tensor:
        """Rewards of each prompt's responses, [P, n]."""
        prompts = [text for text, drawn in zip(texts, responses, strict=True) for _ in drawn]
        rewards = score(scorer, prompts, [response.text for drawn in responses for response in drawn])
        return torch.tensor(rewards).view(len(texts), -1)

    def _show(self, prompts: Prompts, verdict: Verdict) -> None:
        table = Table(title=f"Against the start, on {len(prompts.ids)} held-out prompts", title_justify="left")
        for column in ("scorer", "reward", "win rate", "95 % interval"):
            table.add_column(column, justify="left" if column == "scorer" else "right")
        for name, values in verdict.by_scorer.items():
            table.add_row(
                name or "training scorer",
                f"{values['reward_start']:.3f} → {values['reward_end']:.3f}",
                f"{values['win_rate']:.1%}",
                f"{values['win_rate_low']:.1%} – {values['win_rate_high']:.1%}",
            )
        say()
        say(table)
        say(f"KL(policy‖start) {verdict.kl_from_start:.2f} nats per response\n")
        for place in range(min(self.shown, len(prompts.ids))):
            text = prompts.texts[place]
            text = text if isinstance(text, str) else text[-1]["content"]
            say(Styled(("… " if "\n" in text.strip() else "") + text.strip().rpartition("\n")[2], style="bold"))
            say(Styled("  before  ", style="dim").append(_one_line(prompts.start[place][0]), style="not dim"))
            say(Styled("  after   ", style="dim").append(_one_line(verdict.responses[place][0]), style="not dim"))


def _one_line(response: Response) -> str:
    return " ".join(response.text.split()) + ("" if response.finished else " …")
