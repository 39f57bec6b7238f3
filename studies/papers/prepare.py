"""Prepare all that the cells share: `python -m studies.papers.prepare`; about half an hour on one core.

It needs `data/quickstart/` (`make install`) and writes into `runs/study/`; what exists is left as it is.

    data/           review sentences in disjoint parts, and sentences of newspaper editorials and tweets, as JSONL
    gold/           the gold judge: MiniLM, fitted to people's ratings of sentences that nothing else reads
    sft/            the start: SmolLM2-135M after one epoch on review sentences
    proxy_large/    the training scorer: a reward model on the start, from 380 pairs of rated sentences
    proxy_small/    the same from the first 60 of these pairs, in as many steps
    samples/seedS/  the start's responses to the training prompts, and each proxy's pairs of the best and the worst;
                    `run` makes them before the first cell of seed S

At the end it writes `prepared/HASH.json` into the folder of results: the size and hash of every part of the data,
hashes of the models, and how well gold judge and proxies rank held-out sentences. HASH is the file's own.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.quickstart import Snippet, download_snippets, fit_judge, opening_of, read_snippets
from lit_align.data.formats.read import read_rows
from lit_align.reporting.metrics_csv import read_metrics

HERE = Path(__file__).parent
WORK = Path("runs/study")
SEED = 0

# sentences of each part, in the order in which they are taken from the shuffled sentences
PARTS = {"gold": 4000, "gold_held_out": 600, "preferences": 1200, "preferences_validation": 400, "sft": 2400}
PROMPTS = {"train": 256, "validation": 64, "test": 128}
IMITATED = {"sft": 700, "sft_validation": 100}  # rows
IMITATED_WORDS = (7, 16)
OPENING_WORDS = (3, 5)
SMALL, SMALL_EPOCHS = 60, 6  # pairs of the small proxy, and passes over them: about as many steps as the large one
TEXTS = {"news": 400, "news_held_out": 100}  # sentences of editorials
TWEETS = 100
MIN_DIFFERENCE = 1.0  # of the ratings of a preference pair

# --- the data ---


def split(snippets: Sequence[Snippet]) -> tuple[dict[str, list[Snippet]], list[Snippet]]:
    """Disjoint parts of the review sentences, and the rest, which gives the prompts."""
    shuffled = list(snippets)
    random.Random(SEED).shuffle(shuffled)
    parts, start = {}, 0
    for name, size in PARTS.items():
        parts[name] = shuffled[start : start + size]
        start += size
    return parts, shuffled[start:]


def preferences(snippets: Sequence[Snippet]) -> Iterator[dict[str, Any]]:
    """Pairs of neighbours whose ratings differ enough; the sentence that people rated higher is the chosen one.

    The prompt is a user's turn without words, so that whole sentences are rendered like an opening and its rest.
    """
    for pair in zip(snippets[::2], snippets[1::2], strict=True):
        worse, better = sorted(pair)
        if better.rating - worse.rating >= MIN_DIFFERENCE:
            yield {"prompt": [{"role": "user", "content": ""}], "chosen": better.text, "rejected": worse.text}


def imitation(snippets: Sequence[Snippet]) -> Iterator[dict[str, str]]:
    """Openings of sentences of a usual length, each with the rest of its sentence."""
    generator = random.Random(SEED)
    for snippet in snippets:
        words = snippet.text.split()
        if IMITATED_WORDS[0] <= len(words) <= IMITATED_WORDS[1]:
            opening = generator.randint(*OPENING_WORDS)
            yield {"prompt": " ".join(words[:opening]), "completion": " " + " ".join(words[opening:])}


def prompts(snippets: Sequence[Snippet]) -> dict[str, list[dict[str, str]]]:
    """Distinct openings without an opinion, for each split of the prompts."""
    generator = random.Random(SEED)
    openings = dict.fromkeys(opening_of(snippet.text, generator.randint(*OPENING_WORDS)) for snippet in snippets)
    distinct = iter([{"prompt": opening} for opening in openings if opening])
    return {name: [next(distinct) for _ in range(size)] for name, size in PROMPTS.items()}


def make_data(folder: Path) -> None:
    """Write every part as JSONL."""
    parts, rest = split(read_snippets())
    news, tweets = (
        [{"text": text} for _, text in download_snippets(name)] for name in ("nytEditorialSnippets", "tweets")
    )
    for texts in (news, tweets):
        random.Random(SEED).shuffle(texts)
    imitated = list(imitation(parts["sft"]))
    first = IMITATED["sft"]
    files: dict[str, Sequence[dict[str, Any]]] = {
        **prompts(rest),
        "preferences": list(preferences(parts["preferences"])),
        "preferences_validation": list(preferences(parts["preferences_validation"])),
        "sft": imitated[:first],
        "sft_validation": imitated[first : first + IMITATED["sft_validation"]],
        "news": news[: TEXTS["news"]],
        "news_held_out": news[TEXTS["news"] : sum(TEXTS.values())],
        "tweets_held_out": tweets[:TWEETS],
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- the models ---


def make_gold(folder: Path) -> None:
    parts, _ = split(read_snippets())
    fit_judge(folder, fitted=parts["gold"], held_out=parts["gold_held_out"])


def fit(configuration: str, folder: Path, *options: str) -> None:
    """Run one stage through the command line."""
    file = HERE / f"{configuration}.yaml"
    command = [sys.executable, "train.py", "fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *options]
    subprocess.run(command, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})


def make_proxy(folder: Path, pairs: str = "", epochs: int = 1) -> None:
    train = f"--data.train={WORK}/data/preferences.jsonl{pairs}"
    fit("reward_model", folder, train, f"--trainer.max_epochs={epochs}")


def make_samples(folder: Path, seed: int) -> None:
    """Sample from the start for the offline arms, then for the first round that all iterative arms of the seed share.

    One proxy scores the samples, then the other scores those that are stored. Writes each proxy's pairs, before the
    folder holds other rounds than theirs.
    """

    def fit_with(proxy: str, store: Path, *options: str) -> None:
        run = folder / "run"
        scorer = f"--data.scorer.model={WORK}/{proxy}/model"
        fit("samples", run, f"--seed_everything={seed}", scorer, f"--data.store={store}", *options)
        shutil.rmtree(run)

    proxies = ("proxy_large", "proxy_small")
    for proxy in proxies:
        fit_with(proxy, folder)
        write_rows(folder / f"{proxy}.jsonl", best_and_worst(folder, proxy))
    first_round = ["--data.prompts_per_round=chunk", "--trainer.max_epochs=4", "--trainer.max_steps=1"]
    for proxy in proxies:
        fit_with(proxy, folder / "rounds", *first_round, "--data.record_sampler=true")


def best_and_worst(store: Path, proxy: str) -> Iterator[dict[str, Any]]:
    """Each prompt's response of the highest reward and that of the lowest, from the stored samples."""
    for row in read_rows(str(store), split=proxy, kind="preferences").rows:
        assert row.rewards is not None
        if row.rewards[0] > row.rewards[-1]:
            yield {"prompt": row.prompt, "chosen": row.responses[0], "rejected": row.responses[-1]}


