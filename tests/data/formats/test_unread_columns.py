"""No column is lost unseen: one beside the prompt is read, listed, or stops the run with advice that works."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import BIRD, CROW, STONE, assistant, chat, first, message_of, read, refusal, system, user

from lit_align.data.formats import Kind, read_rows


@pytest.mark.parametrize(
    "name",
    ["input", "context", "documents", "history", "system_message", "trajectory", "dialog", "conversations", "question"],
)
@pytest.mark.parametrize("value", ["Vogel", BIRD, ["Vogel"], [["Vogel", "Tier"]], {"de": "Vogel"}])
def test_columns_that_may_belong_to_the_prompt_stop_the_run(name: str, value: Any):
    pair = {"prompt": "Translate", "chosen": "bird", "rejected": "fish"}
    message = refusal(pair | {name: ""}, pair | {name: value})
    assert message.startswith(f"rows.jsonl:2: `{name}` holds ")
    assert f"ignore_columns=[{name}]" in message
    rows = read(pair | {name: value}, ignore_columns=[name])
    assert rows[0].responses == ("bird", "fish")
    assert rows.unread == ()


@pytest.mark.parametrize("name", ["context_1", "Document2", "quotes_0", "table", "hint", "image_1"])
def test_numbered_columns_and_what_an_answer_may_rest_on_stop_the_run(name: str):
    message = refusal({"prompt": "Translate", "chosen": "bird", "rejected": "fish", name: ["Vogel"]})
    assert f"`{name}` holds " in message
    assert f"ignore_columns=[{name}]" in message


def test_an_unread_list_of_messages_stops_the_run_whatever_its_name():
    pair = {"prompt": "Translate", "chosen": "bird", "rejected": "fish"}
    assert "`earlier` holds" in refusal(pair | {"earlier": BIRD})
    assert read(pair | {"earlier": [user("Translate"), assistant("bird")]}).unread == ("earlier",)


def test_a_short_word_inside_the_prompt_does_not_count_as_its_repetition():
    pair = {"prompt": "Add 1 to the number", "chosen": "2", "rejected": "3"}
    assert "`input` holds" in refusal(pair | {"input": "1"})
    assert "`input` holds" in refusal(pair | {"input": 1})


@pytest.mark.parametrize("value", ["Name a bird", "Bird?"])
def test_shared_words_are_not_the_prompt_where_another_column_may_hold_it(value: str):
    pair = {"chosen": "A crow", "rejected": "A stone", "id": "x1"}
    name = "request" if " " in value else "user"
    message = refusal(pair | {name: value})
    assert f"`{name}` holds" in message
    assert f"columns={{prompt: {name}}}" in message
    assert read(pair | {name: value}, columns={"prompt": name})[0].responses == ("A crow", "A stone")
    assert read(pair)[0].prompt == "A"


def test_the_advice_to_add_a_column_names_the_columns_of_the_prompt():
    row = {"schema": "CREATE", "instruction": "Count", "input": "birds", "chosen": "a", "rejected": "b"}
    template = r"{schema}\n{instruction}\n{input}"
    assert f"columns={{prompt: '{template}'}}" in refusal(row)
    assert read(row, columns={"prompt": template})[0].prompt == "CREATE\nCount\nbirds"


def test_an_object_that_is_not_a_message_names_the_way_to_its_text():
    row = {"question": {"id": 1, "full_text": "Q"}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0}
    assert "`question.full_text` is text" in refusal(row)


def test_answers_that_are_numbers_or_missing_do_not_matter_to_prompts():
    rows = read({"problem": "1+1?", "answer": 2}, {"problem": "1+2?", "answer": None}, kind="prompts")
    assert [row.prompt for row in rows] == ["1+1?", "1+2?"]
    assert rows.unread == ("answer",)
    assert read({"problem": "1+1?", "answer": 2}, kind="texts")[0].responses == ("2",)


def test_prompts_that_differ_in_their_tools_are_both_taken():
    pair = {"prompt": BIRD, "chosen": "a", "rejected": "b"}
    assert len(read(pair, pair | {"tools": [{"name": "t"}]}, pair, kind="prompts")) == 2


def test_images_stop_the_run(tmp_path):
    file = tmp_path / "rows.parquet"
    row = {"images": [b"\x89PNG"], "prompt": BIRD, "chosen": CROW, "rejected": STONE}
    pq.write_table(pa.Table.from_pylist([row]), file)
    message = message_of(lambda: read_rows(file, kind="preferences"))
    assert "`images` holds" in message
    assert "images and sound are not read" in message
    assert len(read_rows(file, kind="preferences", ignore_columns=["images"])) == 1
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Bird?"}]}]
    assert "images and sound are not read" in refusal({"prompt": parts, "chosen": "a", "rejected": "b"})


def test_other_columns_and_keys_are_listed_as_unread():
    row = {"id": 7, "prompt": [user("Q") | {"lang": "de"}], "chosen": "a", "rejected": "b", "margin": 0.5, "note": None}
    assert read(row).unread == ("prompt[].lang", "id", "margin")
    listed = {"prompt": "Q", "answers": [{"answer": "a", "rank": 1, "model": "m"}, {"answer": "b", "rank": 2}]}
    assert read(listed).unread == ("answers[].model",)


def test_names_that_no_row_has_cannot_be_ignored():
    assert "no row has imagse" in refusal(
        {"prompt": "Q", "chosen": "a", "rejected": "b", "images": []}, ignore_columns=["images", "imagse"]
    )


CHATS = {"chosen": [*BIRD, *CROW], "rejected": [*BIRD, *STONE]}


@pytest.mark.parametrize("prompt", ["Bird?", " Bird?\n", "Bird"])
def test_a_prompt_beside_whole_chats_is_one_of_their_turns(prompt):
    assert first({"prompt": prompt, **CHATS}).prompt == BIRD


def test_a_prompt_that_whole_chats_do_not_hold_is_refused():
    row = {"prompt": "Judge these two.", **CHATS}
    text = refusal(row)
    assert '`prompt` holds "Judge these two.", but the responses are whole chats' in text
    assert "ignore_columns=[prompt]" in text
    assert first(row, ignore_columns=["prompt"]).prompt == BIRD
    assert "Leave it out of `columns`" in refusal({"context": "A passage.", **CHATS}, columns={"prompt": "context"})


@pytest.mark.parametrize("as_json", [False, True])
def test_arguments_of_the_chat_template_are_read(as_json):
    arguments = {"custom_instructions": "Be short.", "enable_thinking": False, "xml_tools": None}
    row = {"chat_template_kwargs": str(arguments) if as_json else arguments, **CHATS}
    assert first(row).template_args == {"custom_instructions": "Be short.", "enable_thinking": False}
    (plain,) = read({"chat_template_kwargs": arguments, "prompt": "Hi"}, kind="prompts")  # data.wrap_prompts_as_chat
    assert plain.template_args == {"custom_instructions": "Be short.", "enable_thinking": False}


def test_arguments_that_rendering_sets_itself_are_refused():
    text = refusal({"chat_template_kwargs": {"tokenize": True}, **CHATS})
    assert "arguments of the chat template, which 'tokenize' is not" in text
    assert "needs an object" in refusal({"chat_template_kwargs": "short", **CHATS})


def test_all_texts_in_an_object_are_named():
    """WebGPT's question: its first text is the name of a data set."""
    question = {"dataset": "eli5", "full_text": "Bird?"}
    row = {"question": question, "answer_0": "Stone", "score_0": -0.5, "answer_1": "Crow", "score_1": 0.5}
    assert "its parts `question.dataset`, `question.full_text` are text" in refusal(row)
    found = first(row, columns={"prompt": "question.full_text"})
    assert (found.prompt, found.responses) == ("Bird?", ("Crow", "Stone"))


