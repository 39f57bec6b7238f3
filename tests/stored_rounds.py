"""Rounds that tests store without a model."""

from pathlib import Path

from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.rounds.store import RoundStore

SCORES = (("vader", [[0.5, 2.0], [1.0, -1.0]]),)


def stored(folder: Path, scores=SCORES, index: int = 0) -> RoundStore:
    """A round of one batch with two prompts, under each of several scorers."""
    made = RoundStore(folder, index, {"index": index})
    prompts = [[{"role": "user", "content": text}] for text in ("Once upon", "Hi")]
    responses = [[" a time", " a\x1b[31m hill\nred"], ["Hello", "Go away"]]
    samples = [
        SampleRow(f"p.jsonl:{n}", prompt, [1], texts, [[1], [2]], [True, False], None)
        for n, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
    ]
    made.samples.write(0, samples)
    for name, values in scores:
        made.scores(name).write(0, [ScoreRow(f"p.jsonl:{n}", name, each) for n, each in enumerate(values)])
    return made
