"""Real classifiers as scorers."""

import math
from pathlib import Path

import pytest
import torch
from scoring import message_of
from tiny import byte_tokenizer, llama_config
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import score
from lit_align.data.scorers.classifier import SequenceClassificationScorer
from lit_align.errors import UserError


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory):
    """Makes a folder with a tiny classifier."""

    def save(labels: int = 1, chat: bool = False, **options: object) -> str:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, num_labels=labels, initializer_range=0.5, pad_token_id=0, **options,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("classifier")
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer = byte_tokenizer(chat=chat)
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def reward_model(bert) -> str:
    return bert()


def logits_of(folder: str, text: str) -> torch.Tensor:
    """By hand, one text at a time, [labels]."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    ids = byte_tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits[0]


def test_a_model_of_one_output_gives_its_logit_in_any_batch(reward_model: str):
    prompts, responses = ["Good ", "Bad ", "Odd ", ""], ["film", "and much longer film", "x 😀 ", "\0"]
    expected = [logits_of(reward_model, p + r).item() for p, r in zip(prompts, responses, strict=True)]
    assert len({round(value, 3) for value in expected}) == 4
    for size in (1, 3, 32):
        scorer = SequenceClassificationScorer(reward_model, batch_size=size)
        assert score(scorer, prompts, responses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
def test_a_decoder_without_padding_token_scores_the_last_token(tmp_path: Path, end: str):
    torch.manual_seed(0)
    config = llama_config(num_labels=1, pad_token_id=None)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer(chat=False).save_pretrained(tmp_path)
    responses = ["b", "a longer one"]
    with torch.no_grad():
        ids = [byte_tokenizer()(f"a{each}{end}", return_tensors="pt").input_ids for each in responses]
        alone = [model(each).logits.item() for each in ids]
    scorer = SequenceClassificationScorer(str(tmp_path), batch_size=2, template=f"{{prompt}}{{response}}{end}")
    assert score(scorer, ["a", "a"], responses) == pytest.approx(alone, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)


def test_a_tokenizer_that_pads_on_the_left_gives_the_same_rewards(tmp_path: Path):
    """GPT-2 numbers positions from the first place, padding or not."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, initializer_range=0.5,
        pad_token_id=0,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    scorer = SequenceClassificationScorer(str(tmp_path))
    scorer.tokenizer.padding_side = "left"
    alone = [score(scorer, ["a"], [response])[0] for response in ("b", "a longer one")]
    assert score(scorer, ["a", "a"], ["b", "a longer one"]) == pytest.approx(alone, abs=1e-5)


def test_several_outputs_give_the_log_odds_of_the_label(bert):
    folder = bert(labels=3)
    p = logits_of(folder, "ab").softmax(-1)
    for label in range(3):
        reward = score(SequenceClassificationScorer(folder, label=label), ["a"], ["b"])[0]
        assert reward == pytest.approx(math.log(p[label] / (1 - p[label])), abs=1e-4)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_independent_outputs_give_the_labels_logit(bert, kind: str):
    folder = bert(labels=3, problem_type=kind)
    reward = score(SequenceClassificationScorer(folder, label=2), ["a"], ["b"])[0]
    assert reward == pytest.approx(logits_of(folder, "ab")[2].item(), abs=1e-5)


def test_the_models_input_follows_template_or_chat_template(bert, reward_model: str):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def reads(folder: str, prompt: Text, **options) -> float:
        return score(SequenceClassificationScorer(folder, **options), [prompt], ["r{x}"])[0]

    def expected(folder: str, text: str):
        return pytest.approx(logits_of(folder, text).item(), abs=1e-5)

    assert reads(reward_model, "p ") == expected(reward_model, "p r{x}")
    assert reads(reward_model, chat) == expected(reward_model, "a\n\nb\n\nc\n\nr{x}")
    assert reads(reward_model, "p{y}", template="<{prompt}|{response}>") == expected(reward_model, "<p{y}|r{x}>")
    assert reads(reward_model, "example\np ", last_line=True) == expected(reward_model, "p r{x}")
    chatty = bert(chat=True)
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    assert reads(chatty, "p") == expected(chatty, turn("user", "p") + turn("assistant", "r{x}"))
    assert reads(chatty, chat[:1]) == expected(chatty, turn("user", "a") + turn("assistant", "r{x}"))
    assert reads(chatty, "p", template="{response}") == expected(chatty, "r{x}")
    assert reads(chatty, chat[:2]) == expected(chatty, turn("user", "a") + turn("assistant", "br{x}"))
    assert reads(reward_model, chat[:2]) == expected(reward_model, "a\n\nbr{x}")


def test_special_tokens_are_added_to_plain_text_only(bert):
    for is_chat in (False, True):
        folder = bert(chat=is_chat)
        tokenizer = byte_tokenizer(chat=is_chat)
        tokenizer.pad_token = "<|endoftext|>"
        start = [("<|im_start|>", 1)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=start)
        tokenizer.save_pretrained(folder)
        scorer = SequenceClassificationScorer(folder)
        ids = scorer._token_ids([scorer._text("p", "r")])[0]
        assert [ids[0], ids[1] == ids[0]] == [1, False]


