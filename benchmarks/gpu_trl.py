"""Steps of TRL's DPOTrainer on random words, for `gpu.py`."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

WORDS = 300


def random_pairs(count: int, prompt: int, response: int) -> list[dict[str, str]]:
    """Pairs of these numbers of tokens, with the token that ends a response."""
    generator = torch.Generator().manual_seed(1)

    def text(tokens: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(1, WORDS, (tokens,), generator=generator).tolist())

    answers = ("chosen", "rejected")
    return [{"prompt": text(prompt)} | {each: " " + text(response - 1) for each in answers} for _ in range(count)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    backend = Tokenizer(WordLevel({"end": 0} | {f"w{i}": i for i in range(1, WORDS)}, unk_token="end"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end", pad_token="end")


def trl_times(
    policy: Callable[[], Any], B: int, prompt: int, response: int, repeats: int, *, liger: bool
) -> tuple[list[float], float | None]:
    """Seconds of each step but the first, and the GPU's peak of memory in 10⁹ bytes.

    Args:
        policy: Builds a policy, the same at each call.
        B: Pairs in a step.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        liger: Whether TRL uses Liger's kernels.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if liger:
        import liger_kernel  # type: ignore[import-not-found]  # noqa: F401
    times: list[float] = []
    gpu = torch.cuda.is_available()

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            times[-1] += time.perf_counter()

    models = [policy().model for _ in range(2)]
    for model in models:
        model.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder,
            per_device_train_batch_size=B,
            max_steps=1 + repeats,
            max_length=None,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,  # the weights are bfloat16 already
            use_cpu=not gpu,
            use_liger_kernel=liger,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            models[0],
            ref_model=models[1],
            args=settings,
            train_dataset=Dataset.from_list(random_pairs(B, prompt, response)),
            processing_class=word_tokenizer(),
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times[1:], torch.cuda.max_memory_allocated() / 1e9 if gpu else None
