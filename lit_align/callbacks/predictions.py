"""`python train.py predict`: the policy's responses to given prompts, as JSONL or Parquet.

    python train.py predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt \\
        --predictions.prompts=FILE --predictions.out=responses.jsonl

One row per prompt: source, prompt, responses, and their scores where a scorer is given. Each process answers its share
of the batches; the result does not depend on the number of processes.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback
from lit_align.console import print_line
from lit_align.data.formats.read import read_rows
from lit_align.data.sampling import Sampling, sampling_batches
from lit_align.data.scorers.base import Scorer
from lit_align.errors import UserError, check_number
from lit_align.evaluation.answering import (
    Answering,
    gather_in_order,
    sampling_of,
    score_share,
    tokenize_prompts,
    tokenizer_of,
)
from lit_align.files import write_whole
from lit_align.objectives import PreferenceObjective


class Predictions(AlignCallback):
    """Answers prompts with the policy and writes the responses to a file, at `predict`.

    Args:
        prompts: A file, a saved data set or a hub name with prompts.
        out: File to write, .jsonl or .parquet; a name without a folder is written into the run's folder.
        scorer: Scores each response.
        responses_per_prompt: Responses sampled for each prompt.
        sampling: How responses are sampled; None takes the data module's options.
        batch_size: Responses sampled at once.
        seed: Of the random streams.
    """

    option_name = "predictions"

    def __init__(
        self,
        prompts: str,
        out: str = "predictions.jsonl",
        *,
        scorer: Scorer | None = None,
        responses_per_prompt: int = 1,
        sampling: Sampling | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ):
        if Path(out).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"predictions.out={out!r}: the name must end in .jsonl or .parquet.")
        if responses_per_prompt < 1 or batch_size < responses_per_prompt:
            raise UserError(
                f"predictions: responses_per_prompt={responses_per_prompt} must be at least 1 and at most "
                f"batch_size={batch_size}."
            )
        check_number("predictions.seed", seed, least=0)
        self.prompts = prompts
        self.out = out
        self.scorer = scorer
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceObjective) or not pl_module.data_needs().gives_logps:
            raise UserError(f"predict: {type(pl_module).__name__} gives no responses; predict with a language model.")
        assert pl_module.policy is not None
        rows = read_rows(self.prompts, kind="prompts")
        prompts = tokenize_prompts(rows, tokenizer_of(pl_module), self.prompts, "predict")
        answering = Answering(("predict", self.seed), self.responses_per_prompt, self.sampling or sampling_of(trainer))
        batches = sampling_batches(prompts.lengths, self.batch_size // self.responses_per_prompt)
        model = pl_module.policy.merged_copy(torch.bfloat16)
        share = answering.respond(pl_module, model, prompts, batches, "predict")
        responses = gather_in_order(trainer, batches, share)
        predicted: list[dict[str, Any]] = [
            {"source": row.source, "prompt": row.prompt, "responses": [response.text for response in group]}
            for row, group in zip(prompts.rows, responses, strict=True)
        ]
        if self.scorer is not None:
            scores = gather_in_order(trainer, batches, score_share(self.scorer, prompts, batches, share))
            for row, scored in zip(predicted, scores, strict=True):
                row["scores"] = scored.rewards
        if trainer.is_global_zero:
            self.write(predicted, Path(trainer.default_root_dir))

    def write(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Write one row per prompt."""
        path = Path(self.out) if Path(self.out).parent != Path() else folder / self.out
        if path.suffix == ".parquet":
            write_whole(path, lambda beside: pq.write_table(pa.Table.from_pylist(rows), beside))
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(path, lambda beside: beside.write_text(lines, encoding="utf-8", errors="replace"))
        print_line(f"responses  {path} ({len(rows)} prompts × {self.responses_per_prompt})")
