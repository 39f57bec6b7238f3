"""Small data sets with the columns of public ones: each gives the row that its author means."""

from typing import Any

import pytest
from reading import BIRD, CROW, STONE, assistant, first, read, refusal, system, user

from lit_align.data.formats import Row


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
        {"question": "Bird?", "answer_a": "Stone", "answer_b": "Crow", "winner": "A<B"},
        {"question": "Bird?", "answer_a": "Crow", "answer_b": "Stone", "winner": "[[A>>B]]"},
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
        {"question": "Bird?", "answers": {"text": ["Stone", "Crow"], "pm_score": [-2, -1]}},
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
    assert read(won, won | {"winner": "A=B"}).skipped == {"rows without a winner": 1}
    assert read(strong, strong | {"preference_strength": 0}).skipped == {"rows without a winner": 1}


def test_a_turn_without_an_answer_is_skipped_and_counted():
    """As lmsys-arena-human-preference-55k writes it."""
    row = {"prompt": '["Bird?"]', "response_a": '["Crow"]', "response_b": '["Stone"]', "winner_model_a": 1}
    row |= {"winner_model_b": 0, "winner_tie": 0}
    rows = read(row, row | {"response_b": "[null]"}, row | {"response_b": "[None]"})
    assert len(rows) == 1
    assert rows.skipped == {"rows with an empty turn": 2}


def test_winners_numbers_are_understood_from_the_first_rows_or_refused():
    won = {"question": "Q", "answer_a": "x", "answer_b": "y", "winner": 1}
    assert [row.responses[0] for row in read(won, won | {"winner": 0})] == ["y", "x"]
    assert [row.responses[0] for row in read(won, won | {"winner": 2})] == ["x", "y"]
    assert "not clear whether 0 or 1 means `answer_a`" in refusal(won, won)
    assert "`winner` holds 3, but needs the number of the better response" in refusal(
        won, won | {"winner": 2}, won | {"winner": 3}
    )
    assert "needs the name of the better response (answer_a, answer_b)" in refusal(won | {"winner": "maybe"})


def test_a_letter_names_a_response_even_if_another_consists_of_it():
    row = {"question": "Which?", "answer_a": "B", "answer_b": "A", "winner": "a"}
    assert first(row).responses == ("B", "A")
    assert first(row | {"answer_a": "Yes", "winner": "Yes"}).responses == ("Yes", "A")


def test_an_instruction_and_its_input_are_one_prompt():
    rows = read(
        {"instruction": "Name a bird", "input": "", "chosen": "Crow", "rejected": "Stone"},
        {"instruction": "Translate", "input": "Vogel", "chosen": "bird", "rejected": "fish"},
    )
    assert [row.prompt for row in rows] == ["Name a bird", "Translate\nVogel"]
    assert rows.description.endswith("(columns instruction, chosen, rejected, input)")
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


def test_a_list_of_ratings_ranks_the_generations():
    row = {"instruction": "Bird?", "generations": ["Stone", "Crow"], "rating": [2.0, 5.0]}
    found = first(row)
    assert (found.responses, found.rewards) == (("Crow", "Stone"), (5.0, 2.0))
