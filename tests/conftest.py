"""Tiny real models on disk: a few thousand random weights with a byte-level tokenizer."""

import gc
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores, those that tests start too
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub, and a name that it lacks would be retried for a minute

from pathlib import Path
from typing import IO, Any

import pytest
import torch
from matplotlib.figure import Figure
from tiny import byte_tokenizer, llama_config
from transformers import LlamaForCausalLM

from lit_align.reporting import plots

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def _token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenized data away from the user's own."""
    os.environ["LIT_ALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away what launchers of processes leave in the environment: a later test would wait for their processes.

    A process group that a test leaves would hang the processes that later tests fork: its destructor waits for threads,
    which a fork does not copy.
    """
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # a trainer, which is part of a cycle, holds the group


@pytest.fixture
def set_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes this a machine without a GPU, whose CPU multiplies half precision quickly, or does not."""

    def become(has_kernels: bool) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has_kernels)

    return become


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save figures without drawing them, and only the first plot of a run: drawing takes longer than a tiny run."""

    def save(self: Figure, target: str | Path | IO[bytes], **options: Any) -> None:
        if isinstance(target, str | Path):
            Path(target).touch()
        else:
            target.write(b"<svg></svg>")

    draws_of = plots.draws_of
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(plots, "draws_of", lambda run: dict([*draws_of(run).items()][:1]))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