# --- all steps ---


def steps() -> dict[str, Callable[[Path], None]]:
    return {
        "data": make_data,
        "gold": make_gold,
        "sft": lambda folder: fit("sft", folder),
        "proxy_large": make_proxy,
        "proxy_small": lambda folder: make_proxy(folder, f"[:{SMALL}]", SMALL_EPOCHS),
    }


def sample(seed: int) -> None:
    """Make a seed's offline pairs, unless they exist."""
    make(f"samples/seed{seed}", lambda folder: make_samples(folder, seed))


def make(name: str, step: Callable[[Path], None]) -> None:
    """Make a part beside its place and move it there once it is complete."""
    target, unfinished = WORK / name, WORK / "unfinished" / name
    if target.exists():
        return
    print(f"--- {name}", flush=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    step(unfinished)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(target)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def summary() -> dict[str, Any]:
    """What was prepared, for the record."""
    files = sorted((WORK / "data").glob("*.jsonl"))
    accuracy = {
        name: [
            row["val/reward_accuracy"]
            for row in read_metrics(WORK / name / "metrics.csv")
            if "val/reward_accuracy" in row
        ]
        for name in ("proxy_large", "proxy_small")
    }
    models = {name: WORK / name / "model/model.safetensors" for name in ("sft", "proxy_large", "proxy_small")}
    models["gold"] = WORK / "gold/model.safetensors"
    return {
        "data": {
            str(file.relative_to(WORK)): {"rows": len(file.read_text().splitlines()), "sha256": digest(file)}
            for file in files
        },
        "models": {name: digest(path) for name, path in sorted(models.items())},
        "gold": json.loads((WORK / "gold/metrics.json").read_text()),
        "proxy_accuracy": {name: values[-1] for name, values in accuracy.items()},
    }


def record(results: Path) -> str:
    """Write what was prepared; its hash, which the results of the cells name."""
    text = json.dumps(summary(), indent=1) + "\n"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    (results / "prepared").mkdir(parents=True, exist_ok=True)
    (results / "prepared" / f"{name}.json").write_text(text)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare data, judges and start of the study.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of prepared/HASH.json")
    results = parser.parse_args().results
    for name, step in steps().items():
        make(name, step)
    record(results)


if __name__ == "__main__":
    main()
