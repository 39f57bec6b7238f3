"""A mapping of columns reads any layout, and each of its mistakes is one message."""

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read, refusal, system, user

from lit_align.data.formats import Row
from lit_align.data.formats.columns import mapped
from lit_align.data.formats.record import Reading, Record

ALPACA = {"instruction": "Translate", "input": "Vogel", "good": "bird", "bad": "fish"}


def filled(template: str, **values: Any) -> str:
    return mapped({"prompt": template})(Record(values, "row"), Reading()).values["prompt"]


def test_a_template_and_names_make_a_pair():
    columns = {"prompt": "{instruction}\n{input}", "chosen": "good", "rejected": "bad"}
    rows = read(ALPACA, ALPACA | {"input": ""}, columns=columns)
    assert rows[0] == Row("Translate\nVogel", ("bird", "fish"), source="rows.jsonl:1")
    assert rows[1].prompt == "Translate"
    assert rows.unread == ()


PAIR = {"prompt": "Bird?", "chosen": "crow", "rejected": "stone"}


def test_each_row_may_have_a_weight_and_rows_of_weight_0_are_absent():
    rows = read(PAIR | {"weight": 0.5}, PAIR | {"weight": "2"}, PAIR | {"weight": 0})
    assert [row.weight for row in rows] == [0.5, 2.0]
    assert rows.skipped == {"rows of weight 0": 1}
    assert rows.unread == ()
    assert [row.weight for row in read(PAIR | {"sure": {"how": 3}}, columns={"weight": "sure.how"})] == [3.0]
    assert [row.weight for row in read(PAIR | {"weight": 2}, ignore_columns=["weight"])] == [1.0]


def test_each_turn_of_a_chat_has_the_weight_of_its_row():
    chat = [user("a"), {"role": "assistant", "content": "b"}] * 2
    assert [row.weight for row in read({"messages": chat, "weight": 0.5}, kind="texts")] == [0.5, 0.5]


def test_prompts_have_no_weight():
    rows = read(PAIR | {"weight": 0}, kind="prompts")
    assert [row.weight for row in rows] == [1.0]
    assert "weight" in rows.unread


@pytest.mark.parametrize("weight", [-1, -0.5, 1e-40, "nan", "heavy", 1e300, True])
def test_a_weight_is_0_or_a_usual_positive_number(weight):
    message = refusal(PAIR | {"weight": 1}, PAIR | {"weight": weight})
    assert "rows.jsonl:2: `weight` holds" in message
    assert "but needs" in message


@pytest.mark.parametrize(
    ("first", "second"), [({"weight": 1}, {}), ({}, {"weight": 1}), ({"weight": 1}, {"weight": None})]
)
def test_all_rows_have_a_weight_or_none(first, second):
    assert "Give a weight to every row, or to none." in refusal(PAIR | first, PAIR | second)


def test_rows_that_all_have_weight_0_are_no_data():
    assert "no row remains after reading" in refusal(PAIR | {"weight": 0}, PAIR | {"weight": 0.0})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}\n{none}", "A"),
        ("{none}\n{a}", "A"),
        ("{none}\n\n{a}", "A"),
        ("{a}\n\n{none}\n\n{b}", "A\n\nB"),
        ("{a}\n\n{none}\n", "A\n"),
        ("Question: {a}\nContext: {none}\nAnswer:", "Question: A\nAnswer:"),
        ("{a} {none} {b}", "A B"),
        ("{none} {a}", "A"),
        ("{a}: {b}", "A: B"),
        (r"{a}\n{b}", "A\nB"),
        ("{{{a}}}", "{A}"),
        ("{n} birds", "3 birds"),
        ("{deep.0.x}{deep[1].x}", "12"),
        ("{a}\n\nend", "A\n\nend"),
        (" {a}\n", " A\n"),
    ],
)
def test_templates_leave_out_empty_fields(template: str, expected: str):
    assert filled(template, a="A", b="B", none=None, n=3, deep=[{"x": 1}, {"x": 2}]) == expected


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4), st.sampled_from(["\n", " ", "\n\n", "; "])
)
def test_a_template_holds_each_value_as_it_is(values: list[str], between: str):
    names = list(string.ascii_lowercase[: len(values)])
    template = between.join(f"{{{name}}}" for name in names)
    assert filled(template, **dict(zip(names, values, strict=True))) == between.join(values)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("conversation.0.content", "Q"),
        ("conversation.-1.content", "A"),
        ("conversation[0].content", "Q"),
        ("a.b", "dot"),
    ],
)
def test_dotted_paths_lead_into_columns(path: str, expected: str):
    row = {"conversation": [{"content": "Q"}, {"content": "A"}], "a.b": "dot", "x": "good", "y": "bad"}
    rows = read(
        row, columns={"prompt": path, "chosen": "x", "rejected": "y"}, ignore_columns=["conversation"] * (path == "a.b")
    )
    assert rows[0].prompt == expected


def test_paths_lead_into_values_that_are_spelled_out():
    row = {"question": '{"full_text": "Bird?"}', "answer_0": "Crow", "answer_1": "Stone", "score_0": 1, "score_1": 0}
    assert read(row, columns={"prompt": "question.full_text"})[0] == Row(
        "Bird?", ("Crow", "Stone"), rewards=(1.0, 0.0), source="rows.jsonl:1"
    )


