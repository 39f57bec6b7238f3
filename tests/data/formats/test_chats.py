"""Chats: their roles, their turns, their calls of tools."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import BIRD, CROW, STONE, assistant, first, read, refusal, user

from lit_align.data.formats.messages import ROLES


def test_a_chat_trains_on_each_turn_of_the_assistant():
    chat = {"messages": [*BIRD, *CROW, user("More?"), assistant("Rook")]}
    rows = read(chat, {"messages": BIRD + STONE}, kind="texts")
    assert [(row.prompt, row.responses) for row in rows] == [
        (BIRD, ("Crow",)),
        ([*BIRD, *CROW, user("More?")], ("Rook",)),
        (BIRD, ("Stone",)),
    ]
    assert rows.description == "chats, chat messages (columns messages); 3 turns of the assistant in 2 chats"
    last = read(chat, kind="texts", turns="last")
    assert [row.responses for row in last] == [("Rook",)]
    assert last.description.endswith("the last turn of the assistant in 1 chat")
    assert [row.prompt for row in read(chat, kind="prompts")] == [[*BIRD, *CROW, user("More?")]]
    assert "turns=last has no effect on rows that are read as prompts" in refusal(chat, kind="prompts", turns="last")


def test_turns_of_weight_zero_are_read_but_not_trained_on():
    chat = [*BIRD, assistant("Stone", weight=0), user("Sure?"), assistant("Crow", weight=1)]
    (row,) = read({"messages": chat}, kind="texts")
    assert row.prompt == [*BIRD, *STONE, user("Sure?")]
    assert row.responses == ("Crow",)
    assert read({"messages": chat[:2]}, {"messages": chat}, kind="texts").skipped == {"rows without a response": 1}


def test_a_turns_weight_other_than_0_or_1_is_refused():
    words = refusal({"messages": [*BIRD, assistant("Crow", weight=0.5)]}, kind="texts")
    assert "0 or 1 as a turn's weight" in words


@pytest.mark.parametrize(
    "row", [{"messages": BIRD + CROW}, {"prompt": "Bird?", "completion": "Crow"}], ids=["chat", "response"]
)
def test_texts_to_imitate_are_not_those_labelled_undesirable(row):
    rows = read(row | {"label": True}, row | {"label": False}, kind="texts")
    assert len(rows) == 1
    assert rows.skipped == {"responses labelled undesirable": 1}
    assert not rows.unread
    topics = read(row | {"label": "sports"}, row | {"label": "science"}, kind="texts")
    assert len(topics) == 2
    assert topics.unread


def test_a_labelled_chat_that_does_not_end_with_an_answer_is_counted():
    rows = read({"messages": [*BIRD, *CROW], "label": True}, {"messages": BIRD, "label": True}, kind="labelled")
    assert len(rows) == 1
    assert rows.skipped == {"rows whose last turn is not the assistant's": 1}


def test_a_response_of_several_turns_trains_on_each_of_them():
    more = [*CROW, user("More?"), assistant("Stone", weight=0), user("No?"), assistant("Rook")]
    expected = [
        (BIRD, ("Crow",)),
        ([*BIRD, *CROW, user("More?"), *STONE, user("No?")], ("Rook",)),
    ]
    for row in ({"prompt": BIRD, "completion": more}, {"prompt": "Bird?", "completion": BIRD + more}):
        assert [(each.prompt, each.responses) for each in read(row, kind="texts")] == expected
        assert [each.responses for each in read(row, kind="texts", turns="last")] == [("Rook",)]
    begun = [*BIRD, assistant("It is")]
    row = {"prompt": begun, "completion": [assistant(" a crow"), user("Sure?"), assistant("Yes")]}
    assert "the response must be one message" in refusal(row, kind="texts")
    row["completion"] = row["completion"][:1]
    (continued,) = read(row, kind="texts")
    assert (continued.prompt, continued.responses, continued.is_new_turn) == (begun, (" a crow",), False)


def test_a_second_message_of_the_assistant_is_a_turn_of_its_own():
    chat = [*BIRD, *CROW, assistant("Or rook")]
    (first, second) = read({"messages": chat}, kind="texts")
    assert (first.prompt, first.is_new_turn) == (BIRD, False)
    assert (second.prompt, second.responses, second.is_new_turn) == (BIRD + CROW, ("Or rook",), True)
    (pair,) = read({"chosen": chat, "rejected": [*BIRD, *CROW, assistant("Or stone")]})
    assert (pair.prompt, pair.is_new_turn) == (BIRD + CROW, True)


def test_lists_side_by_side_in_an_object_are_messages():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["Bird?", "Crow"]}}
    assert first(row, kind="texts").prompt == BIRD


def test_the_segments_that_are_labelled_are_trained_on():
    texts = [("[A]", False), ("Bird?", False), (" Crow", True), (".", True), ("\n", False), (" ", True)]
    parts = [{"text": text, "label": label} for text, label in texts]
    rows = read({"segments": parts}, {"segments": [{"text": "a", "label": 0, "id": 7}]}, kind="texts")
    assert [(row.prompt, row.responses[0]) for row in rows] == [("[A]Bird?", " Crow."), ("[A]Bird? Crow.\n", " ")]
    assert all(row.is_verbatim for row in rows)
    assert rows.description.endswith("plain text (columns segments); 2 trained segments in 1 text")
    assert (rows.skipped, rows.unread) == ({"rows without a response": 1}, ("segments[].id",))
    assert "turns=last has no effect on segments" in refusal({"segments": parts}, kind="texts", turns="last")
    assert "needs segments like" in refusal({"segments": [{"text": "a"}]}, kind="texts")
    assert "needs true or false" in refusal({"segments": [{"text": "a", "label": "maybe"}]}, kind="texts")


TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "Human", "assistant", "GPT", "tool"]), st.text(), st.booleans()), min_size=1
)


@settings(deadline=None)
@given(TURNS)
def test_any_chat_is_read_as_it_is_and_each_assistants_turn_once(turns):
    messages = [{"role": role, "content": text, "thinking": "hm" if thinks else None} for role, text, thinks in turns]
    expected = [
        {"role": ROLES[role.lower()], "content": text} | ({"thinking": "hm"} if thinks else {})
        for role, text, thinks in turns
    ]
    first = {"messages": [*BIRD, *CROW]}
    trained = [
        place
        for place, each in enumerate(expected)
        if place and each["role"] == "assistant" and (each["content"].strip() or "thinking" in each)
    ]
    read_back = read(first, {"messages": messages}, kind="texts").rows[1:]
    assert [(row.prompt, row.responses[0]) for row in read_back] == [
        (expected[:place], each if "thinking" in (each := expected[place]) else each["content"]) for place in trained
    ]


def test_roles_are_brought_to_those_of_chat_templates():
    turns = [("SYSTEM", "s"), ("Human", "h"), ("gpt", "g"), ("prompter", "p"), ("bot", "b"), ("User ", "u")]
    rows = read({"prompt": [{"from": role, "value": text} for role, text in turns]}, kind="prompts")
    assert [each["role"] for each in rows[0].prompt] == ["system", "user", "assistant", "user", "assistant", "user"]  # type: ignore[index]


def test_a_list_of_texts_is_a_dialogue_of_user_and_assistant():
    rows = read({"conversations": ["Bird?", "Crow", "More?", "Rook"]}, kind="texts")
    assert [row.responses for row in rows] == [("Crow",), ("Rook",)]
    assert rows[1].prompt == [*BIRD, *CROW, user("More?")]
    assert "needs text, or messages" in refusal({"conversations": []}, kind="texts")


def test_an_unknown_role_is_named():
    message = refusal({"prompt": [{"role": "narrator", "content": "Once"}]}, kind="prompts")
    assert 'rows.jsonl:1: a message in `prompt` has the role "narrator"' in message
    assert "user" in message


def test_a_call_may_be_a_message_of_role_and_content():
    call = {"role": "tool_call", "content": '{"name": "time", "arguments": {}}'}
    (row,) = read({"messages": [user("Time?"), call]}, kind="texts")
    assert row.responses[0]["tool_calls"] == [{"type": "function", "function": {"name": "time", "arguments": {}}}]


def test_calls_of_sharegpt_become_tool_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "noon"},
        ],
        "tools": '[{"name": "clock"}]',
    }
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = read(row, kind="texts")
    assert rows[0].responses == (assistant(None, tool_calls=[call]),)
    assert rows[1].prompt == [user("Time?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "12:00"}]
    assert {str(row.tools) for row in rows} == {"[{'name': 'clock'}]"}


def test_parts_of_text_are_joined_and_exchanges_are_split():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Bi"}, {"type": "text", "text": "rd?"}]}]
    assert first({"prompt": parts, "chosen": "a", "rejected": "b"}).prompt == BIRD
    capybara = {"conversation": [{"input": "Bird?", "output": "Crow"}, {"input": "More?", "output": "Rook"}]}
    assert [row.responses for row in read(capybara, kind="texts")] == [("Crow",), ("Rook",)]


@pytest.mark.parametrize(
    "text", ['[{"role": "user", "content": "Bird?"}', "[{'role': 'user', 'content': 'a'} {'role': 'b'}]"]
)
def test_text_that_only_looks_like_messages_is_refused(text: str):
    assert "not valid JSON" in refusal({"prompt": text, "chosen": "a", "rejected": "b"})
