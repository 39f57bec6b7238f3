"""An objective as a checkpoint states it, for readers that do not train, such as `export`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from lit_align import provenance
from lit_align.model_options import LoRAConfig, PolicyConfig, from_fields
from lit_align.needs import OutputName
from lit_align.reference.config import ReferenceConfig, RefreshRule


@dataclass(frozen=True)
class SavedObjective:
    """The trained objective and its options.

    Args:
        name: The objective's class.
        formula: Its loss; empty in a checkpoint of version 0.1, which does not hold it.
        output_name: The number that the policy gives each response (`DataNeeds`).
        beta: Weight of staying near the reference; None if the objective has no such option.
        proximal: λ at the start; None if the objective has no anchor.
        reference: None if the objective has no anchor.
        refresh: None if the reference is fixed.
        step: The optimizer step of the checkpoint.
    """

    name: str
    formula: str
    output_name: OutputName
    policy: PolicyConfig
    lora: LoRAConfig | None
    beta: float | None
    proximal: float | None
    reference: ReferenceConfig | None
    refresh: RefreshRule | None
    step: int | None = None

    @property
    def scores(self) -> bool:
        """Whether the policy gives rewards instead of log-probabilities."""
        return self.output_name == "reward"

    @staticmethod
    def save(checkpoint: dict[str, Any], name: str, formula: str, output_name: OutputName) -> None:
        """Write what the checkpoint's hyperparameters do not say."""
        checkpoint["objective"] = {"name": name, "formula": formula, "output_name": output_name}

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> Self:
        """The objective of a checkpoint.

        Raises:
            KeyError: the checkpoint was not written by a lit_align objective.
        """
        options = checkpoint["hyper_parameters"]
        stated = checkpoint.get("objective")
        if stated is None:  # version 0.1
            name, output_name = checkpoint["identity"]["model"], checkpoint["output_name"]
            stated = {"name": name, "formula": "", "output_name": output_name}
        reference, rule = options.get("reference"), checkpoint.get("refresh_rule")
        policy = from_fields(PolicyConfig, options["policy"])
        dtype = provenance.with_dtype(checkpoint.get(provenance.KEY, {})).get(provenance.DTYPE, policy.dtype)
        return cls(
            **stated,
            policy=replace(policy, dtype=dtype),  # also on a machine where auto means another
            lora=from_fields(LoRAConfig, options["lora"]) if options["lora"] else None,
            beta=options.get("beta"),
            proximal=options.get("proximal"),
            reference=None if reference is None else from_fields(ReferenceConfig, reference),
            refresh=None if rule is None else RefreshRule(**rule),
            step=checkpoint["global_step"],
        )
