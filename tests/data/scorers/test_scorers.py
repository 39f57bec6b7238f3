"""Scorers: real functions and real classifiers; whatever is no score is refused with the text it was for."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, llama_config
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import Scorer, ScorerError, Scores, compare, score
from lit_align.data.scorers.classifier import SequenceClassificationScorer
from lit_align.data.scorers.ensemble import EnsembleScorer
from lit_align.data.scorers.function import FunctionScorer, PairwiseFunctionScorer
from lit_align.errors import UserError

CODE = """
from dataclasses import dataclass

@dataclass  # looks its module up in sys.modules
class Weights:
    length: float = 1.0

def length(prompts, responses):
    return [Weights().length * (len(p) + len(r)) for p, r in zip(prompts, responses)]

def lexicon(prompts, responses):
    raise KeyError("lexicon")

nothing = 3
"""


class Given(Scorer):
    """Returns what a test gives it."""

    identity = "given@1"  # type: ignore[assignment]
    batch_size = 2

    def __init__(self, returned: object):
        self.returned = returned
        self.seen: list[list[str]] = []

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        self.seen.append(list(responses))
        return self.returned(prompts, responses) if callable(self.returned) else self.returned  # type: ignore[return-value]


def message_of(error: type[UserError], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text, "one paragraph"
    return text


# --- score ---


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    return [len(response) for response in responses]


def test_scores_come_back_in_the_order_of_the_responses_from_batches_of_like_length():
    scorer = Given(lengths)
    advanced: list[int] = []
    responses = ["aa", "a", "aaaaa", "", "aaaa"]
    assert score(scorer, [""] * 5, responses, advanced.append) == [2.0, 1.0, 5.0, 0.0, 4.0]
    assert scorer.seen == [["aaaaa", "aaaa"], ["aa", "a"], [""]]
    assert advanced == [2, 2, 1]


def test_nothing_to_score_asks_nothing():
    scorer = Given(lengths)
    assert score(scorer, [], []) == []
    assert scorer.seen == []


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        np.array([1, 0.5], np.float32),
        [np.float32(1), np.float64(0.5)],
        torch.tensor([1, 0.5]),
    ],
)
def test_lists_arrays_and_tensors_of_numbers_are_scores(returned: object):
    scores = score(Given(returned), ["p", "p"], ["r", "r"])
    assert scores == [1.0, 0.5]
    assert all(type(value) is float for value in scores)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], ["1 scores for 2 responses"]),
        ([1.0, 2.0, 3.0], ["3 scores for 2 responses"]),
        (None, ["NoneType"]),
        (0.5, ["float"]),
        ("ab", ["str"]),
        ({"a": 1, "b": 2}, ["dict"]),
        (torch.ones(2, 1), ["[1.0]", "no number", "'first'"]),
        ([1.0, "0.5"], ["'0.5'", "no number", "'other'"]),
        ([1.0, None], ["None", "no number", "'other'"]),
        ([1.0, math.nan], ["nan", "finite", "'other'", "'Q'"]),
        ([-math.inf, math.nan], ["-inf", "finite", "'first'"]),
        (np.array([1, np.nan]), ["nan", "'other'"]),
        (Scores([1, 2], {"grace": [1, 2], "wit": [3]}), ["1 values for 2 responses as parts['wit']"]),
        (Scores([1, 2], {"wit": [3, math.nan]}), ["nan as parts['wit']", "finite", "'other'"]),
        (Scores([1, 2], {"wit": ["high", 3]}), ["'high' as parts['wit']", "no number", "'first'"]),  # type: ignore[list-item]
    ],
)
def test_what_is_no_score_is_refused_with_the_text_it_was_for(returned: object, words: list[str]):
    message = message_of(ScorerError, score, Given(returned), ["Q", "Q"], ["first", "other"])
    for word in ["scorer given@1", "Return", *words]:
        assert word in message, message


def test_a_part_that_a_batch_lacks_is_refused_with_a_response_of_that_batch():
    def sometimes(prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        return Scores(lengths(prompts, responses), {"wit": [1.0] * len(responses)} if "long" in responses else {})

    message = message_of(ScorerError, score, Given(sometimes), ["Q"] * 3, ["long", "s", "mid"])
    assert "parts['wit'] for other batches, but not for the one with response 's'. Return" in message


def test_a_scorer_that_raises_is_named_with_its_error_and_the_batch(in_tmp: Path):
    Path("rewards.py").write_text(CODE)
    chat = [{"role": "user", "content": "Why?"}]
    with pytest.raises(ScorerError) as caught:
        score(FunctionScorer("rewards.py:lexicon"), [chat, chat], ["x" * 900, "b"])
    for word in ("rewards.py:lexicon@", "KeyError: 'lexicon'", "batch of 2", "'Why?'", "xxx' … 'xxx"):
        assert word in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 500


def test_a_scorer_out_of_memory_says_to_lower_its_batch_size():
    def full(prompts: object, responses: object) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "batch_size=2" in message_of(ScorerError, score, Given(full), ["p"], ["r"])


def test_an_error_that_is_already_in_words_is_left_alone():
    def refuses(prompts: object, responses: object) -> list[float]:
        raise UserError("the judge's key is not set")

    assert message_of(UserError, score, Given(refuses), ["p"], ["r"]) == "the judge's key is not set"


def test_as_many_prompts_as_responses_are_needed():
    with pytest.raises(ValueError, match="1 prompts for 2 responses"):
        score(Given(lengths), ["p"], ["a", "b"])


# --- functions ---


def test_a_function_is_found_by_file_and_by_import_path(in_tmp: Path):
    Path("rewards.py").write_text(CODE)
    assert score(FunctionScorer("rewards.py:length"), ["ab", "c"], ["d", ""]) == [3.0, 1.0]
    assert FunctionScorer("json.dumps").function({}) == "{}"


def test_a_file_does_not_hide_the_module_of_its_name(in_tmp: Path):
    Path("json.py").write_text(CODE)
    assert score(FunctionScorer("json.py:length"), ["a"], ["b"]) == [2.0]
    assert FunctionScorer("json.dumps").function([1]) == "[1]"


def test_a_function_s_identity_changes_with_its_code_and_with_nothing_else(tmp_path: Path):
    identities = []
    for folder, code in (("a", CODE), ("b", CODE), ("c", CODE + "\n# another version\n")):
        file = tmp_path / folder / "rewards.py"
        file.parent.mkdir()
        file.write_text(code)
        path, _, fingerprint = FunctionScorer(f"{file}:length").identity.rpartition("@")
        assert path == f"{file}:length"
        identities.append(fingerprint)
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nowhere.py:f", ["'nowhere.py:f'", "no file 'nowhere.py'"]),
        ("no_such_package.f", ["cannot import 'no_such_package'", "No module named"]),
        ("broken.py:f", ["cannot import 'broken.py'", "No module named 'no_such_lexicon'"]),
        ("rewards.py:missing", ["no 'missing' in 'rewards.py'"]),
        ("rewards.py:nothing", ["is a int, not a function"]),
        ("length", ["'length'", "no path"]),
        ("", ["''", "no path"]),
    ],
)
def test_a_function_that_is_not_there_is_named(in_tmp: Path, function: str, words: list[str]):
    Path("rewards.py").write_text(CODE)
    Path("broken.py").write_text("import no_such_lexicon")
    message = message_of(UserError, FunctionScorer, function)
    for word in ["scorer.function=", "path/to/file.py:function", *words]:
        assert word in message, message


def test_a_batch_size_below_one_is_refused():
    assert "batch_size=0" in message_of(UserError, FunctionScorer, "json.dumps", batch_size=0)


# --- classifiers ---


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


def test_a_model_of_one_output_gives_its_logit_whatever_is_in_the_batch(reward_model: str):
    prompts, responses = ["Good ", "Bad ", "Odd ", ""], ["film", "and much longer film", "x 😀 ", "\0"]
    expected = [logits_of(reward_model, p + r).item() for p, r in zip(prompts, responses, strict=True)]
    assert len({round(value, 3) for value in expected}) == 4
    for size in (1, 3, 32):
        scorer = SequenceClassificationScorer(reward_model, batch_size=size)
        assert score(scorer, prompts, responses) == pytest.approx(expected, abs=1e-5)


def test_a_decoder_without_a_padding_token_scores_the_last_token_of_each_text(tmp_path: Path):
    torch.manual_seed(0)
    config = llama_config(num_labels=1, pad_token_id=None)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer(chat=False).save_pretrained(tmp_path)
    scorer = SequenceClassificationScorer(str(tmp_path), batch_size=2)
    alone = [score(scorer, ["a"], [response])[0] for response in ("b", "a longer one")]
    assert score(scorer, ["a", "a"], ["b", "a longer one"]) == pytest.approx(alone, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)


def test_of_several_outputs_the_reward_is_the_log_odds_of_the_label(bert):
    folder = bert(labels=3)
    p = logits_of(folder, "ab").softmax(-1)
    for label in range(3):
        reward = score(SequenceClassificationScorer(folder, label=label), ["a"], ["b"])[0]
        assert reward == pytest.approx(math.log(p[label] / (1 - p[label])), abs=1e-4)


def test_of_independent_outputs_the_log_odds_is_the_logit(bert):
    folder = bert(labels=3, problem_type="multi_label_classification")
    reward = score(SequenceClassificationScorer(folder, label=2), ["a"], ["b"])[0]
    assert reward == pytest.approx(logits_of(folder, "ab")[2].item(), abs=1e-5)


def test_what_the_model_reads_is_decided_by_template_chat_template_or_joining(bert, reward_model: str):
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


def test_special_tokens_are_added_to_plain_text_but_not_to_a_rendered_chat(bert):
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


def test_a_long_text_loses_its_beginning_and_is_counted_and_warned_of_once(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model, batch_size=1, max_length=8)
    with pytest.warns(UserWarning, match=r"max_length=8.*without its beginning") as warned:
        scores = score(scorer, ["long prompt ", "another one ", "p"], ["response", "12345678", "q"])
    expected = [logits_of(reward_model, text).item() for text in ("response", "12345678", "pq")]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scorer.truncated == 2
    assert len(warned) == 1


def test_texts_are_cut_at_what_the_model_allows(reward_model: str):
    scorer = SequenceClassificationScorer(reward_model)
    with pytest.warns(UserWarning, match="max_length=64"):
        assert score(scorer, ["x" * 500], ["y" * 64]) == score(scorer, [""], ["y" * 64])


def test_weights_are_loaded_at_the_first_score_and_again_after_release(reward_model: str):
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


def test_weights_have_the_type_asked_for_or_the_one_they_were_saved_in(reward_model: str, tmp_path: Path):
    for options, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        scorer = SequenceClassificationScorer(reward_model, **options)
        scorer.start()
        assert scorer._loaded is not None
        assert scorer._loaded.dtype == dtype
        assert not any(weight.requires_grad for weight in scorer._loaded.parameters())


def test_a_model_s_identity_changes_with_its_weights_and_with_the_options_that_change_scores(bert, reward_model: str):
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
        ({"model": "/no/such/folder"}, ["no folder '/no/such/folder'", "save_pretrained"]),
        ({"model": "./no/such"}, ["no folder './no/such'"]),
        ({"label": 0}, ["scorer.label=0", "no effect", "one output"]),
        ({"template": "{prompt}"}, ["scorer.template='{prompt}'", "{response}"]),
        ({"template": "{question}{response}"}, ["scorer.template=", "'question'", "double"]),
        ({"template": "{"}, ["scorer.template='{'", "double"]),
        ({"max_length": 65}, ["scorer.max_length=65", "64"]),
        ({"max_length": 0}, ["scorer.max_length=0", "at least 1"]),
        ({"batch_size": 0}, ["scorer.batch_size=0", "at least 1"]),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_sampled(
    reward_model: str, options: dict, words: list[str]
):
    message = message_of(UserError, SequenceClassificationScorer, **{"model": reward_model} | options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("label", [None, 3, -1])
def test_a_model_of_several_outputs_needs_one_of_its_labels(bert, label: int | None):
    folder = bert(labels=3, id2label={0: "bad", 1: "neutral", 2: "good"})
    message = message_of(UserError, SequenceClassificationScorer, folder, label=label)
    for word in (f"scorer.label={label}", "3 outputs", "2 good"):
        assert word in message


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path):
    message = message_of(UserError, SequenceClassificationScorer, str(tmp_path))
    assert str(tmp_path) in message
    assert "no folder with a model" in message


def test_a_language_model_is_no_scorer_for_its_scores_would_be_random(tiny_model: str):
    message = message_of(UserError, SequenceClassificationScorer, tiny_model)
    assert "LlamaForCausalLM" in message
    assert "no sequence classifier" in message


def test_a_classifier_without_its_head_is_refused(bert):
    folder = bert()
    model = BertForSequenceClassification.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(folder, state_dict=weights)
    message = message_of(UserError, score, SequenceClassificationScorer(folder), ["p"], ["r"])
    assert "classifier.weight" in message
    assert "random" in message


# --- ensembles and comparisons ---


def test_an_ensemble_is_the_weighted_mean_with_its_members_and_their_spread():
    one, two = Given(lambda prompts, responses: [0.0, 6.0]), Given(lengths)
    scores = score(EnsembleScorer({"one": one, "two": two}, {"two": 2.0}), ["", ""], ["aaa", "b"])
    assert scores == pytest.approx([2.0, 8 / 3])
    assert scores.parts["one"] == [0.0, 6.0]
    assert scores.parts["two"] == [3.0, 1.0]
    # √(Σ w (r − mean)²): (1·4 + 2·1)/3 = 2, and (1·(10/3)² + 2·(5/3)²)/3 = 50/9
    assert scores.parts["disagreement"] == pytest.approx([math.sqrt(2), math.sqrt(50 / 9)])


def test_an_ensembles_identity_tells_its_members_and_their_weights():
    members = {"a": Given([0.0]), "b": Given([0.0])}
    assert EnsembleScorer(members, {"b": 0.5}).identity == "ensemble of 1 given@1, 0.5 given@1"


@pytest.mark.parametrize(
    ("scorers", "weights", "words"),
    [
        (["a"], {}, "an ensemble needs 2 members or more, and has 1"),
        (["a", "b"], {"c": 1.0}, "scorer.weights.c=1.0 has no member; members are a, b"),
        (["a", "b"], {"a": 0.0}, "scorer.weights.a=0.0 must be above 0"),
        (["a", "disagreement"], {}, "this name is that of their spread"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused(scorers, weights, words):
    assert words in message_of(UserError, EnsembleScorer, {name: Given([0.0]) for name in scorers}, weights)


def test_a_function_may_compare_responses_with_each_other(in_tmp):
    (in_tmp / "prefer.py").write_text(
        "import torch\ndef rock_paper_scissors(prompt, responses):\n"
        "    return torch.tensor([[9, 1, 0], [0, 9, 1], [1, 0, 9.0]])\n"
    )
    (P,) = compare(PairwiseFunctionScorer("prefer.py:rock_paper_scissors"), ["q"], [["rock", "scissors", "paper"]])
    assert P == [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[[0.5, 1.0]]", "gave a matrix of shape [1, 2] for 2 responses"),
        ("[[0.5, 0.9], [0.9, 0.5]]", "which are no preferences"),
        ("[[0.5, float('nan')], [0.9, 0.5]]", "which are no preferences"),
        ("'A'", "raised TypeError"),
    ],
)
def test_comparisons_that_are_no_preferences_are_refused(in_tmp, returned, words):
    (in_tmp / "prefer.py").write_text(f"def bad(prompt, responses): return {returned}\n")
    message = message_of(ScorerError, compare, PairwiseFunctionScorer("prefer.py:bad"), ["q"], [["a", "b"]])
    assert words in message
    assert "first response 'a'" in message
