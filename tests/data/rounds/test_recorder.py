"""Recorded log π_ref: checked against the reference within the rounding of the run's precision."""

from typing import Any

import pytest
from tiny import fit, write_pairs

from lit_align.data import OfflinePairs
from lit_align.data.rounds.recorder import Recorder
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reference.config import ReferenceConfig


@pytest.mark.parametrize(("precision", "off"), [("32-true", 1e-4), ("32-true", 0.1), ("bf16-mixed", 0.1)])
def test_stored_log_probabilities_may_differ_by_rounding_only(tiny_model, in_tmp, monkeypatch, precision, off):
    compute = Recorder.logps

    def alone(self: Any, model: Any, examples: Any) -> list[list[float]]:
        """Those of one example differ from those of the same one among others."""
        return [[each + off * (len(examples) == 1) for each in row] for row in compute(self, model, examples)]

    monkeypatch.setattr(Recorder, "logps", alone)
    module = DPO(PolicyConfig(tiny_model, dtype="float32"), reference=ReferenceConfig("recorded"))
    data = OfflinePairs(write_pairs(in_tmp))
    if precision == "32-true" and off > 1e-3:
        with pytest.raises(UserError, match="the stored log π_ref of one example differs"):
            fit(module, data, max_steps=1)
    else:
        fit(module, data, max_steps=1, precision=precision)
