"""Samplers: transformers' `generate` and continuous batching, and vLLM."""
