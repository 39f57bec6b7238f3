"""Constructors in Python: values of a wrong type are refused, and those that stand for others are converted."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from tiny import adamw, fit, same, weights, write_pairs

import lit_align.callbacks
import lit_align.data
import lit_align.objectives
from lit_align.arguments import CheckedArguments
from lit_align.callbacks import ReferenceRefresh, WinRate
from lit_align.data import EnsembleScorer, FunctionScorer, OfflinePairs, OnPolicyPairs, Sampling
from lit_align.errors import UserError
from lit_align.objectives import DPO, SFT
from lit_align.policy import LoRAConfig, PolicyConfig

POLICY = PolicyConfig("model")


def reward(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def message_of(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        make()
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(POLICY, beta="0.1"), 'DPO: beta="0.1" must be float. Change it.'),
        (lambda: DPO(POLICY, beta=True), "DPO: beta=true must be float. Change it."),
        (lambda: DPO(POLICY, schedule="cosin"), "DPO: schedule=\"cosin\" must be 'constant' | 'linear' | 'cosine'."),
        (lambda: DPO(POLICY, accept_changes="beta"), 'DPO: accept_changes="beta" must be Sequence[str].'),
        (lambda: DPO("model"), 'DPO: policy="model" must be PolicyConfig. Write PolicyConfig(path).'),
        (lambda: DPO(POLICY, lora=16), "DPO: lora=16 must be LoRAConfig | None. Write LoRAConfig(r=16)."),
        (lambda: DPO(POLICY, optimizer=adamw(1)([torch.zeros(1)])), "DPO: optimizer, of type AdamW, must be Callable"),
        (lambda: PolicyConfig("model", dtype="bf16"), "PolicyConfig: dtype=\"bf16\" must be 'auto' | 'float32'"),
        (lambda: DPO({"name": "model"}), "PolicyConfig has no field 'name'. Its fields are: path, dtype"),
        (lambda: ReferenceRefresh(1.0, unit="epoch"), "ReferenceRefresh: unit=\"epoch\" must be 'step' | 'round'."),
        (lambda: OfflinePairs("pairs.jsonl", batch_size="8"), 'OfflinePairs: batch_size="8" must be int. Change it.'),
        (lambda: OfflinePairs(3), "OfflinePairs: train=3 must be str | list[str | Source]. Change it."),
        (lambda: OfflinePairs([]), "data.train must name a source."),
        (
            lambda: OnPolicyPairs("prompts.jsonl", reward),
            "must be Scorer | PairwiseScorer. Write FunctionScorer(function).",
        ),
        (lambda: EnsembleScorer({"a": reward, "b": reward}), "FunctionScorer(function)."),
        (lambda: WinRate("prompts.jsonl", reward), "FunctionScorer(function)."),
        (lambda: Sampling(stop="."), 'Sampling: stop="." must be list[str]. Change it.'),
        (lambda: OnPolicyPairs("p", FunctionScorer(reward), sampling={"max_tokens": 4}), "has no field 'max_tokens'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_type(make, message):
    assert message in message_of(make)


def wrong_value(annotation: Any) -> object:
    """A value that no argument of this package takes, though it looks plausible where the annotation is a number."""
    return "1" if annotation in (int, float, bool) else object()


PUBLIC = [
    cls
    for module in (lit_align.callbacks, lit_align.data, lit_align.objectives)
    for name in module.__all__
    if isinstance(cls := getattr(module, name), CheckedArguments) and not inspect.isabstract(cls)
]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_every_public_class_refuses_a_wrong_value_of_each_argument(cls):
    """The first check is that of the types: other required arguments may be missing."""
    own = {each.name: each for each in inspect.signature(cls).parameters.values()}
    inherited = {
        each.name: each
        for base in cls.__mro__
        if "__init__" in vars(base) and base is not object
        for each in inspect.signature(base.__init__).parameters.values()
    }
    for name, parameter in (inherited if any(each.kind is each.VAR_KEYWORD for each in own.values()) else own).items():
        if name != "self" and parameter.annotation not in (Any, inspect.Parameter.empty):
            message = message_of(lambda name=name, kind=parameter.annotation: cls(**{name: wrong_value(kind)}))
            assert message.startswith(f"{cls.__name__}: {name}"), message


def test_values_that_stand_for_others_are_converted(tmp_path):
    module = DPO(
        {"path": tmp_path, "dtype": torch.bfloat16},
        lora={"r": 4, "targets": ("q_proj",)},
        reference={"form": "adapter"},
    )
    assert module.policy_config == PolicyConfig(str(tmp_path), "bfloat16")
    assert module.lora == LoRAConfig(r=4, targets=["q_proj"])
    assert module.reference_config.form == "adapter"
    data = OnPolicyPairs(tmp_path / "prompts.jsonl", FunctionScorer(reward), sampling={"max_new_tokens": 4})
    assert data.prompts == str(tmp_path / "prompts.jsonl")
    assert data.sampling == Sampling(max_new_tokens=4)


def trained_on(model: str, given: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after training, and the line about the data."""
    data, module = OfflinePairs(given, validation=given, batch_size=4), SFT(PolicyConfig(model), optimizer=adamw())
    fit(module, data)
    return weights(module), data.summary


