"""Each callback of Lightning and each option of its Trainer works with our modules, or is refused at the start."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from tiny import adamw, fit, on_policy, same, weights, write_pairs, write_prompts

from lit_align.callbacks import FSDP2Strategy, MonitorCheck, ReferenceRefresh, WinRate
from lit_align.cli import main
from lit_align.data import FunctionScorer, OfflinePairs
from lit_align.errors import UserError
from lit_align.lightning_features import REFUSED_CALLBACKS, check_features
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig

Run = Callable[..., Trainer]


@pytest.fixture
def run(tiny_model: str, in_tmp: Path, blank_figures: None) -> Run:
    """A fit of two steps with one validation."""

    def run(*given: Callback, validation: bool = True, **options: Any) -> Trainer:
        pairs = write_pairs(in_tmp)
        data = OfflinePairs(pairs, batch_size=4, seed=1, validation=pairs if validation else None)
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        return fit(module, data, *given, default_root_dir=str(in_tmp), **options)

    return run


# --- options of the trainer ---

WORKS: dict[str, list[Any]] = {
    "accelerator": ["auto"],
    "strategy": ["auto", "single_device", "ddp"],
    "devices": ["auto"],
    "num_nodes": [1],
    "precision": ["64-true", "bf16-mixed", "16-mixed"],
    "logger": [True],
    "callbacks": [None],
    "max_epochs": [2, -1],
    "min_epochs": [1],
    "max_steps": [1, 3],
    "min_steps": [1],
    "max_time": ["00:00:01:00", {"minutes": 1}],
    "limit_train_batches": [1, 0.5, 100],
    "limit_val_batches": [0, 1, 0.5],
    "limit_test_batches": [0, 1],
    "limit_predict_batches": [0, 1],
    "overfit_batches": [0],
    "val_check_interval": [1, 2, 0.5, "00:00:00:01"],
    "check_val_every_n_epoch": [2, None],
    "num_sanity_val_steps": [0, -1],
    "log_every_n_steps": [0, 1],
    "enable_checkpointing": [True],
    "enable_progress_bar": [True],
    "enable_model_summary": [True],
    "accumulate_grad_batches": [2, 3],
    "gradient_clip_val": [0, 0.5],
    "gradient_clip_algorithm": ["value"],
    "deterministic": ["warn"],
    "benchmark": [True],
    "inference_mode": [False],
    "use_distributed_sampler": [False],
    "profiler": ["simple", PassThroughProfiler()],
    "detect_anomaly": [True],
    "barebones": [True],
    "plugins": [[]],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "enable_autolog_hparams": [False],
    "model_registry": ["models"],
}
REFUSED: dict[str, tuple[Any, str]] = {
    "accumulate_grad_batches": (0, "trainer.accumulate_grad_batches=0 must be at least 1"),
    "gradient_clip_val": (-0.5, "trainer.gradient_clip_val=-0.5 must be at least 0"),
    "val_check_interval": (0, "trainer.val_check_interval=0 must be above 0"),
    "check_val_every_n_epoch": (0, "trainer.check_val_every_n_epoch=0 must be at least 1"),
    "limit_train_batches": (0, "trainer.limit_train_batches=0 must be above 0"),
    "overfit_batches": (1, "trainer.overfit_batches=1 must be 0"),
    "log_every_n_steps": (-1, "trainer.log_every_n_steps=-1 must be at least 0"),
    "num_sanity_val_steps": (-2, "trainer.num_sanity_val_steps=-2 must be at least 0"),
    "min_epochs": (-1, "trainer.min_epochs=-1 must be at least 0"),
    "min_steps": (-1, "trainer.min_steps=-1 must be at least 0"),
    "max_time": ({"seconds": -5}, "must be above 0. Raise it"),
    "precision": ("16-true", "trainer.precision=16-true rounds AdamW's eps"),
    "plugins": (AsyncCheckpointIO(), "AsyncCheckpointIO ends a checkpoint's file while"),
}
# The first is refused, which the tests of the command line show; each test here sets the second.
TESTED_ELSEWHERE = {"fast_dev_run", "default_root_dir"}


def test_every_option_of_the_trainer_is_in_the_table():
    parameters = {*inspect.signature(Trainer.__init__).parameters} - {"self"}
    assert parameters == {*WORKS} | TESTED_ELSEWHERE


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in WORKS.items() for value in values],
    ids=lambda each: type(each).__name__ if isinstance(each, PassThroughProfiler) else str(each),
)
def test_an_option_that_works_trains(run: Run, option: str, value: Any):
    limits = {"max_steps": 2} if value == -1 and option == "max_epochs" else {}
    if option == "callbacks":
        trainer = run()
    elif option == "barebones":
        trainer = run(barebones=True, logger=None, enable_checkpointing=None, num_sanity_val_steps=None)
    else:
        trainer = run(**{option: value, **limits})
    expected = {"max_steps": value, "accumulate_grad_batches": 1, "limit_train_batches": 1 if value != 100 else 2}
    if option in expected:
        assert trainer.global_step == min(2, expected[option])
    assert trainer.global_step > 0
    if option != "barebones":
        assert math.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_does_not_work_is_refused(run: Run, option: str):
    value, message = REFUSED[option]
    with pytest.raises(UserError, match=message):
        run(**{option: value})


def test_bfloat16_for_all_tensors_is_refused(run: Run):
    with pytest.raises(UserError, match=r"precision=bf16-true rounds rotary frequencies, .* Use model.policy.dtype=bf"):
        run(precision="bf16-true")


# --- callbacks ---


class Summed(callbacks.WeightAveraging):
    """An average over all steps."""


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "Callback": callbacks.Callback,
    "Checkpoint": callbacks.Checkpoint,
    "DeviceStatsMonitor": lambda: callbacks.DeviceStatsMonitor(cpu_stats=False),
    "EarlyStopping": lambda: callbacks.EarlyStopping("val/loss"),
    "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.5),
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2, 1: 1}),
    "LambdaCallback": lambda: callbacks.LambdaCallback(on_train_start=lambda trainer, module: None),
    "LearningRateMonitor": lambda: callbacks.LearningRateMonitor("step"),
    "ModelCheckpoint": lambda: callbacks.ModelCheckpoint(monitor="val/reward_accuracy", save_top_k=2),
    "ModelSummary": callbacks.ModelSummary,
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("kept"),
    "ProgressBar": callbacks.ProgressBar,
    "RichModelSummary": callbacks.RichModelSummary,
    "RichProgressBar": callbacks.RichProgressBar,
    "ThroughputMonitor": lambda: callbacks.ThroughputMonitor(lambda batch: batch.size, window_size=2),
    "Timer": lambda: callbacks.Timer("00:00:01:00"),
    "TQDMProgressBar": callbacks.TQDMProgressBar,
    "WeightAveraging": Summed,
}


def test_every_callback_is_in_a_table():
    refused = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), tuple(REFUSED_CALLBACKS))}
    assert {*CALLBACKS} | refused == {*callbacks.__all__}
    assert not refused & {*CALLBACKS}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_works_trains(run: Run, in_tmp: Path, name: str):
    trainer = run(
        CALLBACKS[name](),
        logger=CSVLogger(in_tmp),
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert trainer.global_step == (1 if name == "GradientAccumulationScheduler" else 2)
    assert math.isfinite(trainer.callback_metrics["val/loss"])


RESUMED = [
    name if name in ("GradientAccumulationScheduler", "RichProgressBar") else pytest.param(name, marks=pytest.mark.slow)
    for name in CALLBACKS
]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_a_callback_resumes_within_an_epoch(tiny_model: str, in_tmp: Path, name: str):
    def train(*more: Callback, **options: Any) -> dict[str, torch.Tensor]:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        pairs = write_pairs(in_tmp)
        data = OfflinePairs(pairs, batch_size=2, validation=pairs)
        options |= {"max_epochs": 2, "logger": CSVLogger(in_tmp), "enable_progress_bar": True}
        options["enable_checkpointing"] = isinstance(given := CALLBACKS[name](), callbacks.Checkpoint)
        fit(module, data, given, *more, default_root_dir=str(in_tmp), **options)
        return weights(module)

    def save(trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, number: int) -> None:
        if trainer.current_epoch == 0 and number == 1:
            trainer.save_checkpoint("middle.ckpt")

    whole = train(callbacks.LambdaCallback(on_train_batch_end=save))
    assert same(train(ckpt_path="middle.ckpt"), whole)


@pytest.mark.parametrize("cls", [*REFUSED_CALLBACKS, callbacks.BackboneFinetuning], ids=lambda cls: cls.__name__)
def test_a_callback_that_does_not_work_is_refused(
    cls: type[Callback], tiny_model: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
):
    """By the command line, before a hook of the callback runs."""
    options = {"StochasticWeightAveraging": {"swa_lrs": 0.1}, "ModelPruning": {"pruning_fn": "l1_unstructured"}}
    entry = {"class_path": cls.__name__, "init_args": options.get(cls.__name__, {})}
    with pytest.raises(SystemExit) as left:
        main(["fit", *command_line(tiny_model, in_tmp), "--trainer.callbacks", json.dumps([entry])])
    assert left.value.code == 2
    assert f"error: {cls.__name__} " in capsys.readouterr().err


def command_line(model: str, folder: Path) -> list[str]:
    options = f"--model=DPO --model.policy.path={model} --data=OfflinePairs --data.train={write_pairs(folder)}"
    return f"{options} --data.batch_size=4 --trainer.accelerator=cpu --trainer.max_epochs=1".split()


@pytest.mark.parametrize("refresh", [False, True], ids=["still", "refresh"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2)], ids=["full", "lora"])
def test_an_averaged_run_resumes_as_the_whole_one(
    tiny_model: str, in_tmp: Path, lora: LoRAConfig | None, refresh: bool
):
    def train(*more: Callback, **options: Any) -> DPO:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), lora=lora, optimizer=adamw())
        data = OfflinePairs(write_pairs(in_tmp), batch_size=4, seed=1)
        given = [ReferenceRefresh(0.5)] * refresh + [callbacks.EMAWeightAveraging(decay=0.5), *more]
        fit(module, data, *given, max_epochs=3, **options)
        return module

    def save(trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(in_tmp / "second.ckpt")

    whole = train(callbacks.LambdaCallback(on_train_epoch_end=save))
    again = train(ckpt_path=str(in_tmp / "second.ckpt"))
    averaged = dict(whole.policy.trainable_weights())  # type: ignore[union-attr]
    for name, weight in again.policy.trainable_weights():  # type: ignore[union-attr]
        assert torch.equal(weight, averaged[name]), name


def test_an_averaged_run_that_dies_in_its_verdict_judges_the_average(tiny_model: str, in_tmp: Path):
    judged: list[dict[str, torch.Tensor]] = []

    def judge(trainer: Trainer, module: LightningModule) -> None:
        judged.append(weights(module))
        if len(judged) == 2:
            raise KeyboardInterrupt

    def train(**options: Any) -> None:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        saving = callbacks.ModelCheckpoint("ckpt", save_last=True, enable_version_counter=False)
        last = [callbacks.LambdaCallback(on_train_end=judge), saving]
        data = OfflinePairs(write_pairs(in_tmp), batch_size=4, seed=1)
        fit(module, data, callbacks.EMAWeightAveraging(decay=0.5), *last, enable_checkpointing=True, **options)

    train()
    with pytest.raises(SystemExit):  # Lightning's, after a KeyboardInterrupt
        train()
    train(ckpt_path="ckpt/last.ckpt")
    assert len(judged) == 3
    assert same(judged[2], judged[0])


@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "within an epoch"])
def test_a_run_that_stopped_early_and_dies_in_its_verdict_trains_no_more(tiny_model: str, in_tmp: Path, within: bool):
    """Lightning's checkpoints do not say that the training was over."""
    ends: list[tuple[int, int]] = []

    def end(trainer: Trainer, module: LightningModule) -> None:
        ends.append((trainer.global_step, trainer.current_epoch))
        if len(ends) == 1:
            raise KeyboardInterrupt

    def train(**options: Any) -> None:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        saving = callbacks.ModelCheckpoint("ckpt", save_last=True, save_on_train_epoch_end=not within)
        stopping = callbacks.EarlyStopping("val/loss", stopping_threshold=1e9)
        given = [stopping, callbacks.LambdaCallback(on_train_end=end), saving]
        pairs = write_pairs(in_tmp)
        data = OfflinePairs(pairs, batch_size=2, validation=pairs)
        options |= {"max_epochs": 3, "enable_checkpointing": True, "val_check_interval": 0.5 if within else 1.0}
        fit(module, data, *given, default_root_dir=str(in_tmp), **options)

    with pytest.raises(SystemExit):  # Lightning's, after a KeyboardInterrupt
        train()
    train(ckpt_path="ckpt/last.ckpt")
    assert ends == [(2 if within else 4, 1)] * 2


