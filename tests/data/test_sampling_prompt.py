"""A prompt ends in sampling as it ends in training, or the run is refused."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tiny import CHAT_TEMPLATE, byte_tokenizer, fit, on_policy, sgd
from transformers import AutoTokenizer

from lit_align.callbacks import Predictions
from lit_align.cli.app import AlignCLI
from lit_align.data import OfflinePairs, Sampling
from lit_align.data.formats.rows import Row
from lit_align.data.tokenization import PreferenceTokenizer
from lit_align.errors import UserError
from lit_align.objectives import DPO, SFT, RewardModel
from lit_align.policy import PolicyConfig

THINKING = (  # as Nemotron 3: it opens thoughts in sampling, and renders an empty block before an answer without any
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content %}"
    "<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GENERATION, ANSWER = "assistant\n<think>\n", "assistant\n<think></think>"
HI = [{"role": "user", "content": "Hi?"}]
PLAIN = {"prompt": HI, "chosen": "yes", "rejected": "no"}
THOUGHTS = {"prompt": HI, "chosen": "<think>\nhm</think>yes", "rejected": "<think>\nwell</think>no"}


def pairs(folder: Path, *rows: dict[str, Any], **options: Any) -> OfflinePairs:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return OfflinePairs(str(path), **({"chat_template": THINKING, "batch_size": 1} | options))


def dpo(model: str, **options: Any) -> DPO:
    return DPO(PolicyConfig(model), beta=0.1, optimizer=sgd(), **options)


def start(module: Any, data: Any) -> None:
    """The start of a run, without the run."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    trainer.strategy.connect(module)
    trainer.state.fn = "fit"
    trainer._data_connector.attach_data(module, datamodule=data)
    data.setup("fit")


def sampled(data: Any) -> str:
    return data.tokenizer.decode(data.prompt_tokenizer.prompt_ids(Row(HI)))


@pytest.mark.parametrize(("row", "end"), [(PLAIN, ANSWER), (THOUGHTS, GENERATION)])
def test_sampling_reads_the_prompt_that_training_reads(tiny_model, tmp_path, row, end):
    module, data = dpo(tiny_model), pairs(tmp_path, row, row)
    start(module, data)
    assert sampled(data).endswith(end)
    assert data.tokenizer.decode(data.train_examples[0].prompt_ids) == sampled(data)
    assert module.tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False) == sampled(data)
    lines = dict(data.describe())
    assert ("sampling prompt" in lines) == (end == ANSWER)


def test_a_template_may_open_the_turn_itself_in_another_way(tiny_model, tmp_path):
    """Two tags that differ are no empty block of thoughts if the first one opens the turn."""
    spaced = THINKING.replace("%}<|im_start|>assistant\n<think>", "%} <|im_start|>assistant\n<think>")
    start(dpo(tiny_model), data := pairs(tmp_path, PLAIN, chat_template=spaced))
    assert sampled(data).endswith(f"<|im_end|>\n<|im_start|>{ANSWER}")
    assert data.tokenizer.decode(data.train_examples[0].prompt_ids) == sampled(data)


def test_the_prompt_is_saved_with_model_and_checkpoint(tiny_model, tmp_path, in_tmp):
    fit(module := dpo(tiny_model), data := pairs(tmp_path, PLAIN), max_steps=1)
    assert module.policy is not None
    module.policy.save("model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False) == sampled(data)
    data.trainer.save_checkpoint("last.ckpt")  # type: ignore[union-attr]

    Path("prompts.jsonl").write_text(json.dumps({"prompt": HI}) + "\n")
    later = pairs(tmp_path, PLAIN)
    predictions = Predictions("prompts.jsonl", sampling=Sampling(max_new_tokens=1))
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[predictions])
    trainer.predict(dpo(tiny_model), later, ckpt_path="last.ckpt")
    assert sampled(later).endswith(ANSWER)


def test_rows_that_end_in_different_ways_are_refused_or_decided(tiny_model, tmp_path):
    rows = [THOUGHTS, PLAIN]
    words = (
        r"pairs.jsonl:2: the chat template ends the prompt before this row's response in another way than in sampling, "
        r"unlike before that of .*pairs.jsonl:1:\n  sampling: .*<think>\\n\n  training: .*<think></think>\n"
        r"Choose one for sampling: data.sampling_prompt=generation .* or answer "
    )
    with pytest.raises(UserError, match=words):
        start(dpo(tiny_model), pairs(tmp_path, *rows))
    for choice, end in (("generation", GENERATION), ("answer", ANSWER)):
        start(dpo(tiny_model), data := pairs(tmp_path, *rows, sampling_prompt=choice))
        assert sampled(data).endswith(end)
        trained = [data.tokenizer.decode(example.prompt_ids) for example in data.train_examples]
        assert [text.endswith(each) for text, each in zip(trained, (GENERATION, ANSWER), strict=True)] == [True, True]
        assert dict(data.describe())["  in training"].endswith("<think></think>")


