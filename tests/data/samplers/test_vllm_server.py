"""`VLLMServerSampler` over a small server that speaks vLLM's calls; `test_vllm_served.py` has the real one."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in
from served import LoopbackServer, at_call, check_changed_bit, check_same_samples, die, move, run, stored
from tiny import adamw, fit, on_policy, write_prompts
from torch.distributed.fsdp import FSDPModule

from lit_align.callbacks import Drift, ReferenceRefresh, WinRate
from lit_align.cli import main
from lit_align.data import FunctionScorer, GenerateSampler, Sampler, SampleRequest, Sampling, VLLMServerSampler
from lit_align.data.samplers.base import EngineLost
from lit_align.data.samplers.vllm_client import VLLMClient
from lit_align.data.sampling import Response
from lit_align.errors import UserError
from lit_align.evaluation.rows import read_held_out
from lit_align.objectives import DPO, KTO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reference.config import ReferenceConfig
from lit_align.reporting.metrics_csv import read_metrics
from lit_align.reporting.run_folder import verdict_file

ROOT = Path(__file__).parents[3]
PROMPTS = [list(range(70, 150)), [80], [90, 91, 92]]
LONGEST = 120
LORA = LoRAConfig(r=4)


@pytest.fixture
def server(tiny_model) -> Iterator[LoopbackServer]:
    running = LoopbackServer(tiny_model)
    yield running
    running.stop()


def sample(sampler: Sampler, policy: Policy, **sampling: Any) -> list[list[Response]]:
    options = Sampling(**({"max_new_tokens": 8} | sampling))
    with sampler.ready(policy, torch.float32, LONGEST):
        return sampler.sample(policy, SampleRequest(PROMPTS, list("abc"), 2, options, [0, 5]))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_each_refresh_samples_with_the_new_weights(tiny_model, server, lora):
    policy, sampler = Policy.load(PolicyConfig(tiny_model, dtype="float32"), lora), VLLMServerSampler(server.url)
    seen = []
    for _ in range(2):
        expected = sample(GenerateSampler(), policy, temperature=0)
        assert sample(sampler, policy, temperature=0) == expected
        assert expected not in seen
        seen.append(expected)
        move(policy)
    assert sample(sampler, policy) == sample(sampler, policy)


def test_the_server_is_paused_until_its_weights_are_proved(tiny_model, server):
    sample(VLLMServerSampler(server.url), Policy.load(PolicyConfig(tiny_model)))
    calls = [call for call in server.calls if call not in ("/v1/completions", "policy_worker")]
    assert calls == [
        "/pause",
        "policy_receive",
        "policy_sums",
        "policy_token",
        "/reset_prefix_cache",
        "/resume",
        "policy_token",
    ]


def test_one_changed_bit_is_noticed(tiny_model, server):
    check_changed_bit(VLLMServerSampler(server.url), Policy.load(PolicyConfig(tiny_model)), LONGEST)


# --- a server that is lost ---


def files(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name[:9]}/{path.name}": path.read_bytes() for path in folder.glob("rounds/*/samples*")}


def rounds(folder: Path, model: str, sampler: Sampler) -> dict[str, bytes]:
    """The files of two rounds of 4 prompts in two batches."""
    folder.mkdir()
    small = {"prompts_per_round": 4, "sampling_batch_size": 8, "batch_size": 2, "sampling": Sampling(max_new_tokens=4)}
    data = on_policy(folder, sampler=sampler, sampling_dtype="policy", **small)
    fit(DPO(PolicyConfig(model), proximal=0.1, optimizer=adamw()), data, max_epochs=2)
    return files(folder)


def test_a_refusal_that_is_cut_off_is_of_a_lost_server():
    def refuse(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nwait")

    with socket.create_server(("localhost", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(refuse, listener)
        with pytest.raises(EngineLost, match="answers /pause with HTTP 503"):
            VLLMClient(f"http://localhost:{listener.getsockname()[1]}", "", timeout=5).pause()


def lose_weights(server: LoopbackServer) -> None:
    server.token = "another run's"


@pytest.mark.parametrize(
    ("call", "number", "loss", "said"),
    [
        ("/v1/completions", 12, die, "does not answer"),
        ("policy_receive", 2, die, "its weights are sent again"),
        ("/v1/completions", 12, lose_weights, "has other weights than this round's"),
    ],
    ids=["dies in a batch", "dies as it takes weights", "takes other weights"],
)
def test_a_round_continues_when_the_server_is_back(tiny_model, server, in_tmp, capsys, call, number, loss, said):
    whole = rounds(in_tmp / "whole", tiny_model, VLLMServerSampler(server.url))
    assert len(whole) == 4
    server.calls.clear()
    at_call(server, call, number, lambda: loss(server))
    assert rounds(in_tmp / "lost", tiny_model, VLLMServerSampler(server.url)) == whole
    assert said in capsys.readouterr().out
    assert server.calls.count("/v1/completions") <= 32 + 8  # at most one batch of the four is sampled again


def test_a_server_that_never_comes_is_named(tiny_model):
    sampler = VLLMServerSampler("http://127.0.0.1:9", wait_minutes=0)
    with pytest.raises(
        UserError, match=r"server at http://127.0.0.1:9 has not answered for 0 minutes .*lit-align serve"
    ):
        sample(sampler, Policy.load(PolicyConfig(tiny_model)))


def test_a_server_that_computes_otherwise_is_refused(tiny_model, server):
    policy, sampler = Policy.load(PolicyConfig(tiny_model)), VLLMServerSampler(server.url)
    with pytest.raises(UserError, match=r"computes in float32, and data.sampling_dtype asks for bfloat16"):
        sampler.prepare(policy, torch.bfloat16, LONGEST)
    with pytest.raises(UserError, match=r"takes 512 tokens, and the longest prompt and its response have 600"):
        sampler.prepare(policy, torch.float32, 600)


def test_address_and_key_come_from_the_environment(tiny_model, monkeypatch):
    server = LoopbackServer(tiny_model, key="secret")
    policy = Policy.load(PolicyConfig(tiny_model))
    with pytest.raises(UserError, match="nor is the environment variable LIT_ALIGN_VLLM_URL"):
        sample(VLLMServerSampler(), policy)
    monkeypatch.setenv("LIT_ALIGN_VLLM_URL", server.url)
    with pytest.raises(UserError, match=r"HTTP 401: .*data.sampler.token_variable to its API key") as caught:
        sample(VLLMServerSampler(), policy)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert sample(VLLMServerSampler(), policy, temperature=0) == sample(GenerateSampler(), policy, temperature=0)
    server.stop()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[::1", "http://host:port"])
def test_an_address_must_be_one(url):
    with pytest.raises(UserError, match=r"data.sampler.url=.* must be an address. Give http://HOST:PORT"):
        VLLMServerSampler(url)


def test_an_address_with_a_password_is_refused_and_not_shown():
    with pytest.raises(UserError, match=r"data.sampler.url must not .* data.sampler.token_variable=NAME") as caught:
        VLLMServerSampler("http://user:secret@host")
    assert "secret" not in str(caught.value)


# --- several processes ---


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "LoRA"])
def test_sharded_processes_sample_what_one_process_samples(tiny_model, server, in_tmp, lora):
    """Five batches for two processes: the last turn has one. The server dies in the second round."""
    held_out = write_prompts(in_tmp, 3)

    def go(folder: str, strategy: str) -> None:
        scorer = FunctionScorer(f"{in_tmp / 'rewards.py'}:reward")
        callbacks = [
            Drift(prompts=3),
            ReferenceRefresh(0.5, 1, "round"),
            WinRate(held_out, scorer, validation=held_out, responses_per_prompt=2, batch_size=2),
        ]
        run(tiny_model, in_tmp / folder, server.url, strategy, 0.0, lora, callbacks=callbacks)

    go("one", "auto")
    server.calls.clear()
    at_call(server, "/v1/completions", 50, lambda: die(server))

    def run_on_shards() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FSDPModule, "unshard", lambda part: pytest.fail("gathers all weights"))
            patch.setattr(GenerateSampler, "load", lambda *arguments: pytest.fail("copies all weights"))
            go("two", "fsdp2")

    run_in(2, run_on_shards)
    check_same_samples(in_tmp / "one", in_tmp / "two")
    measured = [row for row in read_metrics(in_tmp / "two/metrics.csv") if "drift/kl_policy_start" in row]
    assert len(measured) == 2
    for name in ("kl_policy_start", "kl_policy_reference"):
        assert [row[f"drift/{name}"] for row in measured] == pytest.approx([0, 0], abs=1e-4)
    one, two = (read_held_out(verdict_file(in_tmp / folder)) for folder in ("one", "two"))
    assert len(one) == 3
    for row, other in zip(one, two, strict=True):
        assert row.responses == row.responses_start, "equal weights and streams"
        assert (row.responses, row.scorers) == (other.responses, other.scorers)
        assert row.logps == pytest.approx(other.logps, abs=1e-4)
        assert other.logps == pytest.approx(other.logps_start, abs=1e-4)


def test_sharded_processes_record_what_one_process_records(tiny_model, server, in_tmp):
    """log π_s of mismatched responses, and log π_ref, which all processes compute together."""
    options = {"objective": KTO, "reference": ReferenceConfig(form="recorded")}
    run(tiny_model, in_tmp / "one", server.url, "auto", 0.0, **options)
    first, second = run_in(2, lambda: run(tiny_model, in_tmp / "two", server.url, "fsdp2", 0.0, **options))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("mismatched", "reference"):
        one, two = stored(in_tmp / "one", name), stored(in_tmp / "two", name)
        assert len(one) == 2
        for rows, others in zip(one.values(), two.values(), strict=True):
            assert [row["source"] for row in rows] == [row["source"] for row in others]
            for row, other in zip(rows, others, strict=True):
                assert row["logps"] == pytest.approx(other["logps"], abs=1e-4)


# --- serve ---


@pytest.mark.parametrize(("has_kernels", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_serve_prints_the_command_of_a_configuration(tiny_model, in_tmp, capsys, set_kernels, has_kernels, dtype):
    set_kernels(has_kernels)
    data = on_policy(in_tmp)
    main(
        [
            *("serve", "--print", "--config", str(ROOT / "configs/pr_dpo.yaml")),
            *("--config", str(ROOT / "configs/samplers/vllm_server.yaml")),
            *(f"--model.policy.path={tiny_model}", f"--data.prompts={data.prompts}"),
            *("--data.sampler.url=http://10.0.0.7:8123", "--data.sampler.tensor_parallel=2"),
            *(f"--trainer.default_root_dir={in_tmp}/run", "--trainer.devices=8"),
            *("--data.max_prompt_length=100", "--data.sampling.max_new_tokens=20"),
            *(f"--win_rate.prompts={data.prompts}", "--win_rate.scorer=FunctionScorer"),
            *(f"--win_rate.scorer.function={in_tmp}/rewards.py:reward", "--win_rate.sampling.max_new_tokens=30"),
        ]
    )
    said = capsys.readouterr().out
    assert 'VLLM_SERVER_DEV_MODE="1"' in said
    assert "--host 10.0.0.7 --port 8123" in said
    assert "--tensor-parallel-size 2" in said
    assert f"--dtype {dtype}" in said, "the type in which the run on this machine samples"
    assert "--max-model-len 130" in said, "the longest responses are those to held-out prompts"
    assert "--worker-extension-cls lit_align.data.samplers.vllm_worker.PolicyReceiver" in said
    assert (in_tmp / "run/vllm/config.json").is_file()
    assert not list((in_tmp / "run/vllm").glob("*.safetensors"))


def test_serve_needs_the_served_sampler(tiny_model, in_tmp, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--config", str(ROOT / "configs/pr_dpo.yaml")])
    assert "serve starts the server of data.sampler=VLLMServerSampler" in capsys.readouterr().err