def test_a_run_whose_time_ended_within_an_epoch_is_extended_from_there(tiny_model: str, in_tmp: Path):
    def train(days: int, *more: Callback, **options: Any) -> dict[str, torch.Tensor]:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        data = OfflinePairs(write_pairs(in_tmp), batch_size=2, seed=1)
        saving = callbacks.ModelCheckpoint("ckpt", save_last=True, enable_version_counter=False)
        given = [*more, callbacks.Timer({"days": days}), saving]
        fit(module, data, *given, max_epochs=2, enable_checkpointing=True, **options)
        return weights(module)

    def pass_two_days(trainer: Trainer, module: LightningModule, batch: Any, number: int) -> None:
        if number == 1:
            next(each for each in trainer.callbacks if isinstance(each, callbacks.Timer))._offset += 2 * 24 * 3600  # type: ignore[attr-defined]

    whole = train(3)
    assert not same(train(1, callbacks.LambdaCallback(on_train_batch_start=pass_two_days)), whole)
    assert torch.load("ckpt/last.ckpt", weights_only=True)["global_step"] == 2
    assert same(train(3, ckpt_path="ckpt/last.ckpt"), whole)


# --- metrics that are monitored ---


@pytest.mark.parametrize(
    ("monitor", "validation", "message"),
    [
        ("val/loss", False, "monitor=val/loss is never logged, since there is no validation"),
        ("val/los", True, "monitor=val/los is never logged. Name one of val/loss, "),
        ("train/los", False, "monitor=train/los is never logged. Name one of train/"),
        ("loss", True, "monitor=loss is never logged. Name a metric"),
        ("drift/kl_policy_start", True, r"must be a metric train/\* or val/\*"),
    ],
)
@pytest.mark.parametrize("kind", [callbacks.EarlyStopping, callbacks.ModelCheckpoint])
def test_a_metric_that_is_never_logged_is_found_at_the_start(run: Run, kind, monitor: str, validation: bool, message):
    steps: list[int] = []
    count = callbacks.LambdaCallback(on_train_batch_start=lambda trainer, module, batch, number: steps.append(number))
    with pytest.raises(UserError, match=message):
        run(MonitorCheck(), kind(monitor=monitor), count, validation=validation, enable_checkpointing=True)
    assert len(steps) <= 1


