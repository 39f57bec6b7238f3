"""The policy as training starts from it, beside which evaluations judge what it has become."""

from collections.abc import Iterator
from contextlib import contextmanager

from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy


class Start:
    """The start of a run. With a fresh adapter, it is the policy without the adapter; otherwise a model of its own."""

    def __init__(self, module: PreferenceObjective):
        assert module.policy is not None
        self.policy = module.policy
        self.is_policy = module.lora is not None and module.lora.adapter is None
        if not self.is_policy:
            loaded = Policy.load(module.policy_config, module.lora, module.tokenizer)
            self.policy = loaded.to(module.policy.device).eval()

    @contextmanager
    def present(self) -> Iterator[Policy]:
        """Within this context, the start; where it is the policy, the policy has no adapter."""
        if self.is_policy:
            with self.policy.adapters([]):
                yield self.policy
        else:
            yield self.policy