def test_rows_a_dataset_and_a_path_train_as_their_file_does(tiny_model: str, in_tmp: Path):
    path = Path(write_pairs(in_tmp))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected, line = trained_on(tiny_model, str(path))
    for given in (path, rows, Dataset.from_list(rows)):
        trained, summary = trained_on(tiny_model, given)
        assert same(trained, expected)
        assert summary.partition(":")[2] == line.partition(":")[2]
    several = OfflinePairs([path, rows, {"path": rows, "weight": 2}])
    assert [Path(source.path).name for source in several._sources] == ["pairs.jsonl", "rows.jsonl", "rows.jsonl"]
    assert "rows[1] cannot be written as JSON" in message_of(lambda: OfflinePairs([{"prompt": "a"}, {"prompt": b""}]))
    changed = Dataset.from_list(rows).with_transform(lambda batch: batch)
    assert "Apply the function with `map`" in message_of(lambda: OfflinePairs(changed))


def test_half_a_surrogate_pair_in_given_rows_is_replaced():
    data = OfflinePairs([{"prompt": "a\ud83d", "chosen": "b", "rejected": "c"}])
    assert data._sources[0].read("preferences")[0].prompt == "a�"


def test_a_users_class_is_checked_by_its_own_annotations():
    class Own(DPO):
        def __init__(
            self, policy, *, margin: float | Literal["auto"], names: Mapping[str, "int"] | None = None, **more
        ):
            super().__init__(policy, **more)
            self.margin, self.names = margin, names

    module = Own({"path": "model"}, margin="auto", names={"a": 1}, beta=1)
    assert (module.margin, module.names, module.beta) == ("auto", {"a": 1}, 1)
    assert "Own: margin=\"x\" must be float | 'auto'." in message_of(lambda: Own(POLICY, margin="x"))
    assert 'Own: names={"a": "b"} must be Mapping[str, int] | None.' in message_of(
        lambda: Own(POLICY, margin=1, names={"a": "b"})
    )
    assert 'Own: beta="x" must be float.' in message_of(lambda: Own(POLICY, margin=1, beta="x"))


def test_annotations_that_name_nothing_are_not_checked():
    class Own(FunctionScorer):
        def __init__(self, function: "Nothing", values: Sequence["Nothing"] = ()):  # noqa: F821
            super().__init__(function)
            self.values = values

    assert Own(reward, values=3).values == 3


def test_help_shows_the_arguments_of_a_class():
    assert [*inspect.signature(Sampling).parameters] == ["max_new_tokens", "temperature", "top_p", "top_k", "stop"]
    assert [*inspect.signature(DPO).parameters][:2] == ["policy", "label_smoothing"]