def test_a_text_beside_a_chat_may_be_its_system_message():
    row = {"messages": [*BIRD, *CROW], "knowledge": "Crows are birds."}
    assert "columns={system: knowledge}" in refusal(row, kind="texts")
    found = first(row, kind="texts", columns={"system": "knowledge"})
    assert found.prompt == [system("Crows are birds."), *BIRD]


def test_unknown_columns_are_told_of_two_responses_and_a_winner():
    row = {"orig_instruction": "Bird?", "orig_response_A": "Stone", "orig_response_B": "Crow", "orig_preference": "B"}
    assert "prompt + response_1 + response_2 + winner" in refusal(row)
    columns = {
        "prompt": "orig_instruction",
        "response_1": "orig_response_A",
        "response_2": "orig_response_B",
        "winner": "orig_preference",
    }
    assert first(row, columns=columns).responses == ("Crow", "Stone")


@pytest.mark.parametrize("name", ["question", "query", "instruction", "input", "context", "problem"])
@pytest.mark.parametrize("kind", ["preferences", "prompts", "texts", "labelled"])
def test_a_question_beside_the_responses_is_the_prompt(name: str, kind: Kind):
    row = {"chosen": "The capital is Rome", "rejected": "The capital is Paris"}
    assert read(row | {name: "Which city?"}, kind=kind)[0].prompt == "Which city?"
    last_turns = {"chosen": chat("", "Rome")[1:], "rejected": chat("", "Paris")[1:], name: "Which city?"}
    assert read(last_turns, kind=kind)[0].prompt == chat("Which city?")
    listed = {"chosen": "Rome", "rejected": "Paris", name: chat("Which city?")}
    assert read(listed, kind=kind)[0].prompt == chat("Which city?")


