"""Functions as scorers."""

import json
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
from scoring import CODE, message_of

from lit_align.data.scorers.base import ScorerError, compare, score
from lit_align.data.scorers.function import FunctionScorer, PairwiseFunctionScorer
from lit_align.errors import UserError


def test_a_function_is_found_by_file_and_by_import_path(in_tmp: Path):
    Path("rewards.py").write_text(CODE)
    assert score(FunctionScorer("rewards.py:length"), ["ab", "c"], ["d", ""]) == [3.0, 1.0]
    assert FunctionScorer("operator.add").function([1.0], [2.0]) == [1.0, 2.0]


def test_a_file_does_not_hide_the_module_of_its_name(in_tmp: Path):
    Path("json.py").write_text(CODE)
    assert score(FunctionScorer("json.py:length"), ["a"], ["b"]) == [2.0]
    assert FunctionScorer("json.dump").function is json.dump


def test_a_functions_identity_follows_its_code(tmp_path: Path):
    identities = []
    for folder, code in (("a", CODE), ("b", CODE), ("c", CODE + "\n# another version\n")):
        file = tmp_path / folder / "rewards.py"
        file.parent.mkdir()
        file.write_text(code)
        path, _, fingerprint = FunctionScorer(f"{file}:length").identity.rpartition("@")
        assert path == f"{file}:length"
        identities.append(fingerprint)
    assert identities[0] == identities[1] != identities[2]


def test_a_functions_identity_follows_the_values_that_it_holds():
    """Rewards are stored under it: with another weight they must not be read again."""

    class Weighted:
        def __init__(self, weight: float):
            self.weight = weight

        def __call__(self, prompts, responses):
            return [self.weight] * len(responses)

        def reward(self, prompts, responses):
            return self(prompts, responses)

    def weighted(prompts, responses, weight):
        return [weight] * len(responses)

    def closed_over(weight: float) -> Any:
        return lambda prompts, responses: [weight] * len(responses)

    def by_default(weight: float) -> Any:
        return lambda prompts, responses, w=weight: [w] * len(responses)

    kinds = [Weighted, lambda w: Weighted(w).reward, closed_over, lambda w: partial(weighted, weight=w), by_default]
    for make in kinds:
        one, again, other = (FunctionScorer(make(weight)).identity for weight in (1.0, 1.0, 2.0))
        assert one == again != other


@pytest.mark.parametrize(
    "code",
    [
        "def reward(p, r): return [float(sum(c in {'x', 'y', 'zz'} for c in each)) + WEIGHT for each in r]",
        "import torch\n@torch.no_grad()\ndef reward(p, r): return [WEIGHT] * len(r)",
        "class Reward:\n    def __call__(self, p, r): return [WEIGHT] * len(r)\nreward = Reward()",
    ],
)
def test_a_notebooks_code_has_one_identity_until_it_changes(code: str):
    """A cell that is run again makes new code at another address."""

    def identity(weight: str) -> str:
        notebook: dict[str, Any] = {"__name__": "notebook"}  # has no file
        exec(code.replace("WEIGHT", weight), notebook)
        kept.append(notebook)
        return FunctionScorer(notebook["reward"]).identity

    kept: list[Any] = []
    one, again, other = identity("1.0"), identity("1.0"), identity("2.0")
    assert one == again != other


def test_a_value_that_holds_itself_is_read_once():
    endless: list[Any] = [1.0]
    endless.append(endless)
    scorer = FunctionScorer(partial(lambda prompts, responses, held: [0.0] * len(responses), held=endless))
    assert scorer.identity


def test_an_edited_file_is_run_again_in_the_same_process(in_tmp: Path):
    """Its identity changes, under which rewards are stored."""
    rewards = []
    for code in ("[1.0] * len(responses)", "[22.0] * len(responses)"):
        Path("edited.py").write_text(f"def reward(prompts, responses): return {code}\n")
        rewards += score(FunctionScorer("edited.py:reward"), ["a"], ["b"])
    assert rewards == [1.0, 22.0]


