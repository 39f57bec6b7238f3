"""Small files in layouts that were once misread: each gives the right rows, or stops with a message that helps."""

from pathlib import Path
from typing import Any

import pytest

from lit_align.data.formats import read_rows
from lit_align.errors import UserError

INPUTS = Path(__file__).parent / "inputs"
BIRD: list[dict[str, Any]] = [{"role": "user", "content": "Bird?"}]
REPEATED = [
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "B?"},
]
STEPS = [
    {"role": "user", "content": "What is 3*4+1?"},
    {"role": "assistant", "content": "Let's think step by step.\nStep 1: 3*4 = 12.\nStep 2:"},
]
THOUGHTS = [{"role": "assistant", "content": "noon", "thinking": text} for text in ("clock says 12", "lazy")]
SYSTEM = [{"role": "system", "content": "Be x"}, *BIRD]
CLOCK = {"role": "assistant", "content": "noon", "reasoning_content": "clock says 12"}
# File → kind, number of rows, prompt and responses of the first row.
READ: dict[str, tuple[Any, int, Any, Any]] = {
    "axolotl_listlast.jsonl": ("preferences", 1, BIRD, ("Crow", "Stone")),
    "chat10.jsonl": ("preferences", 10, [{"role": "user", "content": "Say 0"}], ("yes 0", "no 0")),
    "helpsteer2_pref.jsonl": ("preferences", 1, "Name a bird", ("Crow", "Stone")),
    "json_string_messages.jsonl": ("preferences", 1, BIRD, ("Crow", "Stone")),
    "kto_true.jsonl": ("labelled", 10, "p0:", (" yes 0",)),
    "lf_alpaca_dpo.jsonl": ("preferences", 2, "Translate\nVogel", ("bird", "fish")),
    "lf_sharegpt_dpo.jsonl": ("preferences", 1, BIRD, ("Crow", "Stone")),
    "long70.jsonl": ("preferences", 3, "p" * 70 + "0", (" yes", " no")),
    "math_step_dpo.jsonl": ("preferences", 1, STEPS, (" 12+1 = 13.", " 12+1 = 14.")),
    "pairs10.jsonl": ("preferences", 10, "p0:", (" yes 0", " no 0")),
    "prefill.jsonl": (
        "preferences", 1, [*BIRD, {"role": "assistant", "content": "I think it is"}], (" a crow", " a stone"),
    ),
    "reasoning_content.jsonl": ("texts", 1, [{"role": "user", "content": "Time?"}], (CLOCK,)),
    "repeated_turn.jsonl": ("preferences", 1, REPEATED, ("Crow", "Stone")),
    "roles_caps.jsonl": ("preferences", 1, BIRD, ("Crow", "Stone")),
    "sft_multi.jsonl": ("texts", 2, BIRD, ("Crow",)),
    "stackexchange.jsonl": ("preferences", 1, "How to cat?", ("Use cat.", "No.")),
    "system_after_user.jsonl": ("preferences", 1, SYSTEM, ("Crow", "Stone")),
    "think10.jsonl": (
        "preferences", 10, [{"role": "user", "content": "Say 0"}],
        ("<think>\nhm 0\n</think>\n\nyes 0", "<think>\nha\n</think>\n\nno 0"),
    ),
    "thinking_key.jsonl": ("preferences", 2, [{"role": "user", "content": "Time?"}], tuple(THOUGHTS)),
    "ultrainteract.parquet": (
        "preferences", 3, [{"role": "user", "content": "Solve 0+1"}],
        ("Step 1: add. The answer is 1", "Step 1: guess. The answer is 0"),
    ),
}  # fmt: skip
# File → what the message says.
STOPS = {
    "alpaca_renamed.jsonl": [
        "alpaca_renamed.jsonl:1",
        "`input` holds",
        "may belong to the prompt",
        "{prompt}\\n{input}",
    ],
    "dolly_renamed.jsonl": ["dolly_renamed.jsonl:1", "context"],
    "images_given.parquet": ["images_given.parquet:1", "`images`", "ignore_columns=[images]"],
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_its_columns_say(name):
    kind, count, prompt, responses = READ[name]
    rows = read_rows(INPUTS / name, kind=kind)
    assert len(rows) == count
    assert (rows[0].prompt, rows[0].responses) == (prompt, responses)


def test_a_chat_with_tools_keeps_the_call_and_its_result():
    rows = read_rows(INPUTS / "tools_role.jsonl", kind="texts")
    roles = [message["role"] for message in rows[0].prompt]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "tool"]
    assert rows[0].prompt[1]["tool_calls"][0]["function"]["name"] == "t"  # type: ignore[index]
    assert rows[0].responses == ("noon",)


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("kind", ["preferences", "texts"])
def test_a_file_with_an_unread_part_of_the_prompt_stops(name, kind):
    with pytest.raises(UserError) as error:
        read_rows(INPUTS / name, kind=kind)
    if kind == ("texts" if name == "dolly_renamed.jsonl" else "preferences"):
        assert all(part in str(error.value) for part in STOPS[name])


def test_every_file_has_its_test():
    assert {path.name for path in INPUTS.iterdir()} == {*READ, *STOPS, "tools_role.jsonl"}