def test_a_long_text_loses_its_beginning_with_one_warning(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model, batch_size=1, max_length=8)
    with pytest.warns(UserWarning, match=r"max_length=8.*without its beginning") as warned:
        scores = score(scorer, ["long prompt ", "another one ", "p"], ["response", "12345678", "q"])
    expected = [logits_of(reward_model, text).item() for text in ("response", "12345678", "pq")]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scorer.truncated == 2
    assert len(warned) == 1


def test_texts_are_cut_at_the_models_limit(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model)
    with pytest.warns(UserWarning, match="max_length=64"):
        assert score(scorer, ["x" * 500], ["y" * 64]) == score(scorer, [""], ["y" * 64])


def test_positions_that_roberta_keeps_for_padding_are_not_counted(tmp_path: Path):
    config = RobertaConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer(chat=False).save_pretrained(tmp_path)
    scorer = SequenceClassificationScorer(str(tmp_path))
    with pytest.warns(UserWarning, match="max_length=62"):
        assert len(score(scorer, ["a" * 63], [""])) == 1


def test_weights_are_loaded_lazily_and_again_after_release(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model)
    assert scorer._loaded is None
    first = score(scorer, ["p"], ["r"])
    scorer.release()
    assert scorer._loaded is None
    scorer.start()
    kept = scorer._loaded
    assert score(scorer, ["p"], ["r"]) == first
    assert scorer._loaded is kept


def test_scoring_leaves_the_random_numbers_of_training_alone(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model)
    state = torch.get_rng_state()
    score(scorer, ["p"], ["r"])
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_have_the_configured_dtype_or_the_saved_one(reward_model: str, tmp_path: Path):
    for options, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        scorer = SequenceClassificationScorer(reward_model, **options)
        scorer.start()
        assert scorer._loaded is not None
        assert scorer._loaded.dtype == dtype
        assert not any(weight.requires_grad for weight in scorer._loaded.parameters())


def test_weights_saved_in_a_type_that_is_slow_are_converted(tmp_path: Path, set_kernels):
    """Where it is fast they stay as saved, with the rotary frequencies, which bfloat16 would round, in float32."""
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    model.bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for has_kernels, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        set_kernels(has_kernels)
        scorer = SequenceClassificationScorer(str(tmp_path))
        scorer.start()
        assert scorer._loaded is not None
        assert {weight.dtype for weight in scorer._loaded.parameters()} == {dtype}
        assert {buffer.dtype for buffer in scorer._loaded.buffers()} == {torch.float32}


def test_a_models_identity_follows_its_weights_and_options(bert, reward_model: str):
    def identity(folder: str = reward_model, **options) -> str:
        return SequenceClassificationScorer(folder, **options).identity

    assert identity() == identity(batch_size=7) == identity(device="cpu")
    assert identity().startswith(f"{reward_model}@")
    changed = [{}, {"dtype": "bfloat16"}, {"max_length": 8}, {"template": "{response}"}, {"last_line": True}]
    assert len({identity(**options) for options in changed}) == len(changed)
    twin = bert()
    assert identity(twin).rpartition("@")[2] == identity().rpartition("@")[2]
    Path(twin, "metrics.json").write_text("{}")  # the model does not read it
    assert identity(twin).rpartition("@")[2] == identity().rpartition("@")[2]
    model = BertForSequenceClassification.from_pretrained(twin)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(twin)
    assert identity(twin).rpartition("@")[2] != identity().rpartition("@")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "/no/such/folder"}, ["scorer.model='/no/such/folder' does not exist", "save_pretrained"]),
        ({"model": "./no/such"}, ["scorer.model='./no/such' does not exist"]),
        ({"label": 0}, ["scorer.label=0", "no effect", "one output"]),
        ({"template": "{prompt}"}, ["scorer.template='{prompt}'", "{response}"]),
        ({"template": "{question}{response}"}, ["scorer.template=", "'question'", "double"]),
        ({"template": "{"}, ["scorer.template='{'", "double"]),
        ({"max_length": 65}, ["scorer.max_length=65", "64"]),
        ({"max_length": 0}, ["scorer.max_length=0", "at least 1"]),
        ({"batch_size": 0}, ["scorer.batch_size=0", "at least 1"]),
    ],
)
def test_an_impossible_option_is_refused_before_sampling(reward_model: str, options: dict, words: list[str]):
    message = message_of(UserError, SequenceClassificationScorer, **{"model": reward_model} | options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("label", [None, 3, -1])
def test_a_model_of_several_outputs_needs_one_of_its_labels(bert, label: int | None):
    folder = bert(labels=3, id2label={0: "bad", 1: "neutral", 2: "good"})
    message = message_of(UserError, SequenceClassificationScorer, folder, label=label)
    for word in (f"scorer.label={label}", "must be one of the outputs", "2 good"):
        assert word in message


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    message = message_of(UserError, SequenceClassificationScorer, str(tmp_path))
    assert str(tmp_path) in message
    assert "is not a folder with a model" in message


def test_a_language_model_is_refused_as_a_classifier(tiny_model: str):
    message = message_of(UserError, SequenceClassificationScorer, tiny_model)
    assert "LlamaForCausalLM" in message
    assert "must be a sequence classifier" in message


def test_a_classifier_without_its_head_is_refused(bert):
    folder = bert()
    model = BertForSequenceClassification.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(folder, state_dict=weights)
    message = message_of(UserError, score, SequenceClassificationScorer(folder), ["p"], ["r"])
    assert "classifier.weight" in message
    assert "random" in message
