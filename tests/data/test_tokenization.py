"""Prompt + response become the tokens of the whole text, within the limits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tiny_tokenizers import KINDS, byte_level, llama_legacy
from tokenizers import AddedToken, normalizers

from lit_align.data.formats.rows import Answer, Row, Text
from lit_align.data.tokenization import PreferenceTokenizer, TokenizedRow
from lit_align.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}]


def small(**options) -> PreferenceTokenizer:
    chat = options.pop("chat", True)
    return PreferenceTokenizer(byte_tokenizer(chat), **options)


def tokens_of(made: PreferenceTokenizer, row: Row) -> TokenizedRow:
    found = made.row(row)
    assert found is not None
    return found


def tokens(made: PreferenceTokenizer, prompt: Text, *responses: Answer) -> TokenizedRow:
    return tokens_of(made, Row(prompt, responses, source="rows.jsonl:1"))


def response(made: PreferenceTokenizer, prompt: Text, text: str) -> str:
    return made.tokenizer.decode(tokens(made, prompt, text).response_ids[0])


def pieces(made: PreferenceTokenizer, ids: list[int]) -> list[str]:
    return made.tokenizer.convert_ids_to_tokens(ids)


def test_a_chat_is_rendered_once_with_the_assistants_turn_opened():
    made = small()
    ids = made.prompt_ids(Row(CHAT))
    assert made.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens(made, CHAT, "ok").prompt_ids == ids


def test_a_reply_ends_the_turn_and_a_text_ends_the_text():
    made = small()
    assert response(made, CHAT, "ok") == "ok<|im_end|>"
    assert response(made, "Hi", "ok") == "ok<|endoftext|>"
    assert made.end_ids() == [0, 2]
    assert small(chat=False).end_ids() == [0]


@pytest.mark.parametrize("prompt", ["Hi", CHAT])
def test_a_tokenizer_without_an_end_of_text_is_refused(prompt):
    made = small()
    made.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no eos_token. Set data.tokenizer"):
        PreferenceTokenizer(made.tokenizer).row(Row(prompt, ("yes", "no")))


def test_sampling_also_ends_at_the_special_tokens_that_the_model_names():
    """GLM-4's turns end with the <|user|> of the next; 99 is the number of a letter here."""
    assert small(model_ends=lambda: [1, 0, 99]).end_ids() == [0, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_verbatim_text_has_only_its_own_tokens(kind):
    """The trained parts and those before them spell the whole; nothing is put at its beginning or end."""
    made = PreferenceTokenizer(KINDS[kind]())
    parts = ["<s>[INST] Name a bird.", " [/INST]", " A crow", ".", "</s>"]
    for start in range(5):
        for end in range(start + 1, 6):
            prompt, text = "".join(parts[:start]), "".join(parts[start:end])
            row = Row(prompt, (text,), source="rows.jsonl:1", is_verbatim=True)
            made.check(row)
            found = tokens_of(made, row)
            whole = made.tokenizer(prompt + text, add_special_tokens=False).input_ids
            assert made.tokenizer.decode(found.prompt_ids + found.response_ids[0]) == made.tokenizer.decode(whole)
            if not start:  # the first token, which nothing comes before
                assert (found.prompt_ids, found.response_ids[0]) == (whole[:1], whole[1:])
            else:
                alone = made.tokenizer(prompt, add_special_tokens=False).input_ids
                assert made.tokenizer.decode(found.prompt_ids) == made.tokenizer.decode(alone)
    made = PreferenceTokenizer(KINDS[kind](), wraps_prompts=True)
    assert tokens_of(made, row) == found


def test_a_verbatim_text_of_one_token_is_dropped_and_counted():
    made = small()
    assert made.row(Row("", ("a",), is_verbatim=True)) is None
    assert made.counts == {"rows of one token without a prompt, dropped": 1}


def test_an_empty_prompt_begins_with_a_token_of_its_own():
    assert small().prompt_ids(Row("")) == [0]
    assert tokens(small(), "", "a").prompt_ids == [0]


def test_a_beginning_of_sequence_that_is_token_0_is_one():
    made = small()
    made.tokenizer.bos_token, made.tokenizer.eos_token = "<|endoftext|>", "<|im_start|>"
    assert (made.tokenizer.bos_token_id, made.tokenizer.eos_token_id) == (0, 1)
    assert made.prompt_ids(Row("")) == [0]


def test_the_turns_end_may_be_a_token_that_is_only_marked_as_special():
    tokenizer = byte_tokenizer(chat=False)  # as Phi-3's: <|end|> is special, but no role's token
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}"
    made = PreferenceTokenizer(tokenizer)
    assert response(made, CHAT, "ok") == "ok<|end|>"
    assert [tokenizer.decode([token]) for token in made.end_ids()] == ["<|endoftext|>", "<|end|>"]
    made.prompt_ids(Row([{"role": "user", "content": "forged<|end|>"}]))
    assert made.counts == {"chats with special tokens in their text": 1}


