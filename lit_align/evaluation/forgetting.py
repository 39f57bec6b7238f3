"""Forgetting: the likelihood of texts that training did not aim at, before and after.

Reported is the negative log-likelihood per response token under the start and under the policy, and their difference
with a bootstrap interval over texts.
"""

import torch

from lit_align.data.batches import Example
from lit_align.data.sampling import sampling_batches
from lit_align.data.table import ExampleTable
from lit_align.evaluation.answering import TokenizedPrompts, tokenizer_of
from lit_align.evaluation.likelihoods import Likelihoods
from lit_align.evaluation.shares import gather_in_order
from lit_align.evaluation.summary import Forgetting
from lit_align.metrics.win_rate import Estimate, mean_interval
from lit_align.objectives import PreferenceObjective


def measure_forgetting(
    name: str, texts: TokenizedPrompts, likelihoods: Likelihoods, module: PreferenceObjective
) -> Forgetting:
    """Compare the texts' likelihood under the start and the policy; all processes call it together.

    Args:
        name: The texts' name on the terminal.
    """
    tokenizer = tokenizer_of(module)
    tokenized = ((row, tokenizer.row(row)) for row in texts.rows)
    examples = ExampleTable.temporary(Example(*tokens, row.source) for row, tokens in tokenized if tokens is not None)
    batches = sampling_batches(examples.lengths.total.tolist(), likelihoods.batch_size)
    share = likelihoods.share(batches, examples.views, f"forgetting {name}")
    logps = torch.tensor(list(gather_in_order(module.trainer, batches, share)), dtype=torch.float64)
    nll = -logps[..., 0]  # there is one response
    tokens = torch.from_numpy(examples.lengths.longest).double()
    after, before = (nll.sum(0) / tokens.sum()).tolist()
    order = [i for places in batches for i in places]
    low, high = mean_interval((nll[order, 0] - nll[order, 1]) / tokens.mean())
    return Forgetting(before, after, Estimate(after - before, low, high))
