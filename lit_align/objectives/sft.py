"""Supervised fine-tuning (SFT): −log π(y|x)/|y|.

Use it as the first stage of every pipeline here: its result is the start and the reference of the preference stage.
Its loss is also the likelihood term of Maximum Preference Optimization.

On OnPolicyPairs with `pairing: Best` it imitates the best of each round's responses to a prompt. This best-of-n
distillation, also called rejection sampling or RAFT (arXiv 2304.06767), is the baseline that every preference objective
has to beat.

Where we differ: the mean is taken per response and then over responses, so an example's loss does not depend on its
batch. Most trainers average over all tokens of a batch, Σ logps / Σ lengths, which weights long responses more.

Logged: loss, logp and length (`metrics.preference`), and learning_rate.
"""

from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.base import PreferenceObjective


class SFT(PreferenceObjective):
    """Supervised fine-tuning: imitates the response of each row, the better one of a preference, or a round's best.

    Args:
        policy: The language model to train.
    """

    formula = "−log π(y|x) / length"

    def data_needs(self) -> DataNeeds:
        return DataNeeds(data_kind="texts")

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        return sft_loss(logps[:, 0], batch.lengths[:, 0].clamp(min=1))