def test_an_end_of_turn_that_is_followed_by_the_texts_end_is_not_doubled():
    """As ChatML of some models: <|im_end|> after each turn, and <|endoftext|> at once after the last."""
    made = small(chat=False)
    made.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{{ '\n' if not loop.last }}{% endfor %}"
        "{{ eos_token }}"
    )
    assert response(PreferenceTokenizer(made.tokenizer), CHAT, "ok") == "ok<|im_end|>"


def test_a_chat_that_its_template_refuses_is_an_error_that_names_the_row():
    made = small()
    made.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    words = r"rows.jsonl:1: the chat template .* refuses the messages \(system, user\) at message 1: System role not "
    with pytest.raises(UserError, match=words):
        made.prompt_ids(Row([{"role": "system", "content": "S"}, *CHAT], source="rows.jsonl:1"))


def test_no_beginning_of_sequence_is_doubled():
    made = small()
    made.tokenizer.bos_token = "<|im_start|>"
    ids = made.prompt_ids(Row(CHAT))
    assert ids is not None
    assert ids[:2].count(made.tokenizer.bos_token_id) == 1


def test_a_long_prompt_is_an_error_or_is_dropped_or_cut_and_counted():
    row = Row("long text", source="rows.jsonl:3")
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: the prompt has 9 tokens, but max_prompt_length=4. Raise the limit, or"
    ):
        small(max_prompt_length=4).prompt_ids(row)
    dropping = small(max_prompt_length=4, long_prompts="drop")
    assert dropping.prompt_ids(row) is None
    assert dropping.counts == {"prompts too long, dropped": 1}
    cutting = small(max_prompt_length=4, long_prompts="truncate_left")
    assert cutting.tokenizer.decode(cutting.prompt_ids(row)) == "text"
    assert cutting.counts == {"prompts too long, cut": 1}


def test_a_long_response_loses_its_end_and_is_counted():
    made = small(max_response_length=3)
    assert response(made, "Hi", "abcdef") == "abc"
    assert made.counts == {"responses too long, cut": 1}


def test_a_row_beyond_the_models_positions_is_refused_dropped_or_cut():
    row = Row("a long text", ("1234", "12"), source="rows.jsonl:3")  # 11 and 4 tokens and the end
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: the prompt has 11 tokens, but the model '' reads 12 with its response"
    ):
        small(positions=12).row(row)
    dropping = small(positions=12, long_prompts="drop")
    assert dropping.row(row) is None
    assert dropping.counts == {"prompts too long, dropped": 1}
    cutting = small(positions=12, long_prompts="truncate_left")
    cut = cutting.row(row)
    assert cut is not None
    assert cutting.tokenizer.decode(cut.prompt_ids) == "ng text"
    assert small(positions=16).row(row) is not None
    with pytest.raises(UserError, match=r"rows.jsonl:3: a response of 5 tokens leaves no room .*max_response_length"):
        small(positions=5).row(row)
    dropping = small(positions=5, long_prompts="drop")
    assert dropping.row(row) is None
    assert dropping.counts == {"prompts too long, dropped": 1}


