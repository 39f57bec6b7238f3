"""Small data sets with the columns of public ones: each gives the row that its author means, or is refused."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import assistant, message_of, read, refusal, system, user

from lit_align.data.formats import Row, read_rows
from lit_align.data.formats.messages import ROLES

BIRD = [user("Bird?")]
CROW, STONE = [assistant("Crow")], [assistant("Stone")]


def first(row: dict[str, Any], **options: Any) -> Row:
    return read(row, **options)[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": BIRD, "chosen": CROW, "rejected": STONE},
        {"messages": BIRD, "chosen": CROW[0], "rejected": STONE[0]},
        {
            "conversations": [{"from": "human", "value": "Bird?"}],
            "chosen": {"from": "gpt", "value": "Crow"},
            "rejected": {"from": "gpt", "value": "Stone"},
        },
        {"trajectory": [{"from": "user", "value": "Bird?"}], "chosen": "Crow", "rejected": "Stone", "parent_id": "p"},
        {
            "chosen": [{"role": "Human", "content": "Bird?"}, {"role": "Assistant", "content": "Crow"}],
            "rejected": [{"role": "Human", "content": "Bird?"}, {"role": "Assistant", "content": "Stone"}],
        },
        {
            "prompt": "Bird?",
            "chosen": '[{"role": "user", "content": "Bird?"}, {"role": "assistant", "content": "Crow"}]',
            "rejected": "[{'role': 'user', 'content': 'Bird?'}, {'role': 'assistant', 'content': 'Stone'}]",
        },
        {
            "prompt": BIRD,
            "chosen": '{"role": "assistant", "content": "Crow"}',
            "rejected": "{'from': 'gpt', 'value': 'Stone'}",
        },
        {"input": {"messages": BIRD}, "preferred_output": CROW, "non_preferred_output": STONE},
        {"messages": BIRD + CROW, "rejected_response": "Stone"},
        {"messages": BIRD + CROW, "rejected_messages": BIRD + STONE},
        {"context": BIRD, "response1": "Stone", "response2": "Crow", "overall_preference": 3, "domain": "birds"},
        {"conversation_a": BIRD + STONE, "conversation_b": BIRD + CROW, "winner": "model_b", "turn": 1},
        {"prompt": '["Bird?"]', "response_a": '["Crow"]', "response_b": '["Stone"]', "winner_model_a": 1}
        | {"winner_model_b": 0, "winner_tie": 0},
    ],
    ids=[
        "axolotl",
        "axolotl object",
        "sharegpt",
        "ultrainteract",
        "capital roles",
        "spelled out",
        "one message spelled out",
        "openai",
        "swift response",
        "swift messages",
        "helpsteer3",
        "arena",
        "arena 55k",
    ],
)
def test_layouts_of_chats_give_the_pair_that_they_mean(row: dict[str, Any]):
    rows = read(row)
    assert rows[0] == Row(BIRD, ("Crow", "Stone"), source="rows.jsonl:1")
    assert not rows.skipped


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Bird?", "response_j": "Crow", "response_k": "Stone", "qid": 1, "metadata": ["u"]},
        {"prompt": "Bird?", "response_1": "Stone", "response_2": "Crow", "preference_strength": 2},
        {"prompt": "Bird?", "response_1": "Crow", "response_2": "Stone", "preference_strength": -1},
        {"prompt": "Bird?", "response_0": "Stone", "response_1": "Crow", "better_response_id": 1},
        {"instruction": "Bird?", "output_1": "Stone", "output_2": "Crow", "preference": 2},
        {"history": "Bird?", "human_ref_A": "Crow", "human_ref_B": "Stone", "labels": 1, "score_A": 9, "score_B": 1},
        {"question": "Bird?", "answer_a": "Stone", "answer_b": "Crow", "winner": "b"},
        {"question": "Bird?", "answer_a": "Crow", "answer_b": "Stone", "winner": "x-9", "model_a": "x-9"},
        {"question": "Bird?", "answer_a": "Crow", "answer_b": "Stone", "winner": "Crow"},
        {
            "question": "Bird?",
            "answer_a": "Stone",
            "answer_b": "Crow",
            "winner": "m-a",
            "model_a": "m",
            "model_b": "m-a",
        },
        {"prompt": "Bird?", "response_1": "Crow", "response_2": "Stone", "winner": "model_a"},
        {"prompt": "Bird?", "response_1": "Stone", "response_2": "Crow", "winner": "m", "model_a": "n", "model_b": "m"},
        {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone", "chosen_score": 9.0},
        {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone", "labelling_prompt": [user("Judge these")]},
        {"instruction": "Bird?", "input": "", "chosen": "Crow", "rejected": "Stone"},
        {"input": "Bird?", "chosen_response": "Crow", "rejected_response": "Stone"},
        {"query": "Bird?", "response": "Crow", "rejected_response": "Stone"},
    ],
)
def test_layouts_of_text_give_the_pair_that_they_mean(row: dict[str, Any]):
    assert first(row) == Row("Bird?", ("Crow", "Stone"), source="rows.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Bird?", "answers": [{"answer": "Stone", "rank": 2}, {"answer": "Crow", "rank": 1}]},
        {"instruction": "Bird?", "completions": [{"response": "Stone", "overall_score": -2, "model": "m"}]}
        | {"completions": [{"response": "Stone", "overall_score": -2}, {"response": "Crow", "overall_score": -1}]},
        {"question": "Bird?", "answers": [{"text": "Stone", "pm_score": -2}, {"text": "Crow", "pm_score": -1}]},
        {"question": "Bird?", "answer_0": "Stone", "answer_1": "Crow", "score_0": -2, "score_1": -1.0},
        {"input": "Bird?", "generations": ["Stone", "Crow"], "ratings": [-2, -1]},
        {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone", "chosen_rating": -1, "rejected_rating": -2},
        {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone", "rating_chosen": -1, "rating_rejected": -2},
        {"prompt": "Bird?", "responses": '["Stone", "Crow"]', "rewards": "[-2, -1]"},
        {"instruction": "Bird?", "generations": ["Stone", "Crow"], "score": [-2.0, -1.0]},
    ],
)
def test_ratings_become_rewards(row: dict[str, Any]):
    assert first(row) == Row("Bird?", ("Crow", "Stone"), rewards=(-1.0, -2.0), source="rows.jsonl:1")


def test_a_row_without_a_winner_is_skipped_and_counted():
    won = {"question": "Q", "answer_a": "x", "answer_b": "y", "winner": "model_a"}
    rows = read(won, won | {"winner": "tie (bothbad)"}, won | {"winner": None}, won | {"winner": "draw"})
    assert len(rows) == 1
    assert rows.skipped == {"rows without a winner": 3}
    strong = {"prompt": "Q", "response_1": "x", "response_2": "y", "preference_strength": 1}
    assert read(strong, strong | {"preference_strength": 0}).skipped == {"rows without a winner": 1}


def test_winners_numbers_are_understood_from_the_first_rows_or_refused():
    won = {"question": "Q", "answer_a": "x", "answer_b": "y", "winner": 1}
    assert [row.responses[0] for row in read(won, won | {"winner": 0})] == ["y", "x"]
    assert [row.responses[0] for row in read(won, won | {"winner": 2})] == ["x", "y"]
    assert "not clear whether 0 or 1 means `answer_a`" in refusal(won, won)
    assert "`winner` holds 3, but needs the number of the better response" in refusal(
        won, won | {"winner": 2}, won | {"winner": 3}
    )
    assert "needs the name of the better response (answer_a, answer_b)" in refusal(won | {"winner": "maybe"})


def test_an_instruction_and_its_input_are_one_prompt():
    rows = read(
        {"instruction": "Translate", "input": "Vogel", "chosen": "bird", "rejected": "fish"},
        {"instruction": "Name a bird", "input": "", "chosen": "Crow", "rejected": "Stone"},
    )
    assert [row.prompt for row in rows] == ["Translate\nVogel", "Name a bird"]
    text = first({"instruction": "Translate", "input": "Vogel", "output": "bird"}, kind="texts")
    assert text == Row("Translate\nVogel", ("bird",), source="rows.jsonl:1")


def test_a_question_with_a_system_message_or_a_history_makes_all_chats():
    orca = {"system": "Be kind", "question": "Bird?", "chosen": "Crow", "rejected": "Stone"}
    rows = read(orca | {"system": ""}, orca)
    assert [row.prompt for row in rows] == [BIRD, [system("Be kind"), *BIRD]]
    assert rows[0].responses == ("Crow", "Stone")
    alpaca = {"instruction": "And now?", "output": "Rook", "history": [["Bird?", "Crow"]], "system": "Be kind"}
    assert first(alpaca, kind="texts").prompt == [system("Be kind"), *BIRD, *CROW, user("And now?")]


def test_the_steps_that_a_step_pair_continues_begin_the_answer():
    row = {"prompt": "3*4+1?", "initial_reason_steps": "Step 1: 12.\nStep 2:", "chosen": " 13.", "rejected": " 14."}
    rows = read(row | {"answer": "13", "full_chosen": " 13. Done"})
    assert rows[0].prompt == [user("3*4+1?"), assistant("Step 1: 12.\nStep 2:")]
    assert rows[0].responses == (" 13.", " 14.")
    assert rows.unread == ("answer", "full_chosen")


def test_a_prompt_that_ends_with_the_assistant_stays_a_prefill():
    row = {"prompt": [*BIRD, assistant("It is")], "chosen": [assistant(" a crow")], "rejected": [assistant(" a stone")]}
    assert first(row) == Row([*BIRD, assistant("It is")], (" a crow", " a stone"), source="rows.jsonl:1")


def test_turns_that_prompt_and_responses_share_are_read_once():
    turns = [user("A?"), assistant("a"), user("B?")]
    row = {"prompt": turns, "chosen": [user("B?"), *CROW], "rejected": [user("B?"), *STONE]}
    assert first(row).prompt == turns
    message = refusal({"prompt": turns, "chosen": [user("C?"), *CROW], "rejected": [user("C?"), *STONE]})
    assert "the responses begin with a user's turn" in message


def test_a_system_message_of_the_responses_comes_before_the_prompt():
    row = {"prompt": "Bird?", "chosen": [system("Be x"), *CROW], "rejected": [system("Be x"), *STONE]}
    assert first(row).prompt == [system("Be x"), *BIRD]
    assert first(row | {"prompt": BIRD}).prompt == [system("Be x"), *BIRD]
    assert "begin with a system message" in refusal(row | {"prompt": [system("Be y"), *BIRD]})


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_pairs_may_differ_in_their_thoughts_alone(key: str):
    chosen, rejected = assistant("noon", **{key: "clock"}), assistant("noon", **{key: "lazy"})
    rows = read(
        {"prompt": [user("Time?")], "chosen": [chosen], "rejected": [rejected]},
        {
            "prompt": [user("Time?")],
            "chosen": [assistant("a", **{key: ""})],
            "rejected": [assistant("b", tool_calls=[])],
        },
    )
    assert rows[0].responses == (chosen, rejected)
    assert rows[1].responses == ("a", "b")


# --- turns ---


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


def test_turns_of_weight_zero_are_read_but_not_trained_on():
    chat = [*BIRD, assistant("Stone", weight=0), user("Sure?"), assistant("Crow", weight=1)]
    (row,) = read({"messages": chat}, kind="texts")
    assert row.prompt == [*BIRD, *STONE, user("Sure?")]
    assert row.responses == ("Crow",)
    assert read({"messages": chat[:2]}, {"messages": chat}, kind="texts").skipped == {"rows without a response": 1}


def test_labels_go_with_chats_and_instructions():
    chat = {"conversations": [{"from": "human", "value": "Bird?"}, {"from": "gpt", "value": "Crow"}], "kto_tag": False}
    assert first(chat, kind="labelled") == Row(BIRD, ("Crow",), labels=(False,), source="rows.jsonl:1")
    flat = {"instruction": "Bird?", "input": "", "output": "Crow", "label": "True"}
    assert first(flat, kind="labelled") == Row("Bird?", ("Crow",), labels=(True,), source="rows.jsonl:1")


# --- nothing is lost unseen ---


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


# --- messages ---

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


def test_an_unknown_role_is_named():
    message = refusal({"prompt": [{"role": "narrator", "content": "Once"}]}, kind="prompts")
    assert 'rows.jsonl:1: a message in `prompt` has the role "narrator"' in message
    assert "user" in message


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


# --- columns that would be lost, and advice that works ---

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


def test_a_list_of_ratings_ranks_the_generations():
    row = {"instruction": "Bird?", "generations": ["Stone", "Crow"], "rating": [2.0, 5.0]}
    found = first(row)
    assert (found.responses, found.rewards) == (("Crow", "Stone"), (5.0, 2.0))


THOUGHT = {"question": "1+1?", "solution": "2", "thinking_trajectories": ["One and one."]}
PAIR = {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone"}
MULTI = {"conversation_a": BIRD + CROW + BIRD + CROW, "conversation_b": BIRD + STONE + BIRD + CROW, "winner": "model_a"}


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (
            THOUGHT,
            "texts",
            r"completion: '<think>\n{thinking_trajectories.0}\n</think>\n\n{solution}'}, or leave it out",
        ),
        (
            {"segments": [{"label": True, "text": "a"}]},
            "texts",
            "`segments` is not read: its texts are written for one",
        ),
        ({"message_tree_id": "t", "text": "a"}, "texts", "`message_tree_id` shows that the rows are messages"),
        (
            {"Prompt": "Q", "chosen ": "a", "rejected": "b"},
            "preferences",
            "columns={prompt: 'Prompt', chosen: 'chosen '}",
        ),
        (PAIR | {"images": ["a.png"], "audio": "a.wav"}, "preferences", "`images`, `audio` hold"),
        (PAIR | {"images": ["a.png"], "audio": "a.wav"}, "preferences", "ignore_columns=[images, audio]"),
        (
            PAIR | {"earlier": BIRD},
            "preferences",
            "If it holds earlier turns, read them with columns={history: earlier}",
        ),
        (PAIR | {"documents": ["A crow."]}, "preferences", "columns={documents: documents}"),
        (PAIR | {"passages": ["A crow."]}, "preferences", r"columns={prompt: '{passages.0}\n{prompt}'}"),
        (PAIR | {"facts": {"one": "Crows fly."}}, "preferences", r"columns={prompt: '{facts.one}\n{prompt}'}"),
        (MULTI, "preferences", "columns={response_1: conversation_a.1.content, …}"),
    ],
)
def test_a_refusal_says_what_to_do(row: dict[str, Any], kind: Any, words: str):
    assert words in refusal(row, kind=kind)


def test_parts_of_a_turn_cannot_be_left_out():
    part = {"begin_offset": 0, "end_offset": 3, "train": False}
    assert "trained on as a whole" in refusal(
        {"messages": [*BIRD, assistant("Crow", train_detail=[part])]}, kind="texts"
    )
    whole = assistant("Crow", train_detail=[part | {"train": True}])
    assert first({"messages": [*BIRD, whole]}, kind="texts").responses == ("Crow",)


def test_thoughts_are_put_before_the_answer_as_the_message_says():
    columns = {"prompt": "question", "completion": r"<think>\n{thinking_trajectories.0}\n</think>\n\n{solution}"}
    assert first(THOUGHT, kind="texts", columns=columns).responses == ("<think>\nOne and one.\n</think>\n\n2",)
    assert first(THOUGHT, kind="texts", ignore_columns=["thinking_trajectories"]).responses == ("2",)


def test_a_first_row_without_the_prompt_of_the_others_is_refused():
    assert "rows.jsonl:1: `prompt` is null, but rows.jsonl:2 has one" in refusal(PAIR | {"prompt": None}, PAIR)


@pytest.mark.parametrize(
    ("label", "expected"), [("yes", True), ("bad", False), ("desirable", True), ("Undesirable", False), ("0.0", False)]
)
def test_labels_may_be_words(label, expected):
    found = first({"prompt": "Bird?", "completion": "Crow", "label": label}, kind="labelled")
    assert found.labels == (expected,)
