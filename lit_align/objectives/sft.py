"""Supervised fine-tuning (SFT): −log π(y|x)/|y|.

Use it before every pipeline here: it makes the start and the reference of the preference stage. Its loss is
the likelihood term of Maximum Preference Optimization, too.

Where we differ: the mean is per response, then over responses, so that an example's loss does not depend on
its batch. Most trainers average over all tokens of a batch, which weights long responses more: Σ logps / Σ
lengths.

Logged: loss, and the means of what `metrics.preference` calls logp and length; learning_rate.
"""

from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.base import PreferenceObjective


class SFT(PreferenceObjective):
    """Supervised fine-tuning: imitates the response of each row, of a preference the better one.

    Args:
        policy: Which language model is trained.
    """

    formula = "−log π(y|x) / length"

    def data_needs(self) -> DataNeeds:
        return DataNeeds(data_kind="texts", can_sample=False)

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        return sft_loss(logps[:, 0], batch.lengths[:, 0].clamp(min=1))
