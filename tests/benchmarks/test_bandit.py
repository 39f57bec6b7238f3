"""The numbers of the playground; its figures are drawn once, to a temporary folder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bandit.py"


@pytest.fixture(scope="module")
def bandit():
    spec = importlib.util.spec_from_file_location("benchmarks_bandit", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def table(bandit, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    return {row.claim: row for row in bandit.rows(out)}, sorted(path.name for path in out.iterdir())


def test_every_law_is_met(table):
    rows, _ = table
    assert len(rows) == 23
    for row in rows.values():
        # DPO's runaway is a law of the flow, not of steps of size 1
        tolerance = 1e-3 if "log t" in row.claim else 1e-8
        assert row.measured == pytest.approx(row.law, rel=tolerance), row.claim


def test_a_figure_is_drawn_of_each(table):
    assert table[1] == ["certain_labels.png", "iterates.png", "syncs.png"]


def test_proximal_rounds_converge_where_hard_replacement_diverges(bandit):
    proximal, moving = bandit.iterates(1.0), bandit.iterates(0.0, moving_reference=True)
    assert proximal.distance[-1] < 1e-7
    assert all(after < before for before, after in zip(proximal.distance, proximal.distance[1:], strict=False))
    assert moving.strength[-1] == pytest.approx(bandit.ROUNDS / bandit.BETA, rel=1e-9)


def test_on_a_certain_label_dpo_never_stops_and_mpo_does(bandit):
    reference = torch.tensor([[bandit.MASS, 1 - bandit.MASS]], dtype=torch.float64).log()
    dpo = bandit.two_arms(lambda x: bandit.dpo_loss(x[None], reference, beta=bandit.WEIGHT).sum(), 1000)
    mpo = bandit.two_arms(lambda x: bandit.mpo_with_sft(x, 1.0, bandit.WEIGHT, bandit.MASS), 1000)
    assert dpo[999] - dpo[99] > 3
    assert mpo[999] - mpo[99] < 1e-9