def test_a_prompt_cut_at_two_limits_is_counted_once():
    made = small(max_prompt_length=9, positions=12, long_prompts="truncate_left")
    assert made.tokenizer.decode(tokens(made, "a long text", "1234").prompt_ids) == "ng text"
    assert made.counts == {"prompts too long, cut": 1}


@pytest.mark.parametrize(("prompt", "end"), [("Hi", "<|endoftext|>"), (CHAT, "<|im_end|>")])
def test_no_end_is_added_to_a_response_that_was_cut(prompt, end):
    made = small()
    row = Row(prompt, ("ok", "not o"), cut=(False, True), source="rows.jsonl:1")
    assert [made.tokenizer.decode(ids) for ids in tokens_of(made, row).response_ids] == [f"ok{end}", "not o"]
    made.check(row)
    begun = Row([*CHAT, {"role": "assistant", "content": "I "}], ("am",), cut=(True,), source="rows.jsonl:1")
    assert made.tokenizer.decode(tokens_of(made, begun).response_ids[0]) == "am"


def test_a_plan_of_calls_that_the_template_leaves_out_is_an_error():
    answer = {"role": "assistant", "content": "yes", "tool_plan": "I look it up."}
    with pytest.raises(UserError, match="leaves out or changes the response's `tool_plan`"):
        small().row(Row(CHAT, (answer,), source="rows.jsonl:3"))


def test_a_chat_needs_a_chat_template():
    with pytest.raises(UserError, match=r"rows.jsonl:1: the prompt is a chat, but .* has no chat template. Set one"):
        small(chat=False).prompt_ids(Row(CHAT, source="rows.jsonl:1"))


def test_plain_prompts_can_be_a_users_turn():
    made = small(wraps_prompts=True)
    assert tokens(made, "Hi", "ok") == tokens(small(), CHAT, "ok")
    assert made.prompt_ids(Row("Hi")) == made.prompt_ids(Row(CHAT))
    assert tokens(made, "", "ok") == tokens(small(), "", "ok")  # a text without a prompt stays one


def test_a_prompt_that_ends_with_the_assistants_words_is_continued():
    made = small()
    prompt = [*CHAT, {"role": "assistant", "content": "Well, "}]
    found = tokens(made, prompt, "yes")
    assert made.tokenizer.decode(found.prompt_ids).endswith("<|im_start|>assistant\nWell, ")
    assert made.tokenizer.decode(found.response_ids[0]) == "yes<|im_end|>"
    assert made.prompt_ids(Row(prompt)) == found.prompt_ids


@given(st.text())
def test_any_response_comes_back_from_its_tokens(text):
    assert response(small(), "Hi", text) == text + "<|endoftext|>"


# --- plain text: the tokens of the whole ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_the_whole_are_cut_where_the_response_begins(kind):
    made = PreferenceTokenizer(KINDS[kind]())
    found = tokens(made, "TL;DR:", " yes", " no")
    own = made.tokenizer("TL;DR: yes").input_ids
    assert found.prompt_ids + found.response_ids[0][:-1] == own
    words = [made.tokenizer.decode(ids[:-1]).strip() for ids in found.response_ids]
    assert words == ["yes", "no"]
    assert len(found.response_ids[0]) == 2  # ▁yes and its end


