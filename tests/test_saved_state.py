"""The state in a checkpoint against the state that a run writes."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_align.callbacks import Drift, ReferenceRefresh, RunReport
from lit_align.data.loader import LoaderState
from lit_align.data.rounds.current import RoundsState
from lit_align.errors import check_types
from lit_align.objectives.schedule import Completed
from lit_align.position import KEY, Position
from lit_align.reporting.metrics_csv import MetricsCSV
from lit_align.saved_state import check_callbacks, check_like, check_optimizer, check_weight_numbers, continue_saving

OURS = {
    "count": 0,
    "rate": 0.5,
    "betas": (0.9, 0.99),
    "best": torch.tensor(1.0),
    "on": True,
    "path": "",
    "more": {"n": 1},
}


@pytest.mark.parametrize(
    "found",
    [
        OURS,
        {"count": 7.5, "rate": 1, "betas": [0.8, 0], "best": torch.tensor(2), "on": False, "path": "x", "more": {}},
        OURS | {"unknown": "x"},
        {},
    ],
    ids=["its own", "other values", "an entry more", "fewer entries"],
)
def test_a_state_of_the_same_form_passes(found: dict[str, Any]):
    check_like(found, OURS | {"nothing yet": None}, "state")
    check_like({"nothing yet": 3}, {"nothing yet": None}, "state")


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        ("count", None, "state.count is null"),
        ("count", True, "state.count is true"),
        ("rate", "x", 'state.rate is "x"'),
        ("rate", float("nan"), "state.rate is NaN"),
        ("betas", (0.9,), r"state.betas is \[0.9\]"),
        ("betas", (0.9, "x"), 'state.betas.1 is "x"'),
        ("best", torch.ones(2), "state.best is "),
        ("best", 1.0, "state.best is 1.0"),
        ("on", 1, "state.on is 1"),
        ("path", 3, "state.path is 3"),
        ("more", [], r"state.more is \[\]"),
        ("more", {"n": "x"}, 'state.more.n is "x"'),
    ],
)
def test_an_entry_of_another_form_is_named(entry: str, value: Any, named: str):
    with pytest.raises(TypeError, match=f"^{named}"):
        check_like(OURS | {entry: value}, OURS, "state")


def saving(**changes: Any) -> dict[str, Any]:
    """The state of a ModelCheckpoint that keeps two checkpoints."""
    scores = {"a.ckpt": torch.tensor(1.0), "b.ckpt": torch.tensor(2.0)}
    state = ModelCheckpoint("checkpoints", monitor="loss").state_dict()
    return state | {"best_k_models": scores, "kth_best_model_path": "b.ckpt", "kth_value": scores["b.ckpt"]} | changes


def test_the_state_of_lightnings_callbacks_passes():
    saves, stops = ModelCheckpoint("checkpoints", monitor="loss", save_top_k=2), EarlyStopping("loss")
    states = {saves.state_key: saving(), stops.state_key: stops.state_dict()}
    check_callbacks([saves, stops], states)
    check_callbacks([saves, stops], {saves.state_key: saving(best_k_models={}, kth_best_model_path="")})
    check_callbacks([saves, stops], {})


@pytest.mark.parametrize(
    "changes",
    [
        {"best_k_models": []},
        {"best_k_models": {3: torch.tensor(1.0)}},
        {"best_k_models": {"b.ckpt": 1.0}},
        {"best_k_models": {"b.ckpt": torch.ones(2)}},
        {"kth_best_model_path": "c.ckpt"},
        {"kth_best_model_path": ""},
        {"kth_value": 1.0},
        {"last_model_path": None},
    ],
    ids=str,
)
def test_a_checkpoint_list_that_no_run_writes_is_named(changes: dict[str, Any]):
    saves = ModelCheckpoint("checkpoints", monitor="loss", save_top_k=2)
    with pytest.raises(TypeError, match=f"^ModelCheckpoint.{next(iter(changes))} "):
        check_callbacks([saves], {saves.state_key: saving(**changes)})


@pytest.mark.parametrize("before", ["run/checkpoints", "checkpoints"], ids=["moved", "named from another folder"])
def test_a_moved_folder_keeps_the_list_of_its_checkpoints(in_tmp, before: str):
    now = in_tmp / "elsewhere" / "checkpoints"
    now.mkdir(parents=True)
    (now / "b.ckpt").touch()
    (now / "last.ckpt").symlink_to("b.ckpt")
    saves = ModelCheckpoint(now, monitor="loss", save_top_k=2, save_last="link")
    a, b = (f"{before}/{name}.ckpt" for name in "ab")
    kept = {"best_model_path": a, "kth_best_model_path": b, "last_model_path": f"{before}/last.ckpt"}
    scores = {a: torch.tensor(1.0), b: torch.tensor(2.0)}
    states = {saves.state_key: saving(dirpath=before, best_k_models=scores, **kept)}
    continue_saving([saves], states, now / "last.ckpt", 7)
    saves.load_state_dict(states[saves.state_key])
    assert saves.best_k_models == {f"{now}/a.ckpt": 1.0, f"{now}/b.ckpt": 2.0}
    assert [saves.best_model_path, saves.kth_best_model_path] == [f"{now}/a.ckpt", f"{now}/b.ckpt"]
    for resumed in ("last.ckpt", "interrupted.ckpt"):
        saves._last_checkpoint_saved = ""
        continue_saving([saves], states, now / resumed, 7)
        assert saves._last_checkpoint_saved == f"{now}/b.ckpt", "last.ckpt is to be a link again"
    assert saves._last_global_step_saved == 7, "the step is not saved again"


def test_another_runs_checkpoint_brings_no_list_of_checkpoints(in_tmp):
    saves = ModelCheckpoint(in_tmp / "new", monitor="loss", save_top_k=2)
    states = {saves.state_key: saving(dirpath="other")}
    continue_saving([saves], states, in_tmp / "other" / "b.ckpt", 7)
    assert states[saves.state_key]["dirpath"] == "other"


STEP_OTHERWISE = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
OPTIMIZERS = [each for each in vars(torch.optim).values() if isinstance(each, type) and each not in STEP_OTHERWISE]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_torchs_optimizers_passes(kind: Any):
    optimizers = [kind([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1) for _ in range(2)]
    for made in optimizers:
        made.param_groups[0]["params"][0].sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    check_optimizer(optimizers[1])
    optimizers[1].step()


def test_an_optimizers_options_and_state_are_checked():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=1)
    weight.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    check_optimizer(optimizer)
    optimizer.param_groups[0]["lr"] = "x"
    with pytest.raises(TypeError, match="lr is"):
        check_optimizer(optimizer)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="lr"):
        check_optimizer(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.state[weight] = 3  # type: ignore[assignment]
    with pytest.raises(TypeError, match="the state of a weight is 3"):
        check_optimizer(optimizer)


def numbered(*groups: list[Any], state: Any = (0, 1, 3)) -> dict[str, Any]:
    """A saved optimizer with these numbers of weights."""
    return {"param_groups": [{"params": numbers} for numbers in groups], "state": {number: {} for number in state}}


@pytest.mark.parametrize(
    "saved",
    [numbered([0, 1, 2, 3]), numbered([0, 3], [1, 2]), numbered([0, 1], [], [3]), numbered([5], state=())],
    ids=["one group", "two groups", "among frozen weights", "no state"],
)
def test_the_numbers_that_optimizers_give_their_weights_pass(saved: dict[str, Any]):
    check_weight_numbers(saved)


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        (numbered([1, 0, 3]), r"param_groups.0.params is \[1, 0, 3\]"),
        (numbered([0, 1, 1, 3]), r"param_groups.0.params is \[0, 1, 1, 3\]"),
        (numbered([0, 1], [1, 3]), r"param_groups.1.params is \[1, 3\]"),
        (numbered([0, "1", 3]), r'param_groups.0.params is \[0, "1", 3\]'),
        (numbered([0, 1, 2, 4]), "state has a weight 3, "),
        (numbered([0, 1, 3], state=[0, "x"]), 'state has a weight "x", '),
    ],
    ids=["swapped", "twice", "in two groups", "words", "no number of a state", "a state of words"],
)
def test_numbers_that_would_exchange_states_are_named(saved: dict[str, Any], named: str):
    with pytest.raises(TypeError, match=f"^{named}"):
        check_weight_numbers(saved)


AT = Position(epoch=1, batches=2, of=4, step=6, seen=6, validation_due=False, validated=False)
RECORDS = [AT, LoaderState(1, 4, 8, 99), RoundsState(1, 0, 0, {}), Completed(4, 1, 0.5)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize("value", [None, "3", -1, True, float("nan"), torch.tensor(1)], ids=str)
def test_a_record_of_other_values_names_the_field(record: Any, value: Any):
    check_types(record)
    fields = record._asdict() if isinstance(record, tuple) else vars(record)
    name = next(iter(fields))
    with pytest.raises(TypeError, match=f"^{name} is "):
        check_types(type(record)(**fields | {name: value}))


def test_a_position_beyond_its_epoch_is_named():
    assert Position.load({KEY: vars(AT)}) == AT
    with pytest.raises(TypeError, match="batches is 5 of 4"):
        Position.load({KEY: vars(AT) | {"batches": 5}})


TAKING = {
    "measured_at": Drift().load_state_dict,
    "count": ReferenceRefresh(0.5).load_state_dict,
    "trained": RunReport().load_state_dict,
    "rows": MetricsCSV("nowhere").resume,
}
FULL = {"measured_at": 0, "count": 0, "last_step": 0, "seconds": 1.5, "trained": 0, "rows": 0, "pending": None}


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("value", [None, "3", -2, True, 0.5, float("nan"), torch.ones(2)], ids=str)
def test_a_count_that_no_run_writes_is_named(name: str, value: Any):
    TAKING[name](FULL)
    with pytest.raises(TypeError, match=f"^{name} is "):
        TAKING[name](FULL | {name: value})
    with pytest.raises(KeyError, match=name):
        TAKING[name]({key: value for key, value in FULL.items() if key != name})


PENDING = {"step": 3, "train/loss": 0.5, "train/length": float("inf"), "epoch": 1}


@pytest.mark.parametrize(
    ("pending", "named"),
    [
        ([], r"pending is \[\]"),
        (PENDING | {"train/loss": "0.5"}, 'pending."train/loss" is "0.5"'),
        (PENDING | {"train/loss": True}, 'pending."train/loss" is true'),
        (PENDING | {"train/loss": torch.ones(2)}, 'pending."train/loss" is '),
        (PENDING | {3: 0.5}, "pending.3 is 0.5"),
        (PENDING | {"step": -1}, "pending.step is -1"),
        (PENDING | {"epoch": float("nan")}, "pending.epoch is NaN"),
    ],
    ids=["a list", "words", "a truth value", "a tensor", "no name", "a step below 0", "no epoch's number"],
)
def test_a_pending_row_that_no_run_writes_is_named(tmp_path, pending: Any, named: str):
    metrics = MetricsCSV(tmp_path)
    metrics.resume({"rows": 0, "pending": PENDING})
    with pytest.raises(TypeError, match=f"^{named}"):
        metrics.resume({"rows": 0, "pending": pending})
