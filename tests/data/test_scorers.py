"""Scorers: real functions and a real classifier; whatever is no score is refused."""

import math
from pathlib import Path

import pytest
import torch
from lit_align.data.scorers import FunctionScorer, ScorerError, SequenceClassificationScorer, score
from lit_align.errors import UserError
from tiny import byte_tokenizer
from transformers import BertConfig, BertForSequenceClassification

CODE = """
def length(prompts, responses):
    return [len(p) + len(r) for p, r in zip(prompts, responses)]

def last_is_nan(prompts, responses):
    return [1.0] * (len(responses) - 1) + [float("nan")]

def words(prompts, responses):
    return ["good"] * len(responses)

def one(prompts, responses):
    return [1.0]

def breaks(prompts, responses):
    raise KeyError("lexicon")

nothing = 3
"""


@pytest.fixture
def code(in_tmp: Path) -> str:
    (in_tmp / "rewards.py").write_text(CODE)
    return "rewards.py"


def test_a_function_is_found_by_file_and_by_import_path(code):
    assert score(FunctionScorer(f"{code}:length"), ["ab", "c"], ["d", ""]) == [3.0, 1.0]
    assert FunctionScorer("json.dumps").function({}) == "{}"


def test_batches_cover_everything_in_order_and_report_progress(code):
    seen: list[int] = []
    prompts, responses = ["p"] * 7, ["x" * i for i in range(7)]
    assert score(FunctionScorer(f"{code}:length", batch_size=3), prompts, responses, seen.append) == [
        1.0 + i for i in range(7)
    ]
    assert seen == [3, 3, 1]


def test_an_identity_changes_with_the_code(code, in_tmp):
    from lit_align.data import scorers

    before = FunctionScorer(f"{code}:length").identity
    (in_tmp / code).write_text(CODE + "\n# another version\n")
    scorers._module_of.cache_clear()
    assert before.startswith("rewards.py:length @") and FunctionScorer(f"{code}:length").identity != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last_is_nan", r"gave nan, which is no finite number, for response 1: 'second' to the prompt 'q'"),
        ("words", r"gave 'good', which is no finite number, for response 0"),
        ("one", r"gave 1 scores for 2 responses"),
        ("breaks", r"failed on responses 0 to 1 \(KeyError: 'lexicon'\)"),
    ],
)
def test_what_is_no_score_stops_with_the_scorer_and_the_response(code, name, message):
    with pytest.raises(ScorerError, match=message) as caught:
        score(FunctionScorer(f"{code}:{name}"), ["p", "q"], ["first", "second"])
    assert f"rewards.py:{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere.py:f", r"scorer.function='nowhere.py:f': there is no file 'nowhere.py'"),
        ("no_such_package.f", r"cannot import 'no_such_package'"),
        ("rewards.py:missing", r"'rewards.py' has no function 'missing'"),
        ("rewards.py:nothing", r"'rewards.py' has no function 'nothing'"),
    ],
)
def test_a_function_that_is_not_there_is_named(code, function, message):
    with pytest.raises(UserError, match=message):
        FunctionScorer(function)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> dict[int, str]:
    """Folders of tiny classifiers, by their number of outputs."""
    folders = {}
    for labels in (1, 3):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=128, num_labels=labels, initializer_range=0.5, pad_token_id=0,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("classifier")
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer = byte_tokenizer(chat=False)
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)
        folders[labels] = str(folder)
    return folders


def test_a_classifier_of_one_output_gives_its_logit_whatever_the_batch(classifiers):
    scorer = SequenceClassificationScorer(classifiers[1], batch_size=2)
    prompts, responses = ["Good ", "Bad ", "Odd "], ["film", "and much longer film", "x"]
    scores = score(scorer, prompts, responses)
    model, tokenizer = scorer._load()
    for prompt, response, value in zip(prompts, responses, scores, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(prompt + response, return_tensors="pt")).logits.item()
        assert value == pytest.approx(expected, abs=1e-5)
    scorer.release()
    assert scorer._loaded is None


def test_of_several_outputs_one_is_named_and_given_as_log_probability(classifiers):
    scores = [score(SequenceClassificationScorer(classifiers[3], label=i), ["p"], ["r"])[0] for i in range(3)]
    assert sum(map(math.exp, scores)) == pytest.approx(1)
    with pytest.raises(UserError, match=r"scorer.label=None: .* has 3 outputs; say which is the reward"):
        score(SequenceClassificationScorer(classifiers[3]), ["p"], ["r"])
    with pytest.raises(UserError, match=r"scorer.label=0: .* has 1 outputs; leave label out"):
        score(SequenceClassificationScorer(classifiers[1], label=0), ["p"], ["r"])


def test_a_template_and_the_last_line_decide_what_is_read(classifiers):
    plain = score(SequenceClassificationScorer(classifiers[1]), ["b "], ["c"])
    last = score(SequenceClassificationScorer(classifiers[1], last_line=True), ["a\nb "], ["c"])
    template = score(SequenceClassificationScorer(classifiers[1], template="{prompt}{response}"), ["b "], ["c"])
    assert plain == last == template
    assert score(SequenceClassificationScorer(classifiers[1], template="{response}|{prompt}"), ["b "], ["c"]) != plain


def test_a_model_folder_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"there is no folder './no/such/model'"):
        SequenceClassificationScorer("./no/such/model")
