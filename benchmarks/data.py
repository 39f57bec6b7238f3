"""Time and memory from a file of pairs to the first batch, against TRL's DPOTrainer and the tokenizer alone.

Every side is a real start in a process of its own, one after another:

    tokenizer   encodes all prompts and responses of the file once, in batches, on all cores
    first       fits with an empty cache, until the first batch
    second      the same again
    two         two starts at once with an empty cache: one tokenizes, the other waits
    collate     makes 400 batches of 4 pairs from the mapped file of the first start; seconds are those of one batch
    trl         makes a DPOTrainer of the same file, and the first batch

Memory is what belongs to the process alone (RssAnon): its peak, and what is left at the first batch. A row with few
pairs is what a start costs by itself: the model, the libraries.

    python benchmarks/data.py                       # the table of docs/speed.md: 100, 10,000 and 160,000 pairs
    python benchmarks/data.py --pairs 100 4000      # minutes
    python benchmarks/data.py --pairs 100 1000000 --words 24 6 --sides first second     # many short pairs
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from turns import quiet, weight_type, write

WORDS = (320, 60)
"""Words of a prompt and of a response."""
SIDES = ("tokenizer", "first", "second", "two", "collate", "trl")


class Meter:
    """Time since the process began its work, and its own memory, sampled all the time."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.cpu_before = cpu_seconds()
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, own_memory())
            time.sleep(0.05)

    def read(self) -> dict[str, float]:
        seconds, cpu = time.perf_counter() - self.began, cpu_seconds() - self.cpu_before
        left = own_memory()
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": max(self.peak, left), "bytes": left}


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started, once they have ended."""
    return sum(os.times()[:4])


def own_memory() -> int:
    """Bytes that no other process can share; pages of mapped files are not among them."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


# --- the sides ---


def tokenizer_alone(report: Callable[[dict[str, float]], None], *, model: str, data: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    meter = Meter()
    with open(data) as file:
        while lines := file.readlines(1 << 20):
            rows = map(json.loads, lines)
            texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
            for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                _ = encoding.ids
    report(meter.read())


def ours(report: Callable[[dict[str, float]], None], *, model: str, data: str, cache: str) -> None:
    """A real fit up to its first batch."""
    meter = Meter()
    import lightning as L

    from lit_align.data import OfflinePairs
    from lit_align.objectives import DPO
    from lit_align.policy import PolicyConfig

    class FirstBatch(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            report(meter.read())
            os._exit(0)

    L.seed_everything(1, verbose=False)
    module = DPO(PolicyConfig(model, dtype=weight_type()))
    pairs = OfflinePairs(data, batch_size=4, cache_dir=cache, long_prompts="truncate_left")
    options: Any = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **options,
            callbacks=[FirstBatch()],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=pairs)


def collation(report: Callable[[dict[str, float]], None], *, cache: str) -> None:
    from lit_align.data.loader import ExampleLoader
    from lit_align.data.table import ExampleTable

    (path,) = Path(cache).glob("*/examples.arrow")
    loader = ExampleLoader(ExampleTable.open(path), 4, seed=0, length=400)
    meter = Meter()
    for _ in loader:
        pass
    measured = meter.read()
    report(measured | {name: measured[name] / len(loader) for name in ("seconds", "cpu_seconds")})


def trls(report: Callable[[dict[str, float]], None], *, model: str, data: str, folder: str) -> None:
    """TRL's preparation of the same file."""
    os.environ["HF_DATASETS_CACHE"] = folder
    meter = Meter()
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        folder,
        per_device_train_batch_size=4,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataset_num_proc=len(os.sched_getaffinity(0)),
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=weight_type()),
        args=settings,
        train_dataset=load_dataset("json", data_files=data, split="train"),  # type: ignore[arg-type]
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    next(iter(trainer.get_train_dataloader()))
    report(meter.read())


# --- runs ---


def run(side: Callable[..., None], processes: int = 1) -> dict[str, float]:
    """Run a side in processes of its own; of several, the slowest and the largest."""
    context = multiprocessing.get_context("spawn")
    lines = [context.Pipe(duplex=False) for _ in range(processes)]
    started = [context.Process(target=_quietly, args=(side, sender)) for _, sender in lines]
    for process in started:
        process.start()
    for _, sender in lines:
        sender.close()
    measured = [receiver.recv() for receiver, _ in lines]
    for process in started:
        process.join()
    return {name: max(each[name] for each in measured) for name in measured[0]}


def _quietly(side: Callable[..., None], sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with quiet():
        side(sender.send)


def _end_with_parent() -> None:
    """A side that outlives a benchmark that was killed would disturb the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_pairs(path: Path, model: str, count: int, words: Sequence[int]) -> str:
    """Write pairs of random words, of about a token each.

    Args:
        words: Of each prompt and of each response.
    """
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    choices = sorted(f" {word[1:]}" for word in vocabulary if word[:1] == "Ġ" and word[1:].isalpha()) or [" a", " bird"]
    draw = random.Random(0)
    in_prompt, in_response = words

    def text(length: int) -> str:
        return "".join(draw.choices(choices, k=length))

    with path.open("w") as file:
        for _ in range(count):
            row = {"prompt": text(in_prompt), "chosen": text(in_response), "rejected": text(in_response)}
            file.write(json.dumps(row) + "\n")
    return str(path)


def measure(sides: list[str], model: str, count: int, words: Sequence[int]) -> dict[str, dict[str, float]]:
    """Every side once on the same file."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder, "pairs.jsonl"), model, count, words)
        start = partial(ours, model=model, data=data)
        runs = {
            "tokenizer": partial(run, partial(tokenizer_alone, model=model, data=data)),
            "first": partial(run, partial(start, cache=f"{folder}/cache")),
            "second": partial(run, partial(start, cache=f"{folder}/cache")),
            "two": partial(run, partial(start, cache=f"{folder}/cache_of_two"), 2),
            "collate": partial(run, partial(collation, cache=f"{folder}/cache")),
            "trl": partial(run, partial(trls, model=model, data=data, folder=f"{folder}/trl")),
        }
        return {side: runs[side]() for side in sides}


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100, 10_000, 160_000])
    parser.add_argument("--words", type=int, nargs=2, default=list(WORDS), help="of each prompt, of each response")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/data.json"))
    options = parser.parse_args(args)

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    rows: list[dict[str, Any]] = []
    print(f"{'pairs':>9}  {'side':<10}{'wall':>9}{'CPU':>9}{'peak':>10}{'at the first batch':>20}")
    for count in options.pairs:
        measured = measure(options.sides, options.model, count, options.words)
        rows.append({"pairs": count} | measured)
        for side, of in measured.items():
            memory = f"{of['peak_bytes'] / 1e6:>7.0f} MB{of['bytes'] / 1e6:>17.0f} MB"
            print(f"{count:>9,}  {side:<10}{of['seconds']:>7.4g} s{of['cpu_seconds']:>7.3g} s{memory}", flush=True)
    write(options.out, rows, model=options.model, words=options.words)
    return rows


if __name__ == "__main__":
    main()