def test_rounds_sample_from_the_generation_prompt_beside_texts_too(tiny_model, tmp_path):
    own = {"chat_template": THINKING, "wrap_prompts_as_chat": True}
    start(dpo(tiny_model), data := on_policy(tmp_path, **own))
    assert sampled(data).endswith(GENERATION)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"messages": [*HI, {"role": "assistant", "content": "yes"}]}))
    own |= {"sft": str(tmp_path / "texts.jsonl")}
    with pytest.raises(UserError, match=r"texts.jsonl:1: .* than in sampling, unlike in the rounds:\n  sampling"):
        start(dpo(tiny_model, sft_weight=1.0), on_policy(tmp_path, **own))
    start(dpo(tiny_model, sft_weight=1.0), data := on_policy(tmp_path, sampling_prompt="answer", **own))
    assert data.tokenizer.decode(data.prompts_of_round(0)[0].prompt_ids).endswith(ANSWER)


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (
            DPO,
            {"chat_template": CHAT_TEMPLATE},
            "the chat template ends prompts alike in sampling and before an answer",
        ),
        (DPO, {}, "no prompt is a chat"),
        (RewardModel, {}, "RewardModel gives no responses"),
    ],
)
@pytest.mark.parametrize("choice", ["generation", "answer"])
def test_a_choice_without_effect_is_an_error(tiny_model, tmp_path, module, options, words, choice):
    row = PLAIN if options else PLAIN | {"prompt": "Hi?"}
    data = pairs(tmp_path, row, sampling_prompt=choice, **options)
    with pytest.raises(UserError, match=f"data.sampling_prompt={choice} has no effect because {words}. Leave it out"):
        start(module(PolicyConfig(tiny_model)), data)


def test_a_choice_without_a_chat_template_is_an_error(tiny_model, tmp_path):
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "bare")
    bare = {"tokenizer": str(tmp_path / "bare"), "chat_template": None, "sampling_prompt": "answer"}
    with pytest.raises(UserError, match="has no effect because no prompt is a chat"):
        start(dpo(tiny_model), pairs(tmp_path, PLAIN | {"prompt": "Hi?"}, **bare))


def test_rounds_from_a_saved_model_sample_as_it_was_trained(tiny_model, tmp_path):
    fit(module := SFT(PolicyConfig(tiny_model), optimizer=sgd()), pairs(tmp_path, PLAIN), max_steps=1)
    assert module.policy is not None
    module.policy.save(tmp_path / "model")
    start(dpo(str(tmp_path / "model")), data := on_policy(tmp_path, wrap_prompts_as_chat=True))
    assert sampled(data).endswith(ANSWER)


# --- dates ---


DATED = "{% macro today() %}{{ strftime_now('%d %B %Y, %-d') + '.' }}{% endmacro %}{{ today() }}" + CHAT_TEMPLATE


def dated(**template_args: Any) -> PreferenceTokenizer:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = DATED
    return PreferenceTokenizer(tokenizer, max_prompt_length=99, max_response_length=99, template_args=template_args)


def test_the_date_of_a_template_can_be_set():
    made = dated(strftime_now="2026-02-03")
    found = made.row(Row(HI, ("yes",)))
    assert found is not None
    assert made.tokenizer.decode(found.prompt_ids).startswith("03 February 2026, 3.<|im_start|>user")
    assert made.prompt_ids(Row(HI)) == found.prompt_ids
    assert (made.renderer.template.today, dict(made.renderer.notes([Row(HI)]))) == ("", {})
    today = dated()
    own = today.tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False)
    assert today.tokenizer.decode(today.prompt_ids(Row(HI))) == own
    assert today.renderer.template.today
    assert "data.template_args={strftime_now: 2026-11-26} sets" in dict(today.renderer.notes([Row(HI)]))["date"]
    with pytest.raises(UserError, match="strftime_now=May of template_args must be a date such as 2026-11-26"):
        dated(strftime_now="May")


@pytest.mark.parametrize("given", ["{strftime_now: 2026-02-03}", '{strftime_now: "2026-02-03"}'])
def test_a_date_may_be_given_on_the_command_line(tiny_model, in_tmp, given):
    run = {"model": "DPO", "model.policy.path": tiny_model, "model.beta": 0.1, "data": "OfflinePairs"}
    run |= {"data.train": "pairs.jsonl", "data.template_args": given, "trainer.default_root_dir": "run"}
    data = AlignCLI([f"--{key}={value}" for key, value in run.items()], run=False).datamodule
    made = dated(**data.template_args)
    assert made.tokenizer.decode(made.prompt_ids(Row(HI))).startswith("03 February 2026")
