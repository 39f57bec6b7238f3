"""Prompts of rounds: tokenized once, kept in a file, under the keys of always."""

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer

from lit_align.data import prompts as code
from lit_align.data.cache import TokenCache
from lit_align.data.examples import Source
from lit_align.data.formats.read import read_rows
from lit_align.data.prompts import digest_of_prompts, identity_of_prompts, read_prompts
from lit_align.data.rounds.row_types import ScoreRow
from lit_align.data.rounds.sample import _sample_row
from lit_align.data.rounds.schedule import places_of_round
from lit_align.data.rounds.store import RoundStore
from lit_align.data.sampling import Response
from lit_align.data.table import ExampleTable
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.errors import UserError

CHAT = [{"role": "user", "content": "Which bird?"}]


def tokenizer(**options: Any) -> PreferenceTokenizer:
    return PreferenceTokenizer(byte_tokenizer(), **({"max_prompt_length": 60, "max_response_length": 9} | options))


def write(folder: Path, count: int, chats: bool = False) -> Source:
    texts = [f"Prompt {i}" + " ümore" * (i % 7) for i in range(count)]
    rows = [{"prompt": [{"role": "user", "content": text}] if chats else text} for text in texts]
    path = folder / f"prompts_{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("long_prompts", ["drop", "truncate_left"])
def test_prompts_are_those_of_one_row_at_a_time(tmp_path, chats, long_prompts):
    source, made = write(tmp_path, 700, chats), tokenizer(max_prompt_length=40, long_prompts=long_prompts)
    read = read_prompts(source, made, TokenCache(tmp_path / "cache"))
    alone = tokenizer(max_prompt_length=40, long_prompts=long_prompts)
    rows = list(read_rows(source.path, kind="prompts"))
    expected = [(row, ids) for row in rows if (ids := alone.prompt_ids(row)) is not None]
    assert [(each.prompt, each.source, each.prompt_ids) for each in read.examples] == [
        (row.prompt, row.source, ids) for row, ids in expected
    ]
    assert all(each.response_ids == [] for each in read.examples[:9])
    assert read.examples.lengths.prompt.tolist() == [len(ids) for _, ids in expected]
    assert 0 < alone.counts.total() < 700
    (reason,) = alone.counts
    assert f"{alone.counts.total()} {reason}" in read.line


def test_rounds_keep_what_the_template_reads_beside_a_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "find_bird"}}]
    row = {"prompt": CHAT, "tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": CHAT}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for each in tools or [] %}{{ each }}{% endfor %}" + tokenizer.chat_template
    read = read_prompts(Source(str(tmp_path / "p.jsonl")), PreferenceTokenizer(tokenizer), TokenCache(tmp_path / "c"))
    made = RoundStore(tmp_path / "rounds", 0, {})
    responses = [Response([1], "a", True), Response([2], "b", True)]
    made.samples.write(0, [_sample_row(example, responses) for example in read.examples])
    made.scores("s").write(0, [ScoreRow(example.source, "s", [1.0, 2.0]) for example in read.examples])
    with_tools, without = read_rows(tmp_path / "rounds", kind="preferences")
    assert (with_tools.tools, with_tools.template_args) == (tools, {"mood": "glad"})
    assert (without.tools, without.template_args) == (None, {})


def test_a_second_start_reads_and_tokenizes_nothing(tmp_path, monkeypatch):
    source, cache = write(tmp_path, 30), TokenCache(tmp_path / "cache")
    first = read_prompts(source, tokenizer(), cache)
    monkeypatch.setattr(code, "_make", lambda *args: pytest.fail("prompts are tokenized again"))
    again = read_prompts(source, tokenizer(), cache)
    assert list(again.examples) == list(first.examples)
    assert again[1:] == first[1:]


def test_keys_of_rounds_and_checkpoints_stay_as_they_are(tmp_path):
    table = read_prompts(write(tmp_path, 40), tokenizer(), TokenCache(tmp_path / "cache")).examples
    chosen = table.reordered(np.array([7, 3, 39]))
    ids = [table[place].prompt_ids for place in (7, 3, 39)]
    assert digest_of_prompts(chosen) == hashlib.sha256(repr(ids).encode()).hexdigest()[:8]
    total = sum(map(len, ids))
    assert identity_of_prompts(chosen) == hashlib.sha256(repr((3, total, ids)).encode()).hexdigest()[:16]


def test_rounds_take_the_prompts_that_they_always_took():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5)).tolist()
    assert places_of_round(10, "all", 1, 3, 5).tolist() == list(range(10))
    assert places_of_round(10, "chunk", 1, 3, 5).tolist() == order[1::3]
    assert places_of_round(10, "chunk", 4, 3, 5).tolist() == order[1::3], "in a second fit of 3 rounds"
    assert places_of_round(10, 4, 2, 3, 5).tolist() == [order[i % 10] for i in range(8, 12)]


def test_a_source_of_which_no_prompt_remains_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prompts_3.jsonl: no prompt remains: 3 prompts too long, dropped"):
        read_prompts(write(tmp_path, 3), tokenizer(max_prompt_length=2, long_prompts="drop"), TokenCache(tmp_path))


def test_prompts_take_no_objects(tmp_path):
    """A list of the tokens of each prompt would be 1 object and 200 bytes or more for each."""

    def blocks(count: int) -> tuple[int, ExampleTable]:
        source, made = write(tmp_path, count), tokenizer()
        gc.collect()
        before = sys.getallocatedblocks()
        table = read_prompts(source, made, TokenCache(tmp_path / "cache")).examples
        gc.collect()
        return sys.getallocatedblocks() - before, table

    blocks(8)
    (few, _), (many, table) = blocks(300), blocks(1900)
    assert len(table) == 1900
    assert many < few + 1000
