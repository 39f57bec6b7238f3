"""`DataNeeds`, an objective's needs from its data: the only contract between LightningModules and data modules.

An objective returns a `DataNeeds` from its method `data_needs`; data modules and callbacks read nothing else from it.
Any LightningModule may have such a method; a module without it gets `ANY_DATA`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

DataKind = Literal["preferences", "labelled", "texts"]
OutputName = Literal["logp", "reward"]


@dataclass(frozen=True, kw_only=True)
class DataNeeds:
    """An objective's needs from its data; the defaults are those of a loss on pairs of log-probabilities.

    Attributes:
        data_kind: The kind of rows: preferences, single responses with a label, or texts to imitate.
        wraps_prompt_as_chat: Plain prompts become a user's turn where the tokenizer has a chat template.
        can_sample: The policy can generate the responses that it is trained on.
        needs_mismatched: Each example has another prompt's response as its last branch.
        takes_labels: The loss reads the probability that the first response of a pair wins.
        takes_groups: The loss takes more than two responses of a prompt.
        needs_whole_groups: The loss needs all responses that were sampled for a prompt, not a selection.
        reads_win_probabilities: The loss reads P(y ≻ π_s), each response's win probability against all of its prompt.
        reads_sampler: The loss reads log π_s, the sampler's log-probability of each response.
        reads_recorded_reference: The loss reads log π_ref from the data, since no reference is in memory.
        output_name: Name, in metrics, of the number that the policy gives each response.
    """

    data_kind: DataKind = "preferences"
    wraps_prompt_as_chat: bool = False
    can_sample: bool = True
    needs_mismatched: bool = False
    takes_labels: bool = False
    takes_groups: bool = False
    needs_whole_groups: bool = False
    reads_win_probabilities: bool = False
    reads_sampler: bool = False
    reads_recorded_reference: bool = False
    output_name: OutputName = "logp"

    @property
    def gives_logps(self) -> bool:
        """Whether the policy is a language model, which gives responses and their log-probabilities."""
        return self.output_name == "logp"


ANY_DATA = DataNeeds(takes_labels=True, takes_groups=True, reads_win_probabilities=True)
"""Needs of a module that does not state them: preferences, which may be groups and may carry labels."""


@runtime_checkable
class StatesNeeds(Protocol):
    """A module that states what it needs from its data."""

    def data_needs(self) -> DataNeeds:
        """The needs of the module, as configured, from its data."""
        ...


def needs_of(module: object) -> DataNeeds:
    """The module's stated needs, or `ANY_DATA`."""
    return module.data_needs() if isinstance(module, StatesNeeds) else ANY_DATA
