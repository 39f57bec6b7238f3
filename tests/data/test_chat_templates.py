"""Prompt + response are the chat template's own tokens, for each template that TRL ships, or the row is refused."""

import copy
import importlib.util
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, byte_tokenizer
from tokenizers import AddedToken

from lit_align.data.formats.rows import Row
from lit_align.data.tokenization import PreferenceTokenizer, notes_on
from lit_align.errors import UserError

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin or "").parent / "chat_templates" if TRL else Path()
OF_IMAGES = ("idefics3", "llava_next", "smolvlm")  # they read content as a list of parts only
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if TRL else []
SPECIAL = re.compile(r"<\|[^|<>\s{}]+\|>|</?s>|<(?:start|end)_of_turn>|<｜[^｜<>]+｜>|<turn\|>|<\|turn>")
END = re.compile(r"im_end|eot|return|end_of_turn|end▁of▁sentence|END_OF_TURN|turn\|")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HI = [message("user", "Hi?")]
CASES = {
    "plain": Row(HI, ("yes", "no")),
    "thoughts": Row(
        HI,
        (
            message("assistant", "yes", reasoning_content="hm, let me see"),
            message("assistant", "no", reasoning_content="well"),
        ),
    ),
    "thoughts in the text": Row(HI, ("<think>\nhm\n</think>\n\nyes", "<think>\nwell\n</think>\n\nno")),
    "thoughts in one": Row(HI, ("<think>\nhm\n</think>\n\nyes", "no")),
    "several turns": Row([*HI, message("assistant", "Hello."), message("user", "And?")], ("yes", "no")),
    "a second message": Row([*HI, message("assistant", "Hello.")], ("yes", "no"), is_new_turn=True),
    "system": Row([message("system", "Be short."), *HI], ("yes", "no")),
    "tools": Row(HI, (CALL, "no"), tools=TOOLS),
    "result of a tool": Row([*HI, CALL, message("tool", "sunny", name="weather")], ("yes", "no"), tools=TOOLS),
}
REFUSALS = re.compile(
    r"leaves out or changes (a part of the response|the response's `(reasoning_content|tool_calls)`)"
    r"|(alternat|assistant) at message 2|must alternate"
    r"|has tools, but the chat template|leaves out message \d \((system|tool)\)|System role not supported"
)


@cache
def made_of(name: str) -> PreferenceTokenizer:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(chat=False)
    specials = sorted(set(SPECIAL.findall(template)))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|im_start|>"
    ends = [text for text in specials if END.search(text)]
    tokenizer.eos_token = ends[0] if ends else "<|endoftext|>"
    return PreferenceTokenizer(tokenizer)


