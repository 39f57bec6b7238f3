"""A server that speaks the calls of a vLLM server with our worker extension, over a transformers model."""

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from processes import train
from tiny import adamw, on_policy
from transformers import AutoModelForCausalLM

from lit_align import __version__
from lit_align.data import Sampler, Sampling, VLLMServerSampler
from lit_align.data.generation import generate
from lit_align.data.samplers.base import check_weights
from lit_align.data.samplers.transfer import Transfer, receive
from lit_align.data.samplers.weights import weight_sums
from lit_align.data.sampling import uniform_numbers
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reporting.metrics_csv import MetricsCSV


class LoopbackServer:
    """Samples one response at a time, so that a response depends on its prompt and seed alone.

    Args:
        path: The model's architecture; the server begins with other weights.
        key: API key.
    """

    def __init__(self, path: str, key: str = "", longest: int = 512):
        self.path = path
        self.key = key
        self.longest = longest
        self.calls: list[str] = []
        self.after: Callable[[str], object] = lambda call: None  # called after each call
        self.lock = threading.Lock()
        self.port = 0
        os.register_at_fork(after_in_child=lambda: self.http.socket.close())  # else a test's processes keep it open
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start again at the same address; the weights are lost."""
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.zero_()
        self.token: str | None = None
        self.alive = threading.Event()
        self.alive.set()
        handler = self._handler(self.alive)
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler, bind_and_activate=False)
        self.http.allow_reuse_address = True
        self.http.request_queue_size = 128  # with fewer, a burst of requests resets connections
        self.http.server_bind()
        self.http.server_activate()
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Die: calls under way get no answer."""
        self.alive.clear()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            return {"results": [getattr(self, body["method"])(**body["kwargs"])]}
        return self.complete(body) if path == "/v1/completions" else {}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], max(0, body["top_k"]))
        uniforms = uniform_numbers(body["max_tokens"], body["seed"])[None]
        with self.lock:
            (ids,) = generate(self.model, [body["prompt"]], sampling, uniforms, body["stop_token_ids"])
        return {"choices": [{"token_ids": ids, "stop_reason": None}]}

    def policy_worker(self) -> dict[str, Any]:
        sizes = {"longest": self.longest, "workers": 1, "other_parallelism": False}
        return {"version": __version__, "dtype": "float32", **sizes}

    def policy_receive(self, transfer: dict[str, Any], token: str) -> None:
        self.token = None
        ours = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in receive(Transfer(**transfer), 1, torch.device("cpu")):
                ours[name].copy_(weight)
        self.token = token

    def policy_token(self) -> str | None:
        return self.token

    def policy_sums(self) -> tuple[int, int]:
        return weight_sums(self.model.parameters())

    def _handler(self, alive: threading.Event) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
                path = self.path.partition("?")[0]
                if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                    self.send(401, {"error": "Unauthorized"})
                    return
                call = body.get("method", path)
                answer = server.answer(path, body)
                server.calls.append(call)
                server.after(call)
                if alive.is_set():
                    self.send(200, answer)
                else:
                    self.close_connection = True

            def do_GET(self) -> None:
                self.send(200, {})

            def send(self, status: int, answer: Any) -> None:
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def at_call(server: LoopbackServer, call: str, number: int, do: Callable[[], object]) -> None:
    """Do something once, when the server answers a call for the nth time."""

    def after(name: str) -> None:
        if name == call and server.calls.count(call) == number:
            do()

    server.after = after


def die(server: LoopbackServer) -> None:
    """Have a server die, and come back half a second later without weights."""
    server.stop()
    threading.Timer(0.5, server.start).start()


def move(policy: Policy) -> None:
    with torch.no_grad():
        for _, weight in policy.trainable_weights():
            weight.add_(0.05 * torch.randn_like(weight))


def check_changed_bit(sampler: Sampler, policy: Policy, longest: int) -> None:
    """Check that a sampler notices one changed bit of its weights, in float32."""
    sampler.prepare(policy, torch.float32, longest)
    check_weights(sampler, policy, torch.float32)
    policy.model.lm_head.weight.data.view(torch.int32)[3, 7] ^= 1
    with pytest.raises(UserError, match=f"{type(sampler).__name__} does not have the policy's weights"):
        check_weights(sampler, policy, torch.float32)


def run(
    model: str,
    folder: Path,
    url: str,
    strategy: str,
    lr: float,
    lora: LoRAConfig | None = None,
    objective: Any = DPO,
    rounds: int = 2,
    rounds_ahead: Any = 0,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Rounds of 9 prompts in batches of 2; gives the weights, and writes metrics.csv."""
    folder.mkdir(exist_ok=True)
    module = objective(PolicyConfig(model, dtype="float32"), lora=lora, proximal=0.1, optimizer=adamw(lr), **options)
    data = on_policy(
        folder,
        sampler=VLLMServerSampler(url),
        sampling_dtype="policy",
        batch_size=4 if strategy == "auto" else 2,
        prompts_per_round=9,
        sampling_batch_size=8,
        sampling=Sampling(max_new_tokens=4),
        rounds_ahead=rounds_ahead,
    )
    logger = MetricsCSV(folder)
    return train(module, data, *callbacks, strategy=strategy, max_epochs=rounds, default_root_dir=folder, logger=logger)


def stored(folder: Path, part: str = "samples") -> dict[str, list[dict[str, Any]]]:
    """The rows of one part of all rounds, by round and file."""
    files = sorted(folder.glob(f"rounds/*/{part}*"))
    return {
        re.sub("-[0-9a-f]{8}", "", str(file.relative_to(folder))): pq.read_table(file).to_pylist() for file in files
    }


def check_same_samples(first: Path, second: Path) -> None:
    """Check that two runs, of one process and of two, stored the same ten files of samples."""
    one, two = stored(first), stored(second)
    assert one.keys() == two.keys()
    assert len(one) == 10
    for name in one:
        for row, other in zip(one[name], two[name], strict=True):
            assert row.pop("sampler_logps") == pytest.approx(other.pop("sampler_logps"), abs=1e-4)
            assert row == other
