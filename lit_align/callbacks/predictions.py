"""`python train.py predict`: the policy's responses to given prompts, as JSONL or Parquet.

    python train.py predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt \\
        --predictions.prompts=FILE --predictions.out=responses.jsonl

One row per prompt: source, prompt, responses, and their scores where a scorer is given. With `format`, AlpacaEval or
MT-Bench reads the file. Each process answers its share of the batches; the result does not depend on the number of
processes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback
from lit_align.console import print_line
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Rows, Text
from lit_align.data.given_rows import reading_rows
from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import sampling_copy
from lit_align.data.sampling import Response, Sampling, check_positions, sampling_batches
from lit_align.data.scorers.base import GroupScores, Scorer
from lit_align.errors import UserError, amount, check_number
from lit_align.evaluation.answering import (
    Answering,
    TokenizedPrompts,
    check_batches,
    sampling_of,
    score_share,
    tokenize_prompts,
    tokenizer_of,
)
from lit_align.evaluation.benchmarks import Benchmark, answers_file, ask, read_questions
from lit_align.evaluation.shares import Share, gather_in_order
from lit_align.files import write_whole
from lit_align.objectives import PreferenceObjective

ROWS_AT_ONCE = 256
"""Rows of Parquet that are written together."""


@dataclass(frozen=True)
class Predicted:
    """The rows of a file of responses; a few are in memory at a time."""

    prompts: Sequence[Row]
    responses: Sequence[list[Response]]
    scores: Sequence[GroupScores] | None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        scores = repeat(None) if self.scores is None else self.scores
        for row, group, scored in zip(self.prompts, self.responses, scores):  # noqa: B905  # `repeat` has no end
            values = {"source": row.source, "prompt": row.prompt, "responses": [response.text for response in group]}
            yield values if scored is None else values | {"scores": scored.scores}

    def write_lines(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self)

    def write_parquet(self, path: Path) -> None:
        """The columns are those of all rows: messages of a chat may have keys that others do not have.

        A key whose value is not text, such as tool_calls, holds it as JSON: its objects have no columns in common.
        """
        schemas = [pa.Table.from_pylist(some).schema for some in self._batches()]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for some in self._batches():
                writer.write_table(pa.Table.from_pylist(some, schema))

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        rest = iter(self)
        while some := list(islice(rest, ROWS_AT_ONCE)):
            yield [row | {"prompt": _of_texts(row["prompt"])} for row in some]


def _of_texts(prompt: Text) -> Text:
    """A prompt whose messages hold nothing but text."""
    if isinstance(prompt, str):
        return prompt
    return [
        {
            key: value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in message.items()
        }
        for message in prompt
    ]


class Predictions(AlignCallback):
    """Answers prompts with the policy and writes the responses to a file, at `predict`.

    Args:
        prompts: A file, a saved data set or a hub name with prompts.
        out: File to write, .jsonl or .parquet (.json for AlpacaEval); a name without a folder is written into the run's
            folder.
        format: rows; or the answers of alpaca_eval (from its rows with `instruction`) or mt_bench (from its
            question.jsonl, turn by turn).
        name: The model's name in a benchmark's tables; None is the name of the run's folder.
        scorer: Scores each response.
        responses_per_prompt: Responses sampled for each prompt.
        sampling: How responses are sampled; None takes the data module's options.
        columns: Source of each column, as in data.columns.
        ignore_columns: Columns that are left out, as in data.ignore_columns.
        batch_size: Responses sampled at once.
        seed: Seed of the random streams.
    """

    option_name = "predictions"
    argument_conversions = reading_rows("prompts")

    def __init__(
        self,
        prompts: str,
        out: str = "predictions.jsonl",
        *,
        format: Literal["rows", "alpaca_eval", "mt_bench"] = "rows",
        name: str | None = None,
        scorer: Scorer | None = None,
        responses_per_prompt: int = 1,
        sampling: Sampling | None = None,
        columns: dict[str, str] | None = None,
        ignore_columns: list[str] | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ):
        endings = {"alpaca_eval": (".json",), "mt_bench": (".jsonl",)}.get(format, (".jsonl", ".parquet"))
        if Path(out).suffix not in endings:
            raise UserError(
                f"predictions.out={out!r}: with format={format}, its name must end in {' or '.join(endings)}. Rename "
                "it."
            )
        if format == "rows" and name is not None:
            raise UserError(f"predictions.name={name} has no effect because format=rows. Leave it out.")
        if format != "rows" and scorer is not None:
            raise UserError(
                f"predictions.scorer has no effect because the file of format={format} has no scores. Leave it out."
            )
        for option, value in (("columns", columns), ("ignore_columns", ignore_columns)):
            if format != "rows" and value is not None:
                raise UserError(f"predictions.{option} has no effect on the rows of format={format}. Leave it out.")
        check_batches("predictions", responses_per_prompt, batch_size)
        check_number("predictions.seed", seed, least=0)
        self.prompts = prompts
        self.out = out
        self.format: Literal["rows", "alpaca_eval", "mt_bench"] = format
        self.name = name
        self.scorer = scorer
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.columns = columns
        self.ignore_columns = ignore_columns
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        gives_responses = isinstance(pl_module, PreferenceObjective) and pl_module.data_needs().gives_logps
        if stage == "predict" and not gives_responses:
            raise UserError(f"predict: {type(pl_module).__name__} gives no responses. Predict with a language model.")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PreferenceObjective)
        assert pl_module.policy is not None
        with sampling_copy(pl_module.policy) as sampler:
            self._predict(trainer, pl_module, sampler)

    def _predict(self, trainer: Trainer, module: PreferenceObjective, sampler: Sampler) -> None:
        folder = Path(trainer.default_root_dir)
        if self.format != "rows":
            text = self._answers(self.format, module, sampler, self.name or folder.resolve().name)
            if trainer.is_global_zero:
                self._write(lambda path: path.write_text(text, encoding="utf-8", errors="replace"), folder)
            return
        rows = read_rows(self.prompts, kind="prompts", columns=self.columns, ignore_columns=self.ignore_columns or ())
        prompts, batches, share = self._respond(
            module, sampler, rows, ("predict", self.seed), self.responses_per_prompt
        )
        responses = gather_in_order(trainer, batches, share)
        self._print_cut(responses)
        scores = None
        if self.scorer is not None:
            scores = gather_in_order(trainer, batches, score_share(self.scorer, prompts, batches, share))
        if trainer.is_global_zero:
            self.write(Predicted(prompts.rows, responses, scores), folder)

    def _respond(
        self, module: PreferenceObjective, sampler: Sampler, rows: Rows, stream: tuple[str, int], count: int
    ) -> tuple[TokenizedPrompts, list[list[int]], Share[list[Response]]]:
        """The tokenized prompts, their batches, and `count` responses to each prompt of this process's batches."""
        prompts = tokenize_prompts(rows, tokenizer_of(module), self.prompts, "predict")
        batches = sampling_batches(prompts.lengths, self.batch_size // count)
        answering = Answering(module, stream, count, self.sampling or sampling_of(module.trainer))
        assert module.policy is not None
        check_positions(module.policy.positions, max(prompts.lengths), answering.sampling, self.prompts)
        return prompts, batches, answering.respond_with(sampler, module.policy, prompts, batches, "predict")

    def _answers(self, benchmark: Benchmark, module: PreferenceObjective, sampler: Sampler, name: str) -> str:
        """The content of a benchmark's file of answers."""

        def respond(rows: Rows, turn: int, count: int) -> list[list[str]]:
            prompts, batches, share = self._respond(module, sampler, rows, (f"predict turn {turn}", self.seed), count)
            if len(prompts.rows) < len(rows):
                raise UserError(
                    f"{self.prompts}: {amount(len(rows) - len(prompts.rows), 'questions')} too long, and a benchmark "
                    "needs an answer to each. Raise data.max_prompt_length, or use data.long_prompts=truncate_left."
                )
            responses = gather_in_order(module.trainer, batches, share)
            self._print_cut(responses)
            return [[response.text for response in group] for group in responses]

        questions = read_questions(self.prompts, benchmark)
        is_chat = bool(module.tokenizer.chat_template)
        answers = ask(questions, self.responses_per_prompt, is_chat, respond)
        return answers_file(questions, answers, benchmark, name)

    def _print_cut(self, responses: Sequence[Sequence[Response]]) -> None:
        """Print how many responses are cut at the longest length, if any is."""
        finished = [response.finished for group in responses for response in group]
        if cut := finished.count(False):
            print_line(
                f"cut        {cut} of {amount(len(finished), 'responses')}, at predictions.sampling.max_new_tokens; "
                "raise it for whole ones"
            )

    def write(self, predicted: Predicted, folder: Path) -> None:
        """Write the rows, as lines or as Parquet."""
        self._write(predicted.write_lines if Path(self.out).suffix == ".jsonl" else predicted.write_parquet, folder)

    def _write(self, write: Callable[[Path], object], folder: Path) -> None:
        path = Path(self.out) if os.path.dirname(self.out) else folder / self.out
        write_whole(path, write)
        print_line(f"responses  {path}")