def test_the_last_checkpoints_are_kept_by_step(run: Run):
    saving = callbacks.ModelCheckpoint(monitor="step", mode="max", save_top_k=1, every_n_train_steps=1)
    trainer = run(MonitorCheck(), saving, enable_checkpointing=True)
    assert saving.best_model_score == trainer.global_step


def test_names_of_held_out_metrics_are_checked_at_the_start(tiny_model: str, in_tmp: Path):
    reward = FunctionScorer(lambda prompts, responses: [float(len(response)) for response in responses])

    def train(monitor: str, *more: Callback, every: int = 1) -> None:
        prompts = write_prompts(in_tmp)
        judges = {"other": reward}
        judged = WinRate(prompts, reward, judges=judges, validation=prompts, responses_per_prompt=1, every=every)
        data = OfflinePairs(write_pairs(in_tmp), batch_size=4)
        given = [MonitorCheck(), judged, callbacks.EarlyStopping(monitor, stopping_threshold=1e9), *more]
        fit(DPO(PolicyConfig(tiny_model)), data, *given, max_steps=1, limit_val_batches=0)

    with pytest.raises(UserError, match=r"monitor=val/win_rte is never logged. Name one of val/reward, .*win_rate_oth"):
        train("val/win_rte")
    with pytest.raises(UserError, match=r"val/win_rate is logged in every 2th round only .* Set win_rate.every=1\."):
        train("val/win_rate", every=2)
    train("val/win_rate_other")


