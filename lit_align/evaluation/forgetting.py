"""Forgetting: the likelihood of texts that training did not aim at, before and after.

Reported is the negative log-likelihood per response token under the start and under the policy, and their difference
with a bootstrap interval over texts.
"""

from collections.abc import Sequence

import torch

from lit_align.data.batches import Example, record_logps
from lit_align.data.sampling import sampling_batches
from lit_align.data.table import ExampleTable
from lit_align.evaluation.answering import TokenizedPrompts, tokenizer_of
from lit_align.evaluation.shares import compute_share, gather_in_order
from lit_align.evaluation.start import Start
from lit_align.evaluation.summary import Forgetting
from lit_align.metrics.win_rate import Estimate, mean_interval
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy


def measure_forgetting(
    name: str, texts: TokenizedPrompts, policy: Policy, start: Start, module: PreferenceObjective, batch_size: int
) -> Forgetting:
    """Compare the texts' likelihood under the start and the policy; all processes call it together.

    Args:
        name: The texts' name on the terminal.
    """
    tokenizer = tokenizer_of(module)
    tokenized = ((row, tokenizer.row(row)) for row in texts.rows)
    examples = ExampleTable.temporary(Example(*tokens, row.source) for row, tokens in tokenized if tokens is not None)
    batches = sampling_batches(examples.lengths.total.tolist(), batch_size)

    def measure(places: Sequence[int]) -> list[tuple[float, float]]:
        some = examples.views(places)
        with start.present() as model:
            before = record_logps(model, model, some, len(some))
        after = record_logps(policy, policy, some, len(some))
        return [(-one[0], -two[0]) for one, two in zip(before, after, strict=True)]

    share = compute_share(module.trainer, batches, f"forgetting {name}", measure)
    nll = torch.tensor(list(gather_in_order(module.trainer, batches, share)), dtype=torch.float64)
    tokens = torch.from_numpy(examples.lengths.longest).double()  # there is one response
    before, after = (nll.sum(0) / tokens.sum()).tolist()
    order = [i for places in batches for i in places]
    low, high = mean_interval((nll[order, 1] - nll[order, 0]) / tokens.mean())
    return Forgetting(before, after, Estimate(after - before, low, high))
