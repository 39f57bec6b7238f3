"""Held-out prompts: does the policy beat the model it started from, by the training scorer and by judges it never saw?

At the end of training (and, on other prompts, every so many rounds) the policy and the start answer the same prompts,
with the same random streams, so that a policy that has not moved ties with itself. Logged meanwhile:

| metric | formula |
|---|---|
| val/reward | mean reward of the policy's responses |
| val/win_rate, val/win_rate_low, val/win_rate_high | win rate against the start, and its 95 % interval |
| val/win_rate_length_controlled | win rate at equal length (`metrics/win_rate.py`) |
| val/kl_from_start | E_π[log π(y|x) − log π_start(y|x)], nats per response, over the policy's fresh samples |
| val/length | mean number of response tokens |
| val/distinct_2, val/self_bleu | diversity of all the policy's responses (`metrics/diversity.py`) |
| val/seconds | wall-clock time of all this |
| val/reward_NAME, val/win_rate_NAME | the same by each judge |

`summary.json`, at the end: for the training scorer, and nested for each judge, mean rewards and win rates with their
intervals, and what its rewards are made of (a judge's grades: coherence_start, coherence_end, …); then kl_from_start,
distinct_1, distinct_2, self_bleu; under `data` the comparison with the data set's own responses; under `forgetting` the
negative log-likelihood per token of given texts before (nll_start) and after (nll_end), with the interval of the
difference over texts. `held_out/` has it all by prompt, as Parquet.

Every process takes its share of the batches, which are fixed by the prompts, and all get all results: the numbers do
not depend on how many processes there are.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from rich.text import Text as Styled
from transformers import PreTrainedModel

from lit_align.callbacks.base import AlignCallback
from lit_align.console import print_field, print_line
from lit_align.data.batches import Example, record_logps
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Rows
from lit_align.data.sampling import Response, Sampling, check_positions, sample_responses, sampling_batches
from lit_align.data.scorers.base import Scorer, score
from lit_align.errors import UserError
from lit_align.evaluation.held_out import (
    TAKEN,
    Answers,
    Prompts,
    Verdict,
    _answers,
    _one_line,
    encoder_of,
    gather,
    read_prompts,
    share,
)
from lit_align.metrics import WinRateMetric, distinct_n, self_bleu
from lit_align.metrics.win_rate import bootstrap_interval, with_interval
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy
from lit_align.reporting.run_folder import held_out_files, step_of
from lit_align.sharding import gathered


class WinRate(AlignCallback):
    """Win rate against the start on held-out prompts, every so many rounds, at the end, and by `python train.py test`.

    The verdict at the end is printed and written to `summary.json` in the run's folder; by prompt, to `held_out/`.

    Args:
        prompts: Held-out prompts for the end of training: a file, a saved data set or a hub name.
        scorer: Gives rewards; the one that training uses, as a rule.
        judges: Further scorers by name, which training never saw.
        validation: Other held-out prompts, answered during training.
        every: Rounds (or steps) from one answering of them to the next.
        unit: What `every` counts; a round is an epoch.
        own_responses: Compare with the responses that the data sets have beside their prompts, too: of a preference the
            better one.
        forgetting: Held-out texts by name; their negative log-likelihood before and after is reported at the end.
        responses_per_prompt: n, drawn from the policy and from the start.
        sampling: How responses are drawn; None is as the data module draws them.
        batch_size: Responses drawn at once.
        shown: How many prompts are shown with a response before and after.
        seed: Of the random streams, which training never uses.
    """

    option_name = "win_rate"

    def __init__(
        self,
        prompts: str,
        scorer: Scorer,
        *,
        judges: dict[str, Scorer] | None = None,
        validation: str | None = None,
        every: int = 1,
        unit: Literal["round", "step"] = "round",
        own_responses: bool = False,
        forgetting: dict[str, str] | None = None,
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
        if every < 1:
            raise UserError(f"win_rate.every={every} must be at least 1 {unit}.")
        if validation is None and (every, unit) != (1, "round"):
            raise UserError(f"win_rate.every={every} {unit}s has no effect without win_rate.validation.")
        for name in judges or {}:
            if not name.replace("_", "a").isalnum() or TAKEN.fullmatch(name):
                raise UserError(f"win_rate.judges: a judge cannot be called {name!r}. Take another word.")
        self.prompts = prompts
        self.validation = validation
        self.scorers = {"": scorer} | (judges or {})
        self.every = every
        self.unit = unit
        self.own_responses = own_responses
        self.forgetting = forgetting or {}
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.batch_size = batch_size
        self.shown = shown
        self.seed = seed
        self.verdict: Verdict | None = None
        self._read: dict[tuple[str, str], list[tuple[Row, list[int]]]] = {}
        self._prepared: dict[str, Prompts] = {}
        self._last_step = 0

    # --- when ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            raise UserError("win_rate samples from `lightning_module.policy`: train a lit_align objective with it.")
        if self.sampling is None:
            self.sampling = getattr(trainer.datamodule, "sampling", None) or Sampling()  # type: ignore[attr-defined]
        for path in filter(None, [self.prompts, self.validation]):
            self._rows(path)  # a missing file is found now, not after hours
        for path in self.forgetting.values():
            read_rows(path, kind="texts")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prompts that cannot be answered are found now, too."""
        assert isinstance(pl_module, PreferenceObjective)
        assert pl_module.policy is not None
        assert self.sampling is not None
        for path, name in ((self.validation, "held-out"), (self.prompts, "test")):
            if path is not None:
                ids = [ids for _, ids in self._prompts(path, name, pl_module)]
                check_positions(pl_module.policy.positions, ids, self.sampling, path)
        for path in self.forgetting.values():
            self._prompts(path, "forgetting", pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of an earlier run in the same folder, or from behind the checkpoint, nothing stays."""
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for path in held_out_files(trainer.default_root_dir):
                if step_of(path) > trainer.global_step:
                    path.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every == 0 and trainer.global_step > self._last_step
        if self.unit == "step" and due:
            self._validate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.unit == "round" and (trainer.current_epoch + 1) % self.every == 0:
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final_verdict(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final_verdict(trainer, pl_module)

    # --- what ---

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        if self.validation is None:
            return
        self._last_step = trainer.global_step
        began = time.monotonic()
        verdict, _ = self._judge(self.validation, "held-out", module)
        ours = verdict.by_scorer[""]
        values = {"reward": ours["reward_end"]}
        for key in ("win_rate", "win_rate_low", "win_rate_high", "win_rate_length_controlled"):
            values[key] = ours[key]
        for name in filter(None, self.scorers):
            values[f"reward_{name}"] = verdict.by_scorer[name]["reward_end"]
            values[f"win_rate_{name}"] = verdict.by_scorer[name]["win_rate"]
        values |= {"kl_from_start": verdict.kl_from_start, "length": ours["length_end"]}
        values |= {key: verdict.diversity[key] for key in ("distinct_2", "self_bleu")}
        values["seconds"] = time.monotonic() - began
        named = {f"val/{key}": value for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
        module.log_dict(
            named, logger=False, sync_dist=True
        )  # for callbacks that monitor one: checkpoints, early stopping
        self._keep(trainer, verdict, f"validation-{trainer.global_step:06d}")
        kl = f"KL from start {verdict.kl_from_start:.2f} nats"
        print_field("", f"reward {values['reward']:.3f}, win rate {values['win_rate']:.1%}, {kl}")

    def _final_verdict(self, trainer: Trainer, module: LightningModule) -> None:
        self.verdict, forgetting = self._judge(self.prompts, "test", module, texts=self.forgetting)
        if not trainer.is_global_zero:
            return
        verdict = self.verdict
        summary: dict[str, Any] = verdict.by_scorer[""] | verdict.kl | verdict.diversity
        summary |= {"prompts": len(verdict.prompts.ids), "responses_per_prompt": self.responses_per_prompt}
        summary |= {name: verdict.by_scorer[name] for name in filter(None, self.scorers)}
        if data := verdict.against_data:
            summary["data"] = data[""] | {name: data[name] for name in filter(None, self.scorers)}
        if forgetting:
            summary["forgetting"] = forgetting
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._keep(trainer, verdict, "test")
        self._show(verdict, forgetting)

    def _keep(self, trainer: Trainer, verdict: Verdict, name: str) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir, "held_out")
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(verdict.rows()), folder / f"{name}.parquet")

    def _judge(
        self, path: str, name: str, module: LightningModule, texts: dict[str, str] | None = None
    ) -> tuple[Verdict, dict[str, dict[str, float]]]:
        """Answer and score; all processes come here together, in the same order of collective calls.

        Args:
            texts: Files of texts whose likelihood is compared.
        """
        assert isinstance(module, PreferenceObjective)
        policy = module.policy
        assert policy is not None
        start = Policy.load(module.policy_config, module.lora).to(policy.device)
        if path not in self._prepared:
            self._prepared[path] = self._prepare(path, name, start, module)
        prompts = self._prepared[path]
        rows = self._answer(prompts, f"{name} policy", policy.merged_copy(torch.bfloat16), module)
        size = max(1, self.batch_size // self.responses_per_prompt // 4)
        with gathered(policy):
            for places, batch in ((prompts.batches[number], rows[number]) for number in rows):
                examples = [
                    Example(prompts.ids[i], [response.ids for response in row["responses"]], prompts.sources[i])
                    for i, row in zip(places, batch, strict=True)
                ]
                ours = record_logps(policy, policy, examples, size)
                theirs = record_logps(start, start, examples, size)
                for row, mine, started in zip(batch, ours, theirs, strict=True):
                    row |= {"logps": mine, "start_logps": started}
            forgetting = {key: self._forgotten(file, policy, start, module) for key, file in (texts or {}).items()}
        answers = _answers(prompts.batches, gather(module.trainer, rows))

        def compared(other: Answers, name: str) -> dict[str, dict[str, float]]:
            values = {}
            for scorer in self.scorers:
                metric = WinRateMetric(other=name, sync_on_compute=False)  # every process has all of them already
                metric.update(answers.rewards[scorer], other.rewards[scorer], answers.lengths, other.lengths)
                values[scorer] = metric.compute()
                for each, whose in ((other, name), (answers, "end")):
                    for part, grades in each.parts[scorer].items():
                        values[scorer] |= with_interval(f"{part}_{whose}", grades.double().mean(1))
            return values

        assert answers.logps is not None and answers.start_logps is not None  # noqa: PT018
        diversity = {}
        for suffix, texts_of in (("", answers.texts), ("_start", prompts.start.texts)):
            diversity |= {f"distinct_{n}{suffix}": distinct_n(texts_of, n) for n in (1, 2)}
            diversity[f"self_bleu{suffix}"] = self_bleu(texts_of)
        verdict = Verdict(
            prompts=prompts,
            answers=answers,
            by_scorer=compared(prompts.start, "start"),
            against_data=compared(prompts.own, "data") if prompts.own else {},
            kl=with_interval("kl_from_start", (answers.logps - answers.start_logps).mean(1)),
            diversity=diversity,
        )
        return verdict, forgetting

    def _rows(self, path: str) -> Rows:
        """The prompts of a data set; with the responses they have there, each prompt once, if these are asked for."""
        if not self.own_responses:
            return read_rows(path, kind="prompts")
        read = read_rows(path, kind="texts")
        first = {json.dumps(row.prompt): row for row in reversed(read.rows)}
        return replace(read, rows=list(first.values())[::-1])

    def _prompts(self, path: str, name: str, module: PreferenceObjective) -> list[tuple[Row, list[int]]]:
        """The rows of a file with the tokens of their prompts; what is left out is said once."""
        if (path, name) not in self._read:
            rows = read_rows(path, kind="texts") if name == "forgetting" else self._rows(path)
            self._read[path, name] = read_prompts(rows, encoder_of(module), path, name)
        return self._read[path, name]

    def _prepare(self, path: str, name: str, start: Policy, module: PreferenceObjective) -> Prompts:
        encoder = encoder_of(module)
        kept = self._prompts(path, name, module)
        ids = [ids for _, ids in kept]
        batches = sampling_batches([len(each) for each in ids], self.batch_size // self.responses_per_prompt)
        empty = Answers([], {})
        prompts = Prompts(name, [r.prompt for r, _ in kept], ids, [r.source for r, _ in kept], batches, empty, None)
        rows = self._answer(prompts, f"{name} start", start.merged_copy(torch.bfloat16), module)
        answers = _answers(batches, gather(module.trainer, rows))
        own = None
        if self.own_responses:
            responses = [
                [
                    Response(
                        encoder.response(row.responses[0], chat=not isinstance(row.prompt, str)), row.responses[0], True
                    )
                ]
                for row, _ in kept
            ]
            scored = share(
                module.trainer, batches, f"{name} data", lambda places: [{"responses": responses[i]} for i in places]
            )
            self._score(prompts, scored)
            own = _answers(batches, gather(module.trainer, scored))
        return replace(prompts, start=answers, own=own)

    # --- this process's share ---

    def _answer(
        self, prompts: Prompts, name: str, model: PreTrainedModel, module: PreferenceObjective
    ) -> dict[int, list[dict[str, Any]]]:
        """Responses and their rewards, for this process's batches."""
        end_ids = encoder_of(module).end_ids()

        def sample(places: Sequence[int]) -> list[dict[str, Any]]:
            assert self.sampling is not None
            keys = [("held out", self.seed, prompts.sources[i]) for i in places]
            ids = [prompts.ids[i] for i in places]
            n = self.responses_per_prompt
            drawn = sample_responses(model, module.tokenizer, ids, keys, n, self.sampling, end_ids)
            return [{"responses": responses} for responses in drawn]

        rows = share(module.trainer, prompts.batches, name, sample)
        self._score(prompts, rows)
        return rows

    def _score(self, prompts: Prompts, rows: dict[int, list[dict[str, Any]]]) -> None:
        """Put `rewards` into the rows, by scorer."""
        for name, scorer in self.scorers.items():
            for number, batch in rows.items():
                asked = [
                    (prompts.texts[i], response.text)
                    for i, row in zip(prompts.batches[number], batch, strict=True)
                    for response in row["responses"]
                ]
                scores = score(scorer, [prompt for prompt, _ in asked], [text for _, text in asked])
                for key, values in {"": scores, **scores.parts}.items():
                    given = iter(values)
                    for row in batch:
                        drawn = [next(given) for _ in row["responses"]]
                        row.setdefault("rewards" if key == "" else "parts", {})[name, key] = drawn
            scorer.release()

    def _forgotten(self, path: str, policy: Policy, start: Policy, module: PreferenceObjective) -> dict[str, float]:
        """Negative log-likelihood per token of a file's texts, under the start and the policy."""
        encoder = encoder_of(module)
        examples = []
        for row, prompt in self._prompts(path, "forgetting", module):
            response = encoder.response(row.responses[0], chat=not isinstance(row.prompt, str))
            examples.append(Example(prompt, [response], row.source))
        lengths = [len(e.prompt_ids) + len(e.response_ids[0]) for e in examples]
        batches = sampling_batches(lengths, max(1, self.batch_size // 4))

        def measure(places: Sequence[int]) -> list[tuple[float, float]]:
            some = [examples[i] for i in places]
            both = (record_logps(model, model, some, len(some)) for model in (start, policy))
            return [(-before[0], -after[0]) for before, after in zip(*both, strict=True)]

        made = gather(module.trainer, share(module.trainer, batches, "forgetting", measure))
        places = [i for places in batches for i in places]
        nll = torch.tensor([values for number in range(len(batches)) for values in made[number]], dtype=torch.float64)
        tokens = torch.tensor([len(examples[i].response_ids[0]) for i in places], dtype=torch.float64)
        before, after = (nll.sum(0) / tokens.sum()).tolist()
        change = (nll[:, 1] - nll[:, 0]) / tokens.mean()
        low, high = bootstrap_interval(change)
        return {"nll_start": before, "nll_end": after, "change": after - before, "change_low": low, "change_high": high}

    # --- what is shown ---

    def _show(self, verdict: Verdict, forgetting: dict[str, dict[str, float]]) -> None:
        prompts = verdict.prompts
        table = Table(title=f"Against the start, on {len(prompts.ids)} held-out prompts", title_justify="left")
        for column in ("scorer", "reward", "win rate", "95 % interval", "at equal length"):
            table.add_column(column, justify="left" if column == "scorer" else "right")
        compared = {"start": verdict.by_scorer, "data": verdict.against_data}
        for other, by_scorer in compared.items():
            for name, values in by_scorer.items():
                table.add_row(
                    (name or "training scorer") + ("" if other == "start" else ", against the data"),
                    f"{values[f'reward_{other}']:.3f} → {values['reward_end']:.3f}",
                    f"{values['win_rate']:.1%}",
                    f"{values['win_rate_low']:.1%} – {values['win_rate_high']:.1%}",
                    f"{values['win_rate_length_controlled']:.1%}",
                )
        print_line()
        print_line(table)
        ours, varied = verdict.by_scorer[""], verdict.diversity
        print_line(f"KL(policy‖start) {verdict.kl_from_start:.2f} nats per response")
        print_line(f"length {ours['length_start']:.1f} → {ours['length_end']:.1f} tokens")
        print_line(f"distinct pairs of words {varied['distinct_2_start']:.1%} → {varied['distinct_2']:.1%}")
        for name, values in forgetting.items():
            print_line(
                f"forgetting {name}: {values['nll_start']:.4f} → {values['nll_end']:.4f} nats per token "
                f"({values['change_low']:+.4f} to {values['change_high']:+.4f})"
            )
        print_line()
        for place in range(min(self.shown, len(prompts.ids))):
            text = prompts.texts[place]
            text = text if isinstance(text, str) else text[-1]["content"]
            print_line(Styled(("… " if "\n" in text.strip() else "") + text.strip().rpartition("\n")[2], style="bold"))
            before, after = prompts.start.responses[place][0], verdict.answers.responses[place][0]
            print_line(Styled("  before  ", style="dim").append(_one_line(before), style="not dim"))
            print_line(Styled("  after   ", style="dim").append(_one_line(after), style="not dim"))
