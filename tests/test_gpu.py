"""What only a GPU shows. The other tests run on CPUs, and these are skipped there."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build
from golden import make
from lightning.fabric.utilities import move_data_to_device
from test_attention import CASES, SCALE, inputs, outputs_and_gradients, plain
from test_logprobs import CANNOT_SHARE, logps_and_gradients, one_by_one, random_examples
from tiny import Watch, adamw, fit, on_policy, same, weights, write_pairs

from lit_align.attention import Row, RowAttention
from lit_align.callbacks import FSDPSharding, ReferenceRefresh
from lit_align.data import ContinuousBatchingSampler, OfflinePairs
from lit_align.data.batches import collate
from lit_align.logprobs import enable_prefix_sharing, response_logps
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU: Any = {"accelerator": "gpu", "devices": 1}


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance as a share of the expected value's norm."""
    return ((value.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_flash_kernels_attend_like_a_plain_softmax(case: str, dtype: torch.dtype) -> None:
    lengths = CASES[case]
    leaves = inputs(lengths, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = outputs_and_gradients(lambda *qkv: plain(*qkv, lengths), exact)
    row = Row.of(*lengths, torch.device("cuda"))
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    found = outputs_and_gradients(lambda *qkv: RowAttention.apply(*qkv, row, SCALE), leaves)
    assert max(map(error, found, expected)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logps_and_gradients_equal_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    examples, tolerance = random_examples(), 1e-6 if dtype == torch.float64 else 0.05
    model = build(name).double()
    expected, slopes = logps_and_gradients(model, one_by_one(model, examples))
    model = build(name).to(dtype).cuda()
    assert enable_prefix_sharing(model) == (name not in CANNOT_SHARE)
    found, other = logps_and_gradients(
        model, response_logps(model, move_data_to_device(collate(examples, range(3)), model.device))
    )
    assert error(found, expected) < tolerance
    whole = [torch.cat([each[name].double().cpu().flatten() for name in slopes]) for each in (other, slopes)]
    assert error(*whole) < 4 * tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, case in make.cases() if not case.lora])
def test_every_objective_has_the_trajectory_of_the_cpu(name: str) -> None:
    """Without LoRA, since each device draws a fresh adapter from its own random numbers."""
    found, expected = (make.trajectory(dict(make.cases())[name], device) for device in ("gpu", "cpu"))
    assert found.pop("metrics") == pytest.approx(expected.pop("metrics"), rel=1e-5, abs=1e-5, nan_ok=True)
    assert found.pop("form", None) == expected.pop("form", None)
    for what, value in found.items():
        assert value == pytest.approx(expected[what], rel=1e-7, abs=1e-7), what


@pytest.mark.parametrize("form", ["copy", "offload", "recorded"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_forms_of_the_reference_give_the_same_losses(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, compiled: bool
) -> None:
    monkeypatch.chdir(tmp_path)

    def losses(form: Any, **policy: Any) -> list[float]:
        watch = Watch()
        module = DPO(
            PolicyConfig(tiny_model, dtype="bfloat16", **policy),
            optimizer=adamw(1e-2),
            reference=ReferenceConfig(form=form),
        )
        refresh = [ReferenceRefresh(alpha=1.0, tau=2)] if form != "recorded" else []
        fit(module, OfflinePairs(write_pairs(tmp_path), batch_size=2), watch, *refresh, **GPU)
        return watch["train/loss"] if form != "recorded" else watch["train/loss"][:2]

    expected, found = losses("copy"), losses(form, compile=compiled)
    assert found[0] == pytest.approx(math.log(2), abs=1e-3 if form == "recorded" else 1e-6)
    assert found == pytest.approx(expected[: len(found)], abs=0.02)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_rounds_are_the_same_each_time(tiny_model: str, tmp_path: Path, lora: Any, precision: Any) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir()
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), lora=lora, proximal=0.1, optimizer=adamw(1e-2))
        fit(module, on_policy(folder), max_epochs=2, precision=precision, reload_dataloaders_every_n_epochs=1, **GPU)
        return {name: weight.cpu() for name, weight in weights(module).items()}

    assert same(trained("first"), trained("second"))
    first, second = (sorted((tmp_path / name / "rounds").rglob("samples-*.parquet")) for name in ("first", "second"))
    assert first
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_rounds_by_continuous_batching(tiny_model: str, tmp_path: Path) -> None:
    module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(1e-2))
    data = on_policy(tmp_path, sampler=ContinuousBatchingSampler())
    fit(module, data, max_epochs=2, reload_dataloaders_every_n_epochs=1, **GPU)
    assert len(list((tmp_path / "rounds").rglob("samples-*.parquet"))) == 4


@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}, {"compute_dtype": "bfloat16"}], ids=str)
def test_sharded_weights_train_as_whole_ones(tiny_model: str, tmp_path: Path, options: Any) -> None:
    def losses(*callbacks: Any, **trainer: Any) -> list[float]:
        watch, module = Watch(), DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(1e-2))
        data = OfflinePairs(write_pairs(tmp_path), batch_size=2)
        fit(module, data, watch, ReferenceRefresh(alpha=0.6, tau=1), *callbacks, **GPU | trainer)
        return watch["train/loss"]

    found = losses(FSDPSharding(**options), strategy="fsdp2")
    assert found == pytest.approx(losses(), abs=0.02 if "compute_dtype" in options else 1e-5)