def test_a_metric_of_the_users_own_code_can_be_monitored(run: Run):
    class Own(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log("val/own", 1.0)

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log("train/own", 1.0)

    for monitor in ("val/own", "train/own"):
        stop = callbacks.EarlyStopping(monitor=monitor, check_on_train_epoch_end=True)
        run(MonitorCheck(), Own(), stop, validation=True)
        assert stop.best_score == 1


# --- where the data decide ---


def test_an_interval_longer_than_the_epoch_is_refused(tiny_model, in_tmp, capsys):
    more = [f"--data.validation={write_pairs(in_tmp)}", "--trainer.val_check_interval=10"]
    with pytest.raises(SystemExit):
        main(["fit", *command_line(tiny_model, in_tmp), *more])
    assert "trainer.val_check_interval=10 must be at most 2, the number of batches" in capsys.readouterr().err


def test_an_interval_in_batches_is_refused_where_rounds_differ(tiny_model: str, in_tmp: Path):
    module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
    with pytest.raises(UserError, match="must be a share of a round"):
        fit(module, on_policy(in_tmp), val_check_interval=2, default_root_dir=str(in_tmp))


def test_a_sharding_strategy_without_its_callback_is_refused(run: Run):
    with pytest.raises(UserError, match="shards nothing without fsdp_sharding"):
        run(strategy=FSDP2Strategy())


def test_a_strategy_that_would_pickle_the_module_is_refused():
    trainer = Trainer(strategy="ddp_spawn", accelerator="cpu", devices=2, logger=False)
    with pytest.raises(UserError, match=r"strategy=ddp_spawn cannot send the module"):
        check_features(trainer)
