"""Tiny random models of the architectures whose log-probabilities and samples are tested."""

import torch
from tiny import llama_config
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(llama_config(vocab_size=61, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 4})),
    "mistral (window)": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2 (window)": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "gemma3 (window)": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "bloom (ALiBi)": lambda: BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)),
    "gemma2 (soft-capped)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=3.0, attn_implementation="eager")
    ),
    "cohere (scaled)": lambda: CohereForCausalLM(CohereConfig(**{**SIZES, "logit_scale": 0.3})),
    "granite (divided)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()
