"""The doors, the wheel, and a foreign project that uses both."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent


def test_the_doors_give_the_packages_own_objects():
    import callbacks
    import data
    import lit_align.callbacks
    import lit_align.data

    for door, package in ((callbacks, lit_align.callbacks), (data, lit_align.data)):
        assert door.__all__ == package.__all__
        assert all(getattr(door, name) is getattr(package, name) for name in package.__all__)


def test_no_configuration_imports_through_a_door():
    for path in (ROOT / "configs").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            text = line.partition("#")[0]
            assert "callbacks." not in text.replace("lightning.pytorch.callbacks.", "").replace(
                "lit_align.callbacks.", ""
            ), path
            assert " data." not in text, path


FOREIGN = """
import sys
import lightning as L, torch
import callbacks, data          # the project's own
assert callbacks.MINE and data.MINE
from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
assert ".venv" in sys.modules["lit_align"].__file__

module = DPO(PolicyConfig(sys.argv[1]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, callbacks=[ReferenceRefresh(alpha=0.5, tau=1), callbacks.Mine()])
trainer.fit(module, OfflinePairs("pairs.jsonl", batch_size=4))
assert trainer.callback_metrics["reference/refreshes"] == 4 and callbacks.SEEN == 4
print("fitted")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_brings_one_name_only(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"lit_align"}


def test_a_project_with_its_own_callbacks_and_data_uses_the_wheel(wheel, tiny_model, in_tmp):
    venv.create(in_tmp / ".venv")
    python = in_tmp / ".venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, capture_output=True)
    # everything but lit_align comes from this environment: torch is not installed twice
    site = next((in_tmp / ".venv").glob("lib/python*/site-packages"))
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(outer))

    for name, code in {
        "callbacks": "from lightning.pytorch import Callback\nMINE, SEEN = True, 0\nclass Mine(Callback):\n"
        "    def on_train_batch_end(self, *a):\n        global SEEN\n        SEEN += 1\n",
        "data": "MINE = True\n",
    }.items():
        (in_tmp / name).mkdir()
        (in_tmp / name / "__init__.py").write_text(code)
    tiny.write_pairs(in_tmp)
    (in_tmp / "script.py").write_text(FOREIGN)
    # -E: with the checkout in PYTHONPATH, the wheel would not be imported
    done = subprocess.run([python, "-E", "script.py", tiny_model], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fitted" in done.stdout
