"""The arithmetic that no training step can do without."""

import torch
from transformers import PretrainedConfig, PreTrainedModel


def useful_flops(model: PreTrainedModel, batch: int, prompt: int, response: int, responses: int, live: bool) -> float:
    """Floating-point operations of a step: matrix products and attention.

    Each prompt counts once, the output head for response tokens only, and the backward pass twice the forward pass. Of
    the prompt tokens, the last layer needs keys and values only.

    Args:
        batch: Prompts in the step.
        prompt: Tokens of a prompt.
        response: Tokens of a response; `responses` of them follow each prompt.
        live: Whether the reference's forward pass belongs to the step.
    """
    config: PretrainedConfig = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    body = sum(m.weight.numel() for _, m in linear)
    last = f"layers.{config.num_hidden_layers - 1}."
    spared = sum(m.weight.numel() for name, m in linear if last in name and not name.endswith(("k_proj", "v_proj")))
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    scored = responses * response
    by_response = response * prompt + response * (response + 1) / 2
    pairs = config.num_hidden_layers * responses * by_response
    pairs += (config.num_hidden_layers - 1) * prompt * (prompt + 1) / 2
    forward = 2 * body * (prompt + scored) - 2 * spared * prompt + 2 * config.hidden_size * config.vocab_size * scored
    return batch * (forward + 4 * width * pairs) * (4 if live else 3)
