"""The contract between objectives and data modules."""

import dataclasses

import pytest
from tiny import fit, write_pairs

from lit_align.data import OfflinePairs
from lit_align.needs import ANY_DATA, DataNeeds, needs_of
from lit_align.objectives import CPO, DPO, EXO, IPO, KTO, MPO, ORPO, SFT, SPPO, RewardModel, SimPO
from lit_align.policy import PolicyConfig
from lit_align.reference import ReferenceConfig

POLICY = PolicyConfig("none")


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        (DPO(POLICY), DataNeeds(takes_labels=True)),
        (DPO(POLICY, reward_temperature=1.0), DataNeeds(takes_groups=True)),
        (DPO(POLICY, proximal=0.1), DataNeeds(takes_labels=True, reads_sampler=True)),
        (
            DPO(POLICY, reference=ReferenceConfig("recorded")),
            DataNeeds(takes_labels=True, reads_recorded_reference=True),
        ),
        (IPO(POLICY), DataNeeds(takes_labels=True)),
        (KTO(POLICY), DataNeeds(data_kind="labelled", needs_mismatched=True)),
        (EXO(POLICY), DataNeeds()),
        (EXO(POLICY, reward_temperature=1.0), DataNeeds(takes_groups=True)),
        (SPPO(POLICY), DataNeeds(takes_groups=True, reads_win_probabilities=True)),
        (SPPO(POLICY, hard_labels=True), DataNeeds()),
        (
            SPPO(POLICY, estimate_baseline=True),
            DataNeeds(takes_groups=True, needs_whole_groups=True, reads_win_probabilities=True, reads_sampler=True),
        ),
        (CPO(POLICY), DataNeeds(takes_labels=True)),
        (ORPO(POLICY), DataNeeds(takes_labels=True)),
        (MPO(POLICY), DataNeeds(takes_labels=True)),
        (SimPO(POLICY), DataNeeds()),
        (SFT(POLICY), DataNeeds(data_kind="texts")),
        (RewardModel(POLICY), DataNeeds(wraps_prompt_as_chat=True, can_sample=False, output_name="reward")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_objective_states_its_needs(module, needs):
    assert needs_of(module) == needs


def test_a_module_without_stated_needs_takes_any_preferences():
    assert needs_of(object()) is ANY_DATA
    flags = {"takes_groups": False, "takes_labels": False, "reads_win_probabilities": False}
    assert dataclasses.replace(ANY_DATA, **flags) == DataNeeds()


class Misspelled(DPO):
    def data_needs(self) -> DataNeeds:
        return DataNeeds(needs_mismatch=True)  # type: ignore[call-arg]


class Unset(DPO):
    def data_needs(self) -> DataNeeds:
        return DataNeeds(takes_groups=self.no_such_option)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("cls", "error"), [(Misspelled, TypeError), (Unset, AttributeError)])
def test_a_misspelled_need_is_an_error_not_a_default(in_tmp, tiny_model, cls, error):
    with pytest.raises(error, match=r"needs_mismatch|no_such_option"):
        fit(cls(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)))


def test_an_objective_cannot_change_its_stated_needs():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPO(POLICY).data_needs().takes_groups = True  # type: ignore[misc]