def test_sentencepiece_adds_no_space_within_a_text():
    made = PreferenceTokenizer(llama_legacy())
    assert (
        pieces(made, tokens(made, "user:\n", "yes").response_ids[0]) == ["y", "es", "</s>"]
        or pieces(made, tokens(made, "user:\n", "yes").response_ids[0])[0] != "▁yes"
    )
    own = made.tokenizer("user:\nyes").input_ids
    found = tokens(made, "user:\n", "yes")
    assert not pieces(made, found.response_ids[0])[0].startswith("▁")
    assert found.prompt_ids + found.response_ids[0][:-1] == own
    alone = made.tokenizer("yes", add_special_tokens=False).input_ids
    assert pieces(made, alone)[0].startswith("▁")  # what a response tokenized by itself would begin with


def test_a_token_that_spans_both_is_made_of_prompt_and_rest_apart():
    made = PreferenceTokenizer(llama_legacy())
    found = tokens(made, "the ans", "wer")
    assert pieces(made, made.tokenizer("the answer").input_ids)[-1] == "▁answer"
    assert not pieces(made, found.response_ids[0])[0].startswith("▁")
    assert made.tokenizer.decode(found.prompt_ids + found.response_ids[0][:-1]) == "<s> the answer"
    spaced = tokens(PreferenceTokenizer(byte_level()), "yes, ", "yes")  # the whole has one token for " yes"
    assert pieces(PreferenceTokenizer(byte_level()), [*spaced.prompt_ids[-1:], *spaced.response_ids[0]])[0] == "Ġ"


def test_a_prompt_has_the_tokens_that_it_has_within_the_whole():
    made = PreferenceTokenizer(byte_level())
    own = made.tokenizer("a\n\nb").input_ids
    alone = made.tokenizer("a\n\n").input_ids
    assert own[: len(alone)] != alone  # otherwise this shows nothing
    assert (found := tokens(made, "a\n\n", "b")).prompt_ids + found.response_ids[0][:-1] == own


def test_rows_that_no_tokens_spell_are_dropped_and_counted():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # and a response of tokens that it never makes
    made = PreferenceTokenizer(tokenizer)
    made._continuation = lambda *_: None  # type: ignore[method-assign]
    assert made.row(Row("yes, ", ("yes",))) is None
    assert made.counts == {"rows whose tokens span prompt and response, dropped": 1}


WORDS = [
    "TL;DR:",
    " yes",
    "yes",
    "\n",
    "\n\n",
    " ",
    "  ",
    "the answer",
    "é",
    "e\u0301",
    "😀",
    "中",
    "\t",
    "1",
    "12",
    "'",
]
JOINED = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("kind", KINDS)
@given(prompt=st.one_of(JOINED, st.text(max_size=12)), text=st.one_of(JOINED, st.text(max_size=12)))
def test_prompt_and_response_spell_the_whole_whatever_the_tokenizer(kind, prompt, text):
    made = PreferenceTokenizer(tokenizer_of(kind))
    prompt_ids, (ids,) = tokens(made, prompt, text)
    whole = made.tokenizer(prompt + text, add_special_tokens=False).input_ids
    begin = made.tokenizer.bos_token_id
    ours = [*prompt_ids, *ids[:-1]][(begin is not None) or not prompt :]
    decode = made.tokenizer.decode
    assert decode(ours) == decode(whole)
    assert decode(ours).lstrip(" ") == (prompt + text).lstrip(" ")  # some have no token for a text's first space
    alone = made.tokenizer(prompt, add_special_tokens=False).input_ids
    if whole[: len(alone)] == alone:  # the boundary allows it
        assert ours == whole


_MADE: dict = {}


def tokenizer_of(kind: str):
    if kind not in _MADE:
        _MADE[kind] = KINDS[kind]()
    return _MADE[kind]


def test_a_chat_of_sentencepiece_has_the_templates_tokens():
    tokenizer = llama_legacy()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    made = PreferenceTokenizer(tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    found = tokens(made, chat, "yes")
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert found.prompt_ids + found.response_ids[0] == tokenizer(whole, add_special_tokens=False).input_ids
    assert pieces(made, found.response_ids[0])[0] == "▁yes"
    assert made.prompt_ids(Row(chat)) == found.prompt_ids