@pytest.mark.parametrize("name", ["question", "query", "instruction", "input", "context", "problem"])
def test_shared_words_are_not_the_prompt_of_a_row_that_has_a_question(name: str):
    row = {"chosen": "The capital is Rome", "rejected": "The capital is Paris"}
    message = message_of(lambda: read(row, row | {name: "Which city?"}))
    assert (
        f'rows.jsonl:2: `{name}` holds "Which city?", which may belong to the prompt, but nothing reads it' in message
    )
    assert f"ignore_columns=[{name}]" in message


def test_a_column_that_repeats_the_shared_words_is_harmless():
    text = {"question": "Which city?", "input": "", "chosen": "Which city? Rome", "rejected": "Which city? Paris"}
    assert read(text)[0].prompt == "Which city?"
    messages = {"question": "Q ", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")}
    assert read(messages)[0].prompt == chat("Q")
    transcript = {"question": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
    assert read(transcript)[0].prompt == chat("Q")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": chat("Q"), "chosen": "a", "rejected": "b"}, "preferences"),
        ({"prompt": "Q", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")}, "preferences"),
        ({"chosen": chat("Q", "a"), "rejected": chat("Q", "b")}, "preferences"),
        ({"messages": chat("Q", "a")}, "texts"),
        ({"prompt": chat("Q")}, "prompts"),
    ],
)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_opens_the_chat_and_is_counted(row: dict[str, Any], kind: Kind, name: str):
    rows = read(row | {name: "S"}, row | {name: None}, row | {name: " "}, kind=kind)
    assert rows[0].prompt == chat("Q", system="S")
    assert [each.prompt for each in rows][1:] in ([chat("Q")] * 2, [chat("Q")])
    assert rows.skipped[f"chats now opened by their `{name}`"] == 1


def test_a_system_column_that_has_no_place_is_refused():
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    message = message_of(lambda: read(pair, pair | {"system": "S"}))
    assert 'rows.jsonl:2: `system` holds "S", but the prompt is plain text' in message
    assert read(pair | {"prompt": "S\n\nQ", "system": "S"})[0].prompt == "S\n\nQ"
    opened = {"prompt": chat("Q", system="S"), "chosen": "a", "rejected": "b"}
    assert read(opened | {"system": "S "})[0].prompt == chat("Q", system="S")
    message = message_of(lambda: read(opened | {"system": "T"}))
    assert '`system` holds "T", but the chat opens with the system message "S". Keep one of them.' in message


def test_texts_are_whole_regardless_of_other_columns():
    assert read({"text": "all of it", "system": "S", "tools": ["t"]}, kind="texts")[0].responses == ("all of it",)


def test_tools_and_tool_calls_are_kept():
    pair = {"prompt": chat("Q"), "chosen": "a", "rejected": "b", "tools": []}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "t"}}]}
    turns = [*chat("Q"), call, {"role": "tool", "content": "sunny"}]
    rows = read(
        pair,
        pair | {"tools": [{"name": "t"}]},
        pair | {"tools": '[{"name": "t"}]'},
        pair | {"prompt": turns},
        pair | {"prompt": [{"role": "user", "content": "Q", "tool_calls": None}]},
    )
    assert [row.tools for row in rows] == [None, [{"name": "t"}], [{"name": "t"}], None, None]
    assert [row.prompt for row in rows] == [chat("Q"), chat("Q"), chat("Q"), turns, chat("Q")]
    assert not rows.skipped
