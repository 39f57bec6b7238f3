"""Sources become examples: options of reading, the check of tokens, held-out shares, several sources."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import adamw, byte_tokenizer, fit
from tiny_tokenizers import word_tokenizer
from transformers import AutoTokenizer

from lit_align.data import FunctionScorer, OfflinePairs, OnPolicyPairs
from lit_align.data.examples import Source, check_tokens
from lit_align.data.formats.rows import Row, Rows
from lit_align.data.holdout import hold_out
from lit_align.data.tokenization import PreferenceTokenizer, RowIds, in_place
from lit_align.errors import UserError
from lit_align.objectives import DPO, KTO
from lit_align.policy import Policy, PolicyConfig

SHOUTING = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}{{ mood }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT{{ mood }}\n{% endif %}"
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, name: str = "p", **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}:", "chosen": " yes", "rejected": f" no {i}", **more} for i in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {"prompt": said("user", f"Q{i}"), "chosen": said("assistant", "y"), "rejected": said("assistant", "n")}
        for i in range(count)
    ]


def test_another_template_is_sampled_trained_on_and_saved(tiny_model, in_tmp):
    (in_tmp / "template.jinja").write_text("\ufeff" + SHOUTING, encoding="utf-8")  # with an editor's mark
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    options = {"chat_template": "template.jinja", "template_args": {"mood": "!"}}
    data = OfflinePairs(write(in_tmp / "rows.jsonl", chats(4)), batch_size=2, **options)
    trainer = fit(module, data)
    example = data.train_examples[0]
    decoded = byte_tokenizer().decode(example.prompt_ids)
    assert decoded == "<|im_start|>USER!\nQ0<|im_end|>\n<|im_start|>ASSISTANT!\n"
    assert data.preference_tokenizer.prompt_ids(Row([{"role": "user", "content": "Q0"}])) == example.prompt_ids
    assert module.policy is not None
    module.policy.save(in_tmp / "saved")
    assert AutoTokenizer.from_pretrained(in_tmp / "saved").chat_template == SHOUTING
    trainer.save_checkpoint("run.ckpt")
    policy = torch.load("run.ckpt", weights_only=True)["hyper_parameters"]["policy"]
    assert policy["chat_template"] == SHOUTING
    again = DPO.load_from_checkpoint("run.ckpt")
    assert again.tokenizer.chat_template == SHOUTING


def test_another_tokenizer_must_fit_the_model(tiny_model, in_tmp):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"token{i}" for i in range(50)])
    tokenizer.save_pretrained(in_tmp / "larger")
    data = OfflinePairs(write(in_tmp / "rows.jsonl", pairs(4)), tokenizer=str(in_tmp / "larger"))
    with pytest.raises(UserError, match=r"data.tokenizer=.*larger .* has 309 tokens, but .* has 259 embeddings"):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    byte_tokenizer(chat=False).save_pretrained(in_tmp / "bare")
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    fit(module, OfflinePairs(str(in_tmp / "rows.jsonl"), batch_size=2, tokenizer=str(in_tmp / "bare")))
    assert module.policy is not None
    assert not module.policy.tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat_template": "nowhere.jinja"}, "data.chat_template=nowhere.jinja must be a file, or a template's text"),
        ({"tokenizer": "./nowhere"}, "there is no folder './nowhere'"),
        ({"validation": 1.5}, "data.validation=1.5 must be above 0 and below 1, or a file"),
        ({"validation": 0.01}, r"data.validation=0.01 must leave prompts on both sides of 4 prompts"),
        ({"validation": 0.5, "validation_split": "test"}, "data.validation_split=test has no effect on a share"),
        ({"train": []}, "data.train must name a source"),
        ({"train": [Source("rows.jsonl")], "train_split": "x"}, "data.train_split=x has no effect on several sources"),
        ({"sft_split": "x"}, "data.sft_split=x has no effect without data.sft"),
    ],
)
def test_options_without_effect_are_refused(tiny_model, in_tmp, options, said):
    write(in_tmp / "rows.jsonl", pairs(4))
    with pytest.raises(UserError, match=said):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), OfflinePairs(**({"train": "rows.jsonl"} | options)))


def test_a_share_can_only_be_held_out_of_files():
    with pytest.raises(UserError, match=r"data.validation=0.1 has no effect: .*OnPolicyPairs does not have"):
        OnPolicyPairs("prompts.jsonl", FunctionScorer("json.dump"), validation=0.1)


def test_rows_longer_than_the_models_positions_are_refused(tiny_model, in_tmp):
    rows = [*pairs(4), {"prompt": "x" * 500, "chosen": " yes" * 10, "rejected": " no"}]
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    assert module.positions == 512
    options = {"max_prompt_length": 600, "batch_size": 2}
    with pytest.raises(UserError, match=r"rows.jsonl:5: the prompt has 500 tokens, but the model .* reads 512"):
        fit(module, OfflinePairs(write(in_tmp / "rows.jsonl", rows), **options))
    data = OfflinePairs(str(in_tmp / "rows.jsonl"), long_prompts="truncate_left", **options)
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    assert data.train_examples[-1].tokens <= 512 + 4
    assert "1 prompt too long, cut" in data.summary


def test_a_files_name_need_not_be_unicode(tiny_model, in_tmp):
    path = write(in_tmp / os.fsdecode(b"rows\xff.jsonl"), pairs(4))
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data := OfflinePairs(path, batch_size=2))
    assert "rows\udcff.jsonl: preference pairs" in data.summary


def test_labels_of_one_kind_are_pointed_out(tiny_model, in_tmp):
    rows = [{"prompt": f"Q{i}:", "completion": f" {i}", "label": True} for i in range(4)]
    data = OfflinePairs(write(in_tmp / "rows.jsonl", rows), batch_size=2)
    fit(KTO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    assert dict(data.describe())["labels"].startswith("4 desirable, 0 undesirable responses (warning: without both")


def test_columns_are_mapped_and_unread_ones_are_shown(tiny_model, in_tmp):
    rows = [{"q": f"Q{i}:", "good": " yes", "bad": " no", "note": "n"} for i in range(4)]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = OfflinePairs(write(in_tmp / "rows.jsonl", rows), batch_size=2, columns=columns)
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    shown = dict(data.describe())
    assert "note" in shown["not read"]
    assert (shown["prompt"], shown["chosen"]) == ("Q0:│", "│ yes<|endoftext|>│")


# --- several sources, and a held-out share ---


def test_sources_have_weights_and_columns_of_their_own(tiny_model, in_tmp):
    own = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    write(in_tmp / "a.jsonl", pairs(4))
    write(in_tmp / "b.jsonl", [{"q": f"b{i}:", "good": " yes", "bad": " no"} for i in range(4)])
    sources: list[str | Source] = ["a.jsonl", Source("b.jsonl", weight=2, columns=own)]
    data = OfflinePairs(sources, batch_size=2)
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    assert fit(module, data).global_step == 6  # (4 + 2 · 4) / 2
    assert data.summary.splitlines()[1].startswith("4 pairs from b.jsonl")
    assert [name for name, _ in data.describe() if name.startswith("data")] == ["data", "data × 2"]


def test_sources_of_different_forms_are_refused(tiny_model, in_tmp):
    write(in_tmp / "a.jsonl", pairs(4))
    write(in_tmp / "b.jsonl", pairs(4, score_chosen=2, score_rejected=1))
    with pytest.raises(UserError, match=r"examples of b.jsonl have 2 responses with rewards, those of a.jsonl have 2"):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), OfflinePairs(["a.jsonl", "b.jsonl"], batch_size=2))
    with pytest.raises(UserError, match=r"data.train: weight=0 of a.jsonl must be above 0"):
        Source("a.jsonl", weight=0)


def test_a_share_of_the_prompts_is_held_out(tiny_model, in_tmp):
    rows = [*pairs(20), *pairs(20)]  # each prompt twice
    data = OfflinePairs(write(in_tmp / "rows.jsonl", rows), batch_size=2, validation=0.1, seed=3)
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    held = data.share_of_training()
    assert len({tuple(example.prompt_ids) for example in held.examples}) == 2
    assert held.rows == len(held.examples) == 4
    trained = {example.source for example in data.train_examples}
    assert len(trained) == 36
    assert not trained & {example.source for example in held.examples}
    assert dict(data.describe())["validation"] == "10.0% of the prompts: 4 rows, not trained on"


def test_the_held_out_prompts_depend_on_prompts_and_seed_alone():
    rows = Rows([Row(f"p{i % 20}", source=f"p:{i + 1}") for i in range(40)], "", "", Counter())
    turned = Rows(rows.rows[::-1], "", "", Counter())

    def held(seed: int, *parts: Rows) -> set[Any]:
        return {row.prompt for row in hold_out(parts, 0.2, seed)[1]}

    assert held(1, rows) == held(1, turned) == held(1, rows, turned)
    assert held(1, rows) != held(2, rows)


def test_turns_of_a_chat_are_held_out_together_and_texts_by_themselves(tmp_path):
    def said(chat: int) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{chat} {i}"} for i, role in enumerate(["user", "assistant"] * 3)]

    for rows in ([{"messages": said(i)} for i in range(30)], [{"text": f"t {i}"} for i in range(30)]):
        source = Source(write(tmp_path / "rows.jsonl", rows))
        (train,), held = hold_out([source.read("texts")], 0.3, seed=1)
        sides = [{row.source for row in side} for side in (train, held)]
        assert list(map(len, sides)) == [21, 9]
        assert not sides[0] & sides[1]


# --- tokens spell their text ---


def test_tokens_that_do_not_spell_their_text_stop_the_run():
    made = PreferenceTokenizer(byte_tokenizer(), max_prompt_length=64, max_response_length=64)
    rows = [Row(f"Q{i}", (" yes", " no"), source=f"rows.jsonl:{i + 1}") for i in range(100)]
    check_tokens(rows, made)
    right = made.tokens

    def wrong(rendering: Any) -> RowIds | None:
        found = right(rendering)
        assert found is not None
        if rendering.prompt == "Q3":  # a space more, as of a response tokenized by itself
            found.responses[1].insert(0, made.tokenizer(" ").input_ids[0])
        return found

    made.tokens = wrong  # type: ignore[method-assign]
    words = r"rows.jsonl:4: the tokens .* do not spell their text:\n  text:   Q3 no\n  tokens: Q3  no<.endoftext.>"
    with pytest.raises(UserError, match=words):
        check_tokens(rows, made)


def test_a_tokenizer_that_decodes_a_space_before_the_end_token_is_right():
    words = word_tokenizer(["Name", "a", "bird"])
    made = PreferenceTokenizer(words, max_prompt_length=64, max_response_length=64)
    check_tokens([Row("Name a", (" bird", " a"), source="rows.jsonl:1")], made)


def test_a_response_is_shown_as_it_is_after_its_prompt():
    from tiny_tokenizers import llama_legacy

    made = PreferenceTokenizer(llama_legacy(), max_prompt_length=64, max_response_length=64)
    found = made.row(Row("TL;DR:", (" yes",)))
    assert found is not None
    assert made.tokenizer.decode(found.response_ids[0]) == "yes</s>"  # alone, it seems to have no space
    assert in_place(made.tokenizer, found.prompt_ids, found.response_ids[0]) == " yes</s>"


def test_the_model_reads_the_chosen_tokenizer(tiny_model):
    policy = Policy.load(PolicyConfig(tiny_model, chat_template=SHOUTING))
    assert policy.tokenizer.chat_template == SHOUTING
