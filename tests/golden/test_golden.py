"""The trajectory of every objective is the one that was kept (`make.py`)."""

import json

import pytest
from golden import make

KEPT = json.loads(make.FILE.read_text())
CASES = dict(make.cases())


def test_every_trajectory_that_was_kept_is_still_run():
    assert KEPT.keys() == CASES.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_has_not_moved(name):
    now, kept = make.trajectory(CASES[name]), KEPT[name]
    metrics, kept_metrics = now.pop("metrics"), kept.pop("metrics")
    assert now.keys() == kept.keys()
    form = now.pop("form", None)
    assert form == kept.pop("form", None), "another form of reference"
    # a dense update is in float32, whose products differ between CPUs by their rounding
    bound = 1e-6 if str(form).startswith("dense updates") else 1e-9
    for what in now:
        assert now[what] == pytest.approx(kept[what], rel=bound, abs=bound), what
    assert metrics == pytest.approx(kept_metrics, rel=1e-6, abs=1e-6, nan_ok=True)
