"""Forgetting: the likelihood of texts that training did not aim at, before and after.

Reported is the negative log-likelihood per response token under the start and under the policy, and their difference.
For texts i with difference d_i and t_i tokens, that is a ratio of sums, R = Σ d_i / Σ t_i. Its 95 % interval is that of
the mean of R + (d_i − R·t_i)/t̄ over texts (`mean_interval`), so that texts of different lengths that change alike do
not widen it.
"""

import torch
from torch import Tensor

from lit_align.console import print_field
from lit_align.data.batches import Example
from lit_align.data.sampling import sampling_batches
from lit_align.data.table import ExampleTable
from lit_align.data.tokenization import listing
from lit_align.errors import amount
from lit_align.evaluation.answering import TokenizedPrompts, tokenizer_of
from lit_align.evaluation.likelihoods import Likelihoods
from lit_align.evaluation.shares import gather_in_order
from lit_align.evaluation.summary import Forgetting
from lit_align.metrics.win_rate import Estimate


def measure_forgetting(name: str, texts: TokenizedPrompts, likelihoods: Likelihoods) -> Forgetting:
    """Compare the texts' likelihood under the start and the policy; all processes call it together.

    Args:
        name: The texts' name on the terminal.
    """
    tokenizer = tokenizer_of(likelihoods.module)
    tokenizer.counts.clear()
    tokenized = ((row, tokenizer.row(row)) for row in texts.rows)
    examples = ExampleTable.temporary(Example(*tokens, row.source) for row, tokens in tokenized if tokens is not None)
    if tokenizer.counts:
        used = f"{len(examples)} of {amount(len(texts.rows), 'texts')}"
        print_field(f"forgetting {name}", f"{used}; {listing(tokenizer.counts)}")
    batches = sampling_batches(examples.lengths.total.tolist(), likelihoods.batch_size)
    share = likelihoods.share(batches, examples.views, f"forgetting {name}")
    logps = torch.tensor(list(gather_in_order(likelihoods.module.trainer, batches, share)), dtype=torch.float64)
    nll = -logps[..., 0]  # [texts, 2]; there is one response
    tokens = torch.from_numpy(examples.lengths.longest).double()
    end, start = (nll.sum(0) / tokens.sum()).tolist()
    return Forgetting(start, end, change_per_token(nll[:, 0] - nll[:, 1], tokens))


def change_per_token(differences: Tensor, tokens: Tensor) -> Estimate:
    """Σ differences / Σ tokens, and its interval over texts.

    Args:
        differences: [texts], in nats.
        tokens: [texts].
    """
    change = differences.sum() / tokens.sum()
    return Estimate.of(change + (differences - change * tokens) / tokens.mean())