@pytest.mark.parametrize("winner", ["model_b", "b", "second", 2, "2", "right", "Crow"])
def test_a_winner_column_chooses_between_two_responses(winner: object):
    row = {"q": "Bird?", "left_text": "Stone", "right_text": "Crow", "won_by": winner}
    columns = {"prompt": "q", "response_1": "left_text", "response_2": "right_text", "winner": "won_by"}
    assert read(row, columns=columns)[0] == Row("Bird?", ("Crow", "Stone"), source="rows.jsonl:1")


def test_a_mapped_winner_of_1_is_the_first_unless_counted_from_0():
    row = {"q": "Bird?", "x": "Crow", "y": "Stone", "better": 1}
    columns = {"prompt": "q", "response_1": "x", "response_2": "y", "winner": "better"}
    assert read(row, columns=columns)[0].responses == ("Crow", "Stone")
    assert [r.responses[0] for r in read(row, row | {"better": 0}, columns=columns)] == ["Stone", "Crow"]


def test_all_other_targets_can_be_mapped():
    ranked = {"q": "Q", "texts": ["a", "b"], "stars": [1, 2]}
    assert read(ranked, columns={"prompt": "q", "responses": "texts", "rewards": "stars"})[0].rewards == (2.0, 1.0)
    scored = {"prompt": "Q", "chosen": "a", "rejected": "b", "up": 2, "down": 1}
    assert read(scored, columns={"score_chosen": "up", "score_rejected": "down"})[0].rewards == (2.0, 1.0)
    labelled = {"q": "Q", "a": "A", "ok": 0}
    assert read(labelled, columns={"prompt": "q", "completion": "a", "label": "ok"}, kind="labelled")[0].labels == (
        False,
    )
    assert read({"body": "all"}, columns={"text": "body"}, kind="texts")[0] == Row("", ("all",), source="rows.jsonl:1")
    assert (
        len(read({"log": [user("Q"), {"role": "bot", "content": "A"}]}, columns={"messages": "log"}, kind="texts")) == 1
    )


def test_a_mapped_system_message_makes_chats_of_plain_prompts():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "sys": "Be kind"}
    rows = read(row, row | {"sys": None}, columns={"system": "sys"})
    assert [each.prompt for each in rows] == [[system("Be kind"), user("Q")], [user("Q")]]


def test_mapped_documents_are_arguments_of_the_chat_template():
    documents = [{"title": "Birds", "text": "Crows fly."}]
    row = {"prompt": [user("Q")], "chosen": "a", "rejected": "b", "documents": documents}
    assert read(row, columns={"documents": "documents"})[0].template_args == {"documents": documents}
    assert "columns={documents: documents}" in refusal(row)


def test_mapped_tools_make_chats_of_plain_prompts():
    row = {"query": "Time?", "answers": "[]", "tools": '[{"name": "clock"}]'}
    assert "columns={tools: tools}, which makes the prompt a user's turn" in refusal(row, kind="prompts")
    (read_row,) = read(row, columns={"tools": "tools"}, kind="prompts")
    assert (read_row.prompt, read_row.tools) == ([user("Time?")], [{"name": "clock"}])


def test_unmapped_fields_of_an_object_are_not_lost():
    row = {"info": {"question": "Q", "context": "C", "id": 1}, "x": "a", "y": "b"}
    columns = {"prompt": "info.question", "chosen": "x", "rejected": "y"}
    assert "`info.context` holds" in refusal(row, columns=columns)
    assert "Add {info.context} to the template" in refusal(row, columns=columns)
    assert read(row, columns=columns | {"prompt": "{info.context} {info.question}"}).unread == ("info.id",)
    assert read(row, columns=columns, ignore_columns=["info.context", "info.id"]).unread == ()


def test_items_of_a_list_that_no_path_leads_to_are_listed():
    row = {"q": "Q", "answers": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}
    columns = {"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.-1.text"}
    rows = read(row, columns=columns)
    assert (rows[0].responses, rows.unread) == (("a", "c"), ("answers[…]",))
    assert read(row | {"answers": row["answers"][:2]}, columns=columns).unread == ()


def test_the_columns_that_a_message_suggests_read_the_row():
    row = {"prompt": "Who?", "context": "By Ann.", "input": "", "response": "Ann"}
    assert r"columns={prompt: '{context}\n{prompt}'}" in refusal(row, kind="texts")
    assert read(row, kind="texts", columns={"prompt": "{context}\n{prompt}"})[0].prompt == "By Ann.\nWho?"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "instruction"}, ["'promt' must be one of prompt, messages"]),
        ({"prompt": "question"}, ["no column 'question'", "instruction, input, good, bad"]),
        ({"prompt": "{question} {input}"}, ["no column 'question'"]),
        ({"prompt": "{instruction"}, ["must be a template", "braces"]),
        ({"prompt": "{} {input}"}, ["name of a column in each pair of braces"]),
        ({"prompt": "{input!r}"}, ["name of a column in each pair of braces"]),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(columns: dict[str, str], words: list[str]):
    message = refusal(ALPACA, columns=columns)
    assert all(word in message for word in words), message


def test_a_template_takes_text_and_numbers_only():
    message = refusal({"q": [1], "a": "x", "b": "y"}, columns={"prompt": "Q: {q}", "chosen": "a", "rejected": "b"})
    assert "`q` holds [1], but needs text to fill a template with" in message


@pytest.mark.parametrize("tools", ['[{"name": "clock"]', ["clock"], '["clock"]'])
def test_tools_that_are_no_json_are_named_with_their_row(tools):
    row = {"prompt": [user("Q")], "chosen": "a", "rejected": "b", "tools": tools}
    assert "rows.jsonl:1: `tools` holds" in (said := refusal(row))
    assert "needs a list of objects, and a text in it is not valid JSON. Correct it, take the row out" in said
