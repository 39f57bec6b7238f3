"""`python train.py predict`: the policy's responses to given prompts, as JSONL or Parquet.

    python train.py predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt \\
        --predictions.prompts=FILE --predictions.out=responses.jsonl

One row per prompt: source, prompt, responses, and their scores where a scorer is given. Every process answers its share
of the batches; the result does not depend on how many there are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback
from lit_align.console import print_line
from lit_align.data.formats.read import read_rows
from lit_align.data.sampling import Sampling, in_order, sample_responses, sampling_batches
from lit_align.data.scorers.base import Scorer, score
from lit_align.errors import UserError
from lit_align.evaluation.held_out import encoder_of, gather, read_prompts, share
from lit_align.objectives import PreferenceObjective


class Predictions(AlignCallback):
    """Answers prompts with the policy and writes the responses to a file, at `predict`.

    Args:
        prompts: A file, a saved data set or a hub name with prompts.
        out: File to write, .jsonl or .parquet; without a folder in its name it goes into the run's.
        scorer: Gives each response a score, if there is one.
        responses_per_prompt: Responses drawn for each prompt.
        sampling: How responses are drawn; None is as the data module draws them.
        batch_size: Responses drawn at once.
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
        self.prompts = prompts
        self.out = out
        self.scorer = scorer
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceObjective) or pl_module.value != "logp":
            raise UserError(f"predict: {type(pl_module).__name__} gives no responses; predict with a language model.")
        module = pl_module
        assert module.policy is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sampling = self.sampling or getattr(data, "sampling", None) or Sampling()
        encoder = encoder_of(module)
        asked = read_prompts(read_rows(self.prompts, kind="prompts"), encoder, self.prompts, "predict")
        n = self.responses_per_prompt
        batches = sampling_batches([len(ids) for _, ids in asked], self.batch_size // n)
        model = module.policy.merged_copy(torch.bfloat16)

        def answer(places: Sequence[int]) -> list[dict[str, Any]]:
            rows, ids = zip(*(asked[i] for i in places), strict=True)
            keys = [("predict", self.seed, row.source) for row in rows]
            drawn = sample_responses(model, module.tokenizer, ids, keys, n, sampling, encoder.end_ids())
            made = [
                {"source": row.source, "prompt": row.prompt, "responses": [response.text for response in responses]}
                for row, responses in zip(rows, drawn, strict=True)
            ]
            if self.scorer is not None:
                flat = [text for each in made for text in each["responses"]]
                scores = score(self.scorer, [row.prompt for row in rows for _ in range(n)], flat)
                for number, each in enumerate(made):
                    each["scores"] = scores[number * n : number * n + n]
            return made

        done = gather(trainer, share(trainer, batches, "predict", answer))
        if not trainer.is_global_zero:
            return
        rows = in_order(batches, done)
        path = Path(self.out) if Path(self.out).parent != Path() else Path(trainer.default_root_dir, self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print_line(f"responses  {path} ({len(rows)} prompts × {n})")