def test_an_edited_module_is_run_again_in_the_same_process(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(in_tmp)
    rewards = []
    for code in ("[1.0] * len(responses)", "[22.0] * len(responses)"):
        Path("edited_module.py").write_text(f"def reward(prompts, responses): return {code}\n")
        rewards += score(FunctionScorer("edited_module.reward"), ["a"], ["b"])
    assert rewards == [1.0, 22.0]


def test_a_function_itself_is_a_scorer_whose_identity_follows_its_code(in_tmp: Path):
    def scorer(code: str) -> FunctionScorer:
        notebook: dict[str, Any] = {"__name__": "notebook"}  # has no file
        exec(f"def reward(prompts, responses): return {code}", notebook)
        return FunctionScorer(notebook["reward"])

    one, other = scorer("[1.0] * len(responses)"), scorer("[2.0] * len(responses)")
    assert score(one, ["a"], ["b"]) == [1.0]
    assert one.identity == scorer("[1.0] * len(responses)").identity != other.identity
    assert compare(PairwiseFunctionScorer(lambda prompt, group: [[0.5, 1], [0, 0.5]]), ["q"], [["a", "b"]])
    with pytest.raises(UserError, match="lambda>' must take two arguments"):
        FunctionScorer(lambda texts: [1.0])


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions, **kwargs: [*map(len, completions)],  # of TRL
        lambda responses: [*map(len, responses)],
        lambda completions, prompts: [*map(len, completions)],
        lambda responses, questions, weight=1: [weight * len(each) for each in responses],
        lambda prompts, *, completions: [*map(len, completions)],
        lambda questions, answers: [*map(len, answers)],
        lambda texts, prompts: [*map(len, texts)],
        lambda response, prompt: [*map(len, response)],
        partial(lambda weight, responses: [weight * len(each) for each in responses], 1),
    ],
)
def test_responses_are_passed_by_name_wherever_they_stand(reward: Any):
    assert score(FunctionScorer(reward), ["a", "bc"], ["def", "ghij"]) == [3, 4]


def test_a_decorated_function_in_our_order_is_called_by_position():
    def reward(prompts, responses):
        return [1.0] * len(responses)

    @wraps(reward)
    def decorated(*args):
        return reward(*args)

    assert score(FunctionScorer(decorated), ["a"], ["b"]) == [1.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nowhere.py:f", ["'nowhere.py:f'", "no file 'nowhere.py'"]),
        ("no_such_package.f", ["cannot import 'no_such_package'", "No module named"]),
        ("broken.py:f", ["cannot import 'broken.py'", "No module named 'no_such_lexicon'"]),
        ("rewards.py:missing", ["no 'missing' in 'rewards.py'"]),
        ("rewards.py:nothing", ["must be a function, not of type int"]),
        ("length", ["'length'", "must be the import path"]),
        ("", ["''", "must be the import path"]),
    ],
)
def test_a_missing_function_is_named(in_tmp: Path, function: str, words: list[str]):
    Path("rewards.py").write_text(CODE)
    Path("broken.py").write_text("import no_such_lexicon")
    message = message_of(UserError, FunctionScorer, function)
    for word in ["scorer.function=", "path/to/file.py:function", *words]:
        assert word in message, message


def test_an_error_within_a_functions_file_is_told_apart(in_tmp: Path):
    Path("keyed.py").write_text("import os\nKEY = os.environ['NO_SUCH_KEY']\ndef reward(prompts, responses): ...\n")
    message = message_of(UserError, FunctionScorer, "keyed.py:reward")
    assert "KeyError: 'NO_SUCH_KEY' in keyed.py, line 2). The error is in its code: fix it, or set what" in message


def test_a_function_of_one_argument_without_its_name_is_refused(in_tmp: Path):
    Path("rewards.py").write_text(CODE)
    with pytest.raises(
        UserError, match=r"rewards.py:of_one' must take two arguments: reward\(prompts, responses\) -> "
    ):
        FunctionScorer("rewards.py:of_one")
    with pytest.raises(UserError, match=r"rewards.py:of_one' must take two arguments: prefer\(prompt, responses\) -> "):
        PairwiseFunctionScorer("rewards.py:of_one")


def test_a_function_that_changes_its_prompts_changes_no_other():
    def turns(prompts: list[Any], responses: list[str]) -> list[int]:
        for prompt, response in zip(prompts, responses, strict=True):
            prompt.append({"role": "assistant", "content": response})
        return [len(prompt) for prompt in prompts]

    prompt = [{"role": "user", "content": "a"}]
    (group,) = FunctionScorer(turns).score_groups([prompt], [["b", "c", "d"]])
    assert group.scores == [2.0, 2.0, 2.0]
    assert len(prompt) == 1


def test_an_error_on_chats_says_that_a_prompt_is_a_list_of_messages(in_tmp: Path):
    Path("rewards.py").write_text("def words(prompts, responses): return [len(prompt.split()) for prompt in prompts]")
    chat = [{"role": "user", "content": "Which bird?"}]
    message = message_of(ScorerError, score, FunctionScorer("rewards.py:words"), [chat], ["Crow."])
    assert '(prompt, a list of messages: "Which bird?", response "Crow.")' in message


def test_a_batch_size_below_one_is_refused():
    assert "batch_size=0" in message_of(UserError, FunctionScorer, "json.dump", batch_size=0)


def test_a_function_compares_responses(in_tmp):
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
        ("[[0.5, 0.9], [0.9, 0.5]]", "which are not preferences"),
        ("[[0.5, float('nan')], [0.9, 0.5]]", "which are not preferences"),
        ("'A'", "raised TypeError"),
    ],
)
def test_values_that_are_not_preferences_are_refused(in_tmp, returned, words):
    (in_tmp / "prefer.py").write_text(f"def bad(prompt, responses): return {returned}\n")
    message = message_of(ScorerError, compare, PairwiseFunctionScorer("prefer.py:bad"), ["q"], [["a", "b"]])
    assert words in message
    assert 'first response "a"' in message
