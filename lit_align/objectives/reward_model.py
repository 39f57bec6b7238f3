"""Bradley–Terry reward model: −log σ(r_w − r_l − margin).

The model is from Bradley and Terry 1952, its use as the second stage of RLHF from Ouyang et al. 2022 (arXiv
2203.02155), equation 1, and the margin from Touvron et al. 2023 (arXiv 2307.09288), equation 2. Rewards are defined up
to a constant per prompt. Use it to score the rounds of on-policy training, trained from the same base model as the
policy and then kept fixed.

Where we differ: a new head starts at zero, not at random as in transformers and TRL, so the first loss is log 2
(without a margin). Rewards are not centred; TRL has an option for it.

`SequenceClassificationScorer` reads the saved model directly. The chat template saved with it is the tokenizer's,
without the whitespace after the last turn; if the tokenizer has none, it joins the texts.

Logged: the tables of `metrics.preference` and `objectives.base`, with the head's output as the reward r(y):
reward_chosen and reward_rejected are its means.
"""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lit_align.errors import UserError, check_number
from lit_align.loading import add_adapter, load_weights
from lit_align.logprobs import PreferenceBatch, enable_prefix_sharing, hidden_states, single_rows
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import LoRAConfig, Policy, PolicyConfig


def bradley_terry_loss(rewards: Tensor, *, margin: Tensor | float | None = None) -> Tensor:
    """The negative log-likelihood of each preference, [B].

    Args:
        rewards: [B, 2], reward of the chosen (column 0) and the rejected response.
        margin: [B] or one number, by how much the chosen reward should exceed the other; None means 0.
    """
    check_shape("rewards", rewards, "B", 2)
    if isinstance(margin, Tensor):
        check_shape("margin", margin, rewards.shape[0])
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - (0 if margin is None else margin))


class Scored(Policy):
    """A language model with a score head in place of its output head."""

    def __init__(self, model: Any, tokenizer: Any, adapter: Any = None):
        nn.Module.__init__(self)
        self.model = model
        self.tokenizer = tokenizer
        self.shares_prefix = hasattr(model, "score") and enable_prefix_sharing(model)
        object.__setattr__(self, "adapter", adapter)

    @staticmethod
    def load_model(
        config: PolicyConfig, lora: LoRAConfig | None, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """The transformers classifier; a new head starts at zero."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the warning about a new head is expected
        try:
            model, report = load_weights(
                AutoModelForSequenceClassification, config, lora, num_labels=1, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
        if "score.weight" in report["missing_keys"]:
            nn.init.zeros_(model.score.weight)
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers finds the last token by it
        return model

    @staticmethod
    def add_adapter(model: PreTrainedModel, lora: LoRAConfig) -> PeftModel:
        return add_adapter(model, replace(lora, targets=_with_head(lora.targets)), None)

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Reward of every response, [B, K] in float32."""
        if self.shares_prefix:
            hidden, places = hidden_states(self.model, batch)
            read = batch.response_mask & (batch.response_ids != self.model.config.pad_token_id)  # as transformers does
            last = (read * torch.arange(1, read.shape[2] + 1, device=read.device)).amax(-1, keepdim=True)
            logits = self.model.score(hidden[places.gather(-1, last).flatten()])  # type: ignore[operator]
        else:
            inputs, _ = single_rows(batch)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            ids = ids.masked_fill(mask == 0, self.model.config.pad_token_id)  # type: ignore[arg-type]
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).view(batch.response_ids.shape[:2])

    def tokenizer_to_save(self) -> Any:
        tokenizer: Any = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = _scored_template(tokenizer)
        return tokenizer


def _with_head(targets: str | list[str]) -> str | list[str]:
    """Add the score head to the adapter's targets, since a new head starts at zero; peft's all-linear includes it."""
    if isinstance(targets, list):
        return [*targets, "score"]
    return targets if targets == "all-linear" else f"({targets})|score"


def _scored_template(tokenizer: Any) -> str:
    """Chat template that renders a prompt and its response as in training (`data.tokenization.PreferenceTokenizer`)."""
    if tokenizer.chat_template:
        trimmed = "{{ chat if add_generation_prompt else chat | trim }}"
        return "{% set chat %}" + tokenizer.chat_template + "{% endset %}" + trimmed
    begin = "{{ bos_token }}" if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    return begin + "{% for message in messages %}{{ message.content }}{% endfor %}{{ eos_token }}"


class RewardModel(PreferenceObjective):
    """A Bradley–Terry reward model. If the tokenizer has a chat template, plain prompts become a user's turn.

    Args:
        policy: The decoder that gets the score head; a score head that it already has is kept.
        margin: By how much the chosen response's reward should exceed the other's; `rewards` uses the difference of the
            rows' scores.
    """

    formula = "−log σ(r_w − r_l − margin)"

    def __init__(self, policy: PolicyConfig, *, margin: float | Literal["rewards"] = 0.0, **kwargs: Any):
        super().__init__(policy, sft_weight=0.0, pretraining_weight=0.0, **kwargs)  # a reward model has no likelihood
        self.save_hyperparameters(ignore=["optimizer"])
        if margin != "rewards":
            check_number("model.margin", margin, least=0)
        self.margin: float | Literal["rewards"] = margin
        temperature = self.policy_config.temperature
        if temperature != 1:
            raise UserError(
                f"model.policy.temperature={temperature} has no effect because a reward model has no likelihood. "
                "Leave it out."
            )

    def check_texts(self, given: Collection[str]) -> None:
        if given:
            raise UserError(
                f"data.{min(given)} has no effect because RewardModel learns from preferences only. Leave it out."
            )

    def data_needs(self) -> DataNeeds:
        return DataNeeds(wraps_prompt_as_chat=True, can_sample=False, output_name="reward")

    def load_policy(self) -> Policy:
        return Scored.load(self.policy_config, self.lora, self._tokenizer)

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        """The loss of each pair; `logps` holds rewards here."""
        if self.margin != "rewards":
            return bradley_terry_loss(logps, margin=self.margin)
        if batch.rewards is None:
            raise UserError(
                "model.margin=rewards has no effect because the rows have no scores. Use rows with score_chosen and "
                "score_rejected, or set a number."
            )
        return bradley_terry_loss(logps, margin=batch.rewards[:, 0] - batch.rewards[:, 1])