def as_read_by(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, for templates of models of images with their content as parts."""
    if not name.startswith(OF_IMAGES):
        return messages
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]


def whole_of(name: str, made: PreferenceTokenizer, row: Row, answer: Any) -> list[int]:
    """The template's own tokens of the prompt and an answer."""
    assert isinstance(row.prompt, list)
    said = message("assistant", answer) if isinstance(answer, str) else answer
    messages = as_read_by(name, [*row.prompt, said])
    text = made.tokenizer.apply_chat_template(messages, tools=row.tools, tokenize=False)
    return list(made.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_template_or_refused(name, case):
    made, row = made_of(name), CASES[case]
    try:
        found = made.row(row)
    except UserError as error:
        assert REFUSALS.search(str(error)), error  # noqa: PT017  # most rows are not refused
        return
    assert found is not None
    for answer, ids in zip(row.responses, found.response_ids, strict=True):
        whole = whole_of(name, made, row, answer)
        size = len(found.prompt_ids) + len(ids)
        if size <= len(whole):
            assert found.prompt_ids + ids == whole[:size]
            rest = made.tokenizer.decode(whole[size:], skip_special_tokens=True)
            assert not rest.strip()
        else:  # a template that puts no end: one is added
            assert found.prompt_ids + ids == [*whole, made.tokenizer.eos_token_id]
        assert ids[-1] in made._special_ids
        said = answer if isinstance(answer, str) else answer["content"]
        assert said.rpartition("\n")[2] in made.tokenizer.decode(ids)
        assert made.tokenizer.decode(found.prompt_ids).count("Hi?") == 1


@pytest.mark.parametrize("name", NAMES)
def test_sampling_reads_the_templates_generation_prompt(name):
    made = made_of(name)
    for row in (CASES["plain"], CASES["several turns"], CASES["result of a tool"]):
        if row.tools and "tools" not in made.tokenizer.chat_template:
            continue
        text = made.tokenizer.apply_chat_template(
            as_read_by(name, row.prompt), tools=row.tools, add_generation_prompt=True, tokenize=False
        )
        assert made.prompt_ids(row) == made.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_training_reads_the_sampled_prompt_without_missing_thoughts(name):
    """R1's and Nemotron's generation prompts open thoughts, which they render otherwise before a plain answer."""
    made, row = made_of(name), CASES["plain"]
    found = made.row(row)
    assert found is not None
    assert (found.prompt_ids == made.prompt_ids(row)) != name.startswith(("deepseek", "nemotron"))


@pytest.mark.parametrize("name", NAMES)
def test_a_template_ends_prompts_as_before_an_answer_if_told_to(name):
    """As `before_answer` changes it; nothing but the generation prompt changes."""
    own = made_of(name)
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.chat_template = own.renderer.template.before_answer
    made = PreferenceTokenizer(tokenizer)
    for row in (CASES["plain"], CASES["several turns"], CASES["system"]):
        try:
            expected = own.row(row)
        except UserError:
            continue
        whole = own.tokenizer.decode(whole_of(name, own, row, "yes"))
        assert whole_of(name, made, row, "yes") == whole_of(name, own, row, "yes")
        prompt = made.tokenizer.decode(made.prompt_ids(row))
        assert prompt == whole.rpartition("yes")[0].rstrip(" ")
        if expected.prompt_ids != own.prompt_ids(row):
            assert made.row(row) == expected


@pytest.mark.skipif(not TRL, reason="the templates are TRL's")
@pytest.mark.parametrize(
    ("name", "case", "prompt", "response"),
    [
        ("qwen3", "plain", "<|im_start|>assistant\n", "<think>\n\n</think>\n\nyes<|im_end|>"),
        ("qwen3_5_think", "plain", "assistant\n<think>\n", "\n</think>\n\nyes<|im_end|>"),
        ("qwen3_5_think", "thoughts", "assistant\n<think>\n", "hm, let me see\n</think>\n\nyes<|im_end|>"),
        ("qwen3_5_nothink", "plain", "<think>\n\n</think>\n\n", "yes<|im_end|>"),
        ("qwen3_5_nothink", "thoughts in the text", "assistant\n<think>\n", "hm\n</think>\n\nyes<|im_end|>"),
        ("nemotron_3_nano", "plain", "assistant\n<think></think>", "yes<|im_end|>"),
        ("nemotron_3_nano", "thoughts", "assistant\n<think>\n", "hm, let me see\n</think>\nyes<|im_end|>"),
        ("nemotron_3_nano", "thoughts in one", "assistant\n<think>", "\nhm\n</think>\n\nyes<|im_end|>"),
        ("deepseek_r1_distill", "plain", "Hi?<｜Assistant｜>", "yes<｜end▁of▁sentence｜>"),
        ("glm4moe", "plain", "<|assistant|>", "\n<think></think>\nyes<|endoftext|>"),
        ("gptoss", "plain", "<|start|>assistant", "<|channel|>final<|message|>yes<|return|>"),
        ("cohere2", "plain", "<|START_RESPONSE|>", "yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("phi3", "plain", "<|assistant|>\n", "yes<|end|>"),
    ],
)
def test_where_the_response_begins_and_ends(name, case, prompt, response):
    made = made_of(name)
    found = made.row(CASES[case])
    assert found is not None
    assert made.tokenizer.decode(found.prompt_ids).endswith(prompt)
    assert made.tokenizer.decode(found.response_ids[0]) == response


@pytest.mark.skipif(not TRL, reason="the templates are TRL's")
def test_thoughts_that_a_template_drops_are_an_error_that_shows_both():
    words = (
        r"rows.jsonl:7: .*leaves out or changes a part .*\n  given: +<think>.*\n  rendered: .*\nSet another template"
    )
    with pytest.raises(UserError, match=words):
        made_of("deepseek_r1_distill").row(Row(HI, ("<think>\nhm\n</think>\n\nyes",), source="rows.jsonl:7"))


@pytest.mark.skipif(not TRL, reason="the templates are TRL's")
@pytest.mark.parametrize(("name", "is_told"), [("qwen3", False), ("qwen3_8", True)])
def test_thoughts_after_the_templates_own_empty_block_are_told(name, is_told):
    made, thoughts = made_of(name), "<think>\nhm\n</think>\n\n"
    made.check(Row(HI, (thoughts + "yes", thoughts + "no"), source="rows.jsonl:7"))
    assert made.counts.total() == is_told
    assert all("have thoughts after the chat template's own empty block" in reason for reason in made.counts)


@pytest.mark.skipif(not TRL, reason="the templates are TRL's")
def test_template_arguments_decide_the_generation_prompt():
    tokenizer = made_of("qwen3").tokenizer
    made = PreferenceTokenizer(tokenizer, template_args={"enable_thinking": False})
    found = made.row(CASES["plain"])
    assert found is not None
    assert made.tokenizer.decode(found.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert made.tokenizer.decode(found.response_ids[0]) == "yes<|im_end|>"
    assert made.prompt_ids(CASES["plain"]) == found.prompt_ids
    own = made.prompt_ids(Row(HI, template_args={"enable_thinking": True}))  # a row's own take precedence
    assert own == made_of("qwen3").prompt_ids(CASES["plain"])


@pytest.mark.skipif(not TRL, reason="the templates are TRL's")
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "llama3_1"])
def test_arguments_of_tools_may_be_json_text(name):
    function = {**CALL["tool_calls"][0]["function"], "arguments": '{"city": "Rome"}'}
    as_text = {**CALL, "tool_calls": [{"type": "function", "function": function}]}
    made, row = made_of(name), CASES["result of a tool"]
    prompt = [*HI, as_text, message("tool", "sunny", name="weather")]
    assert made.row(Row(prompt, row.responses, tools=TOOLS)) == made.row(row)


def with_template(template: str, args: dict[str, Any] | None = None) -> PreferenceTokenizer:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template
    return PreferenceTokenizer(tokenizer, template_args=args)


def test_a_template_without_generation_prompt_samples_as_trained():
    made = with_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    found = made.row(CASES["plain"])
    assert found is not None
    assert made.tokenizer.decode(found.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert made.tokenizer.decode(found.response_ids[0]) == "yes<|im_end|>"
    assert made.prompt_ids(CASES["plain"]) == found.prompt_ids


@pytest.mark.parametrize("generation_prompt", ["ASSISTANT:", None])
def test_the_space_before_an_answer_belongs_to_the_response(generation_prompt):
    """Vicuna's, and a template such as Llama 2's without any words before an answer."""
    name = "ASSISTANT:" if generation_prompt else "[/INST]"
    opened = "{% if add_generation_prompt %}ASSISTANT:{% endif %}" if generation_prompt else ""
    user = "USER: {{ m.content }} " if generation_prompt else "[INST] {{ m.content }} [/INST]"
    said = f"{generation_prompt or ''} {{{{ m.content | trim }}}}{{{{ eos_token }}}}"
    turn = f"{{% if m.role == 'user' %}}{user}{{% else %}}{said}{{% endif %}}"
    made = with_template(f"{{% for m in messages %}}{turn}{{% endfor %}}{opened}")
    found = made.row(Row(HI, (" yes ", "no")))
    assert found is not None
    assert made.tokenizer.decode(found.prompt_ids).endswith(name)
    assert [made.tokenizer.decode(ids) for ids in found.response_ids] == [" yes<|endoftext|>", " no<|endoftext|>"]
    assert made.prompt_ids(Row(HI)) == found.prompt_ids


def test_a_prompt_that_an_answer_rewrites_is_an_error_that_shows_both():
    rewriting = "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }} <- {% endif %}" + CHAT_TEMPLATE
    words = r"rows.jsonl:1: .* renders the prompt differently when a response follows:\n  alone: .*\n  with a resp"
    with pytest.raises(UserError, match=words):
        with_template(rewriting).row(Row(HI, ("yes", "no"), source="rows.jsonl:1"))


@pytest.mark.parametrize(
    ("template", "args", "case", "prompt", "response"),
    [
        pytest.param(
            "{% for m in messages %}{% if m.role == 'user' %}[INST] "
            "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
            "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}"
            "{% endfor %}",
            {},
            "system",
            "[INST] Be short. Hi?[/INST]",
            " yes<|endoftext|>",
            id="the system message before a last turn of the user alone",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' else '<|im_start|>' }}"
            "{% endfor %}{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}",
            {"enable_thinking": False},
            "plain",
            "Hi?<|im_start|><think>\n\n</think>\n",
            "yes<|im_end|>",
            id="an empty block of thoughts at the end of any chat",
        ),
        pytest.param(
            CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think></think>{% endif"),
            {},
            "plain",
            "<|im_start|>assistant\n<think></think>",
            "yes<|im_end|>",
            id="an empty block of thoughts in the generation prompt alone",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
            "<|im_start|>{% if add_generation_prompt %}assistant\n{% endif %}",
            {},
            "plain",
            "<|im_start|>assistant\n",
            "yes<|im_end|>",
            id="the next turn opened after any chat",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            {},
            "system",
            "system\nBe short.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
            "yes<|im_end|>",
            id="contents that are lists of parts",
        ),
        pytest.param(
            CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|>end<|endoftext|>"),
            {},
            "several turns",
            "<|im_start|>assistant\n",
            "yes<|im_end|>end<|endoftext|>",
            id="words between the tokens that end a turn",
        ),
    ],
)
def test_training_reads_the_sampled_prompt_and_the_answer_ends_once(template, args, case, prompt, response):
    made = with_template(template, args)
    found = made.row(CASES[case])
    assert found is not None
    assert found.prompt_ids == made.prompt_ids(CASES[case])
    assert made.tokenizer.decode(found.prompt_ids).endswith(prompt)
    assert made.tokenizer.decode(found.response_ids[0]) == response


def test_a_template_that_leaves_out_a_message_is_an_error():
    users = CHAT_TEMPLATE.replace("%}<|im_start|>{{ m.role", "%}{% if m.role != 'system' %}<|im_start|>{{ m.role")
    made = with_template(users.replace("{% endfor %}", "{% endif %}{% endfor %}"))
    words = r"rows.jsonl:3: .*leaves out message 1 \(system\): Be short\.\nPut its text into a user's turn"
    with pytest.raises(UserError, match=words):
        made.row(replace(CASES["system"], source="rows.jsonl:3"))
    with pytest.raises(UserError, match=words):
        made.prompt_ids(replace(CASES["system"], source="rows.jsonl:3"))
    assert made.row(CASES["several turns"]) is not None


def test_a_message_is_missed_whatever_stays_in_its_place():
    turn = "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
    made = with_template("{% for m in messages %}" + turn + "{{ '\n' if not loop.last }}{% endfor %}")
    with pytest.raises(UserError, match=r"leaves out message 1 \(system\): Be short\."):
        made.row(CASES["system"])
    upper = with_template(CHAT_TEMPLATE.replace("m.content", "m.content | upper"))  # it is changed, and not left out
    assert upper.prompt_ids(CASES["system"]) is not None


def test_calls_of_tools_in_the_prompt_are_missed():
    row = Row([*HI, CALL, message("tool", "sunny")], ("yes", "no"), source="rows.jsonl:2")
    words = (
        r"rows.jsonl:2: .*leaves out the tool_calls of message 2 \(assistant\): weather\nPut the calls into its text"
    )
    with pytest.raises(UserError, match=words):
        with_template(CHAT_TEMPLATE).row(row)


def test_a_call_without_content_is_one_with_empty_content():
    """Qwen3's and Granite's templates cannot add to what is missing."""
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}"
    made = with_template(
        "{% for m in messages %}" + turn + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    missing = {**CALL, "content": None}
    assert made.row(Row(HI, (missing, "no"))) == made.row(Row(HI, (CALL, "no")))
    result = message("tool", "sunny")
    assert made.prompt_ids(Row([*HI, missing, result])) == made.prompt_ids(Row([*HI, CALL, result]))


def test_a_date_and_an_unknown_end_of_turn_are_noted():
    dated = "{% if date_string is undefined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    notes = dict(notes_on(with_template(dated + CHAT_TEMPLATE), [Row(HI)]))
    assert "writes today's date into prompts" in notes["date"]
    assert not list(notes_on(with_template(dated + CHAT_TEMPLATE, {"date_string": "1 May"}), [CASES["plain"]]))
    unknown = with_template(CHAT_TEMPLATE.replace("<|im_end|>", "<|eot|>"))
    assert dict(notes_on(unknown, [CASES["plain"]]))["turn's end"].startswith("the chat template writes <|eot|>, which")


@pytest.mark.parametrize(
    ("row", "args", "words"),
    [
        (
            CASES["plain"],
            {"enable_thinkin": False},
            "data.template_args hold 'enable_thinkin', which the chat template",
        ),
        (replace(CASES["plain"], template_args={"documents": []}), {}, "the row's arguments hold 'documents', which"),
        (CASES["tools"], {}, "the row has tools, but the chat template of '' does not read any"),
    ],
)
def test_what_the_template_does_not_read_is_refused(row, args, words):
    made = with_template("{# It speaks of tools. #}You have no tools." + CHAT_TEMPLATE, args)
    with pytest.raises(UserError, match=words):
        made.row(row)


def test_a_chat_template_that_plain_prompts_do_not_use_is_noted():
    made = with_template(CHAT_TEMPLATE)
    assert dict(notes_on(made, [Row("Hi?", ("yes",))]))["chat template"].startswith(
        "not used, because the prompts are plain"
    )
    assert not list(notes_on(made, [Row("", ("a text",))]))
    made.wraps_prompts = True
    assert not list(notes_on(made, [Row("Hi?", ("yes",))]))


def test_a_refused_message_is_named():
    order = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    alternate = order + "{{ raise_exception('Roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
    two = [*HI, message("assistant", "Hello."), message("assistant", "Again."), message("user", "And?")]
    words = r"rows.jsonl:1: .* \(user, assistant, assistant, user, assistant\) at message 3: Roles must .*… Change them"
    with pytest.raises(UserError, match=words):
        with_template(alternate + CHAT_TEMPLATE).row(Row(two, ("yes", "no"), source="rows.jsonl:1"))


def test_a_template_without_system_messages_says_where_to_put_them():
    """Mistral's first template, whose own words name only the order of roles."""
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    made = with_template(refusing + CHAT_TEMPLATE)
    with pytest.raises(
        UserError, match=r"Roles must alternate\. Put the system message into the first user's turn, or"
    ):
        made.row(CASES["system"])
    assert made.row(CASES["plain"]) is not None


TEXT = st.one_of(
    st.text(max_size=20), st.sampled_from(["", " ", "\n\n", "{{ x }}", "\x00", "<think>", "</think>", " a ", "é😀"])
)
ENDS = ["<|im_end|>\n", "<|im_end|>", "<|endoftext|>", "\n", ""]


@settings(deadline=None, max_examples=150)
@given(
    begin=st.sampled_from(["", "<|im_start|>", "### "]),
    middle=st.sampled_from(["\n", ": ", ":", "<think>\n"]),
    end=st.sampled_from(ENDS),
    last=st.sampled_from(["", "<|endoftext|>"]),
    opens=st.booleans(),
    trims=st.booleans(),
    contents=st.lists(TEXT, min_size=1, max_size=3),
    answers=st.lists(TEXT, min_size=1, max_size=2),
)
def test_decoded_tokens_are_the_rendering_of_any_template(begin, middle, end, last, opens, trims, contents, answers):
    content = "{{ m.content | trim }}" if trims else "{{ m.content }}"
    turn = f"{begin}{{{{ m.role }}}}{middle}{content}{end}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    opened = f"{begin}assistant{middle}" if opens else ""
    template += f"{{% if add_generation_prompt %}}{opened}{{% else %}}{last}{{% endif %}}"
    made = with_template(template)
    roles = ("user", "assistant")
    chat = [message(roles[i % 2], text) for i, text in enumerate([*contents, "Q"][: len(contents) // 2 * 2 + 1])]
    try:
        found = made.row(Row(chat, tuple(answers), source="rows.jsonl:1"))
    except UserError as error:
        assert "renders the prompt differently" in str(error)  # noqa: PT017  # templates that close a prompt by `last`
        assert last
        assert not opens
        return
    assert found is not None
    for answer, ids in zip(answers, found.response_ids, strict=True):
        whole = made.tokenizer.apply_chat_template([*chat, message("assistant", answer)], tokenize=False)
        text = made.tokenizer.decode(found.prompt_ids + ids)
        rest = whole.removeprefix(text)
        assert (rest != whole and not rest.strip().removeprefix("<|endoftext|>")) or text == whole + "<|endoftext|>"
