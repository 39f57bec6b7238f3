"""Exports of a run: a model for plain transformers, an adapter for plain peft, answers, a chat."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from processes import run_in
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, adamw, fit, write_pairs, write_prompts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import lit_align.cli.chat
from lit_align.callbacks import FSDP2Strategy, FSDPSharding, ReferenceRefresh
from lit_align.cli import main
from lit_align.cli.chat import Prompting, Speaker, chat
from lit_align.data import OfflinePairs
from lit_align.data.sampling import Response, SampleRequest, Sampling
from lit_align.dtypes import fast_dtype
from lit_align.errors import UserError
from lit_align.export import export, load_policy
from lit_align.model_card import model_card
from lit_align.objectives import DPO, RewardModel
from lit_align.objectives.saved import SavedObjective
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.sharding import gathered


def train(folder: Path, model: str, *args: str) -> None:
    """DPO with a moving reference on pairs, a verdict at the end, in `folder`/run."""
    write_pairs(folder)
    write_prompts(folder, 6)
    config = {
        "model": {
            "class_path": "DPO",
            "init_args": {
                "policy": {"path": model, "dtype": "float32"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
            },
        },
        "data": {"class_path": "OfflinePairs", "init_args": {"train": "pairs.jsonl", "batch_size": 4}},
        "win_rate": {
            "prompts": "prompts.jsonl",
            "scorer": {"class_path": "FunctionScorer", "init_args": {"function": "rewards.py:reward"}},
            "sampling": {"max_new_tokens": 4},
        },
        "reference_refresh": {"alpha": 1.0, "tau": 1},
        "trainer": {"max_epochs": 1, "default_root_dir": "run", "accelerator": "cpu"},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=dpo.yaml", *args])


IDS = torch.tensor([[70, 71, 72, 90, 91, 0]])


def logps(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float().log_softmax(-1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_plain_transformers_gives_the_policys_logps(tiny_model, in_tmp, lora):
    train(in_tmp, tiny_model, *(["--model.lora.r=4"] if lora else []))
    main(["export", "run", "--out", "exported"])
    policy, _ = load_policy(Path("run/checkpoints/last.ckpt").resolve())
    exported = AutoModelForCausalLM.from_pretrained("exported")
    torch.testing.assert_close(logps(exported), logps(policy.model), rtol=0, atol=1e-5)
    assert (logps(exported) - logps(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.1
    kept = AutoModelForCausalLM.from_pretrained("run/model")
    torch.testing.assert_close(logps(exported), logps(kept))
    assert AutoTokenizer.from_pretrained("exported").chat_template
    for model in (exported, kept):
        assert model.generation_config.eos_token_id == [0, 2], "the text's end, and the turn's"
        assert not model.generation_config._from_model_config

    if lora:
        export("run/checkpoints/last.ckpt", "adapter", adapter=True)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.testing.assert_close(logps(PeftModel.from_pretrained(plain, "adapter")), logps(policy.model))
        checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
        checkpoint["identity"]["model.policy (its weights)"] = "of another base"
        torch.save(checkpoint, "other.ckpt")
        with pytest.raises(UserError, match=r"other.ckpt: its adapter was trained on a base model with other weights"):
            export("other.ckpt", "wrong")
        assert not Path("wrong").exists()
    else:
        with pytest.raises(UserError, match="trained all weights"):
            export("run", "adapter", adapter=True)

    card = Path("exported/README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "base_model" not in yaml.safe_load(front), "the hub refuses a folder's name"
    summary = json.loads(Path("run/summary.json").read_text())["scorers"]["training"]
    verdict = f"{summary['win_rate']:.1%} ({summary['win_rate_low']:.1%} – {summary['win_rate_high']:.1%})"
    for piece in ("DPO: −log σ", "the start, ← policy, every step", "pairs.jsonl", verdict, "class_path: "):
        assert piece in body


RULES = {"ring of past adapters": (0.7, 1), "dense updates": (0.05, 1), "the adapter as it was": (1.0, 3)}


def train_and_save(model: str, rule: tuple[float, int], sharded: bool) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Four steps; gives the policy's log-probabilities, how far they are from the reference's, and what that is."""
    module = DPO(PolicyConfig(model, dtype="float32"), lora=LoRAConfig(r=1, alpha=2), optimizer=adamw(0.03))
    saving = ModelCheckpoint("run/checkpoints", filename="last", enable_version_counter=False)
    options: dict[str, Any] = (
        {"strategy": FSDP2Strategy(save_distributed_checkpoint=True), "devices": 2} if sharded else {}
    )
    callbacks = [ReferenceRefresh(*rule), saving, *([FSDPSharding()] if sharded else [])]
    data = OfflinePairs("pairs.jsonl", batch_size=2 if sharded else 4)
    trainer = fit(module, data, *callbacks, enable_checkpointing=True, **options)
    assert module.policy is not None
    assert module.reference is not None
    module.policy.save("run/model")
    assert trainer.train_dataloader is not None
    batch = next(iter(trainer.train_dataloader))
    with gathered(module.policy), torch.no_grad():
        drift = module.policy(batch) - module.reference.logps(batch)
        return logps(module.policy.model), drift, str(module.reference)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards of two processes"])
@pytest.mark.parametrize("form", RULES)
def test_adapters_of_the_moved_reference_are_not_exported(tiny_model, in_tmp, form, sharded):
    write_pairs(in_tmp, 16)
    saved = run_in(2, train_and_save, tiny_model, RULES[form], True) if sharded else None
    policy, drift, reference = saved[0] if saved else train_and_save(tiny_model, RULES[form], False)
    begins = "the last" if form == "ring of past adapters" else form
    assert reference.startswith(begins), "not what is to be tested"
    assert drift.abs().max() > 0.01, "the reference is the policy: nothing would be seen"
    assert Path("run/checkpoints/last.ckpt").is_dir() == sharded

    export("run", "exported")
    export("run", "adapter", adapter=True)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert load_file("exported/model.safetensors").keys() == load_file(f"{tiny_model}/model.safetensors").keys()
    assert all(factor.shape.count(1) == 1 for factor in load_file("adapter/adapter_model.safetensors").values())
    for model in ("exported", "run/model"):
        torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(model)), policy, rtol=0, atol=1e-5)
    torch.testing.assert_close(logps(PeftModel.from_pretrained(plain, "adapter")), policy, rtol=0, atol=1e-5)


def test_all_weights_out_of_shards(tiny_model, in_tmp):
    def go() -> torch.Tensor:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw(0.03))
        saving = ModelCheckpoint("run/checkpoints", filename="last", enable_version_counter=False)
        options: dict[str, Any] = {"strategy": FSDP2Strategy(save_distributed_checkpoint=True), "devices": 2}
        data = OfflinePairs("pairs.jsonl", batch_size=2)
        fit(module, data, saving, FSDPSharding(), enable_checkpointing=True, **options)
        assert module.policy is not None
        with gathered(module.policy):
            return logps(module.policy.model)

    write_pairs(in_tmp)
    trained = run_in(2, go)[0]
    export("run/checkpoints/last.ckpt", "exported")
    torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained("exported")), trained, rtol=0, atol=1e-5)
    assert (trained - logps(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.1


def test_a_reward_model_is_exported_as_a_classifier(tiny_model, in_tmp):
    module = RewardModel(PolicyConfig(tiny_model), optimizer=adamw(1e-2))
    trainer = fit(module, OfflinePairs(write_pairs(in_tmp)))
    trainer.save_checkpoint("reward.ckpt")
    export("reward.ckpt", "exported")
    model = AutoModelForSequenceClassification.from_pretrained("exported").eval()
    assert module.policy is not None
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, module.policy.model(IDS).logits)
    card = Path("exported/README.md").read_text()
    for piece in (
        "text-classification",
        "| objective | RewardModel: −log σ",
        "| reference | none |",
        "AutoModelForSeq",
    ):
        assert piece in card


def test_the_adapter_of_a_reward_model_is_not_exported_alone(tiny_model, in_tmp):
    module = RewardModel(PolicyConfig(tiny_model), lora=LoRAConfig(r=2), optimizer=adamw(1e-2))
    fit(module, OfflinePairs(write_pairs(in_tmp))).save_checkpoint("reward.ckpt")
    with pytest.raises(UserError, match="--adapter would leave out the reward model's output head"):
        export("reward.ckpt", "exported", adapter=True)


def test_a_chat_has_the_type_that_the_model_is_stored_in(tiny_model, in_tmp):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained("stored")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained("stored")
        assert Speaker("stored", Sampling(max_new_tokens=4)).model.dtype == fast_dtype(dtype)


class Own(DPO):
    """An objective of a project of one's own."""

    formula = "−log σ(own)"


def test_the_card_states_the_formula_of_an_objective_of_ones_own(tiny_model, in_tmp):
    fit(Own(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp))).save_checkpoint("own.ckpt")
    export("own.ckpt", "exported")
    assert "| objective | Own: −log σ(own) |" in Path("exported/README.md").read_text()


def test_the_exported_model_samples_as_the_rounds_did(tiny_model, in_tmp, monkeypatch):
    """Its run is the folder above it that a run wrote to, wherever the command is given."""
    Path("run/checkpoints").mkdir(parents=True)
    for other in ("config.yaml", "run/checkpoints/config.yaml"):
        Path(other).write_text("of: another program")
    model = in_tmp / "model"
    shutil.copytree(tiny_model, model)
    GenerationConfig(repetition_penalty=1.1, min_p=0.1, temperature=0.6, do_sample=True).save_pretrained(model)
    trainer = fit(DPO(PolicyConfig(str(model))), OfflinePairs(write_pairs(in_tmp)))
    trainer.save_checkpoint("run/checkpoints/last.ckpt")
    trainer.save_checkpoint("of/no run.ckpt")
    sampling = vars(Sampling(temperature=0.8, top_p=0.9))
    config = {"model": {}, "data": {"init_args": {"sampling": sampling}}}
    Path("run/config.yaml").write_text(f"# lit_align==0.2.0\n{yaml.safe_dump(config)}")
    monkeypatch.chdir("run/checkpoints")
    export("last.ckpt", "exported")
    saved = AutoModelForCausalLM.from_pretrained("exported").generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.top_k) == (True, 0.8, 0.9, 0)
    assert saved.repetition_penalty is saved.min_p is None, "the rounds ignored the start's"
    export(in_tmp / "of/no run.ckpt", "offline")
    saved = AutoModelForCausalLM.from_pretrained("offline").generation_config
    assert (saved.temperature, saved.repetition_penalty, saved.min_p) == (0.6, 1.1, 0.1), "without rounds they stay"


def test_the_model_keeps_its_own_ends_of_a_text(tiny_model, in_tmp):
    shutil.copytree(tiny_model, "model")
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained("model")
    data = OfflinePairs(write_pairs(in_tmp))
    fit(DPO(PolicyConfig("model")), data).save_checkpoint("last.ckpt")
    assert data.preference_tokenizer.end_ids() == [0, 2, 1]
    export("last.ckpt", "exported")
    assert AutoModelForCausalLM.from_pretrained("exported").generation_config.eos_token_id == [0, 2, 1]
    assert Speaker("exported", Sampling()).preference_tokenizer.end_ids() == [0, 2, 1]


def test_a_greedy_model_with_settings_of_sampling_is_saved(tiny_model, in_tmp):
    """As in published files that transformers reads with a warning and refuses to save."""
    shutil.copytree(tiny_model, "model")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "repetition_penalty": 1.1}
    Path("model/generation_config.json").write_text(json.dumps(settings))
    fit(DPO(PolicyConfig("model")), OfflinePairs(write_pairs(in_tmp))).save_checkpoint("last.ckpt")
    export("last.ckpt", "exported")
    saved = json.loads(Path("exported/generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.1
    assert not {"temperature", "top_p"} & {name for name, value in saved.items() if value is not None}


def test_the_card_states_the_arguments_of_the_chat_template():
    objective = SavedObjective("DPO", "−log σ", "logp", PolicyConfig("base"), None, 0.1, 0.0, None, None)
    config = {"data": {"init_args": {"template_args": {"enable_thinking": False}}}}
    assert "| arguments of the chat template | enable_thinking=False |" in model_card(objective, config, None, False)
    assert "arguments of the chat template" not in (card := model_card(objective, {}, None, False))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "base"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, "no such folder or checkpoint"),
        (lambda: Path("run").mkdir(), "run: there is no checkpoint in it, or in its checkpoints/"),
        (lambda: Path("run").write_bytes(b"no checkpoint"), "not a valid checkpoint of lit_align"),
        (lambda: (Path("run").mkdir(), Path("run/.metadata").touch()), "not a valid checkpoint of lit_align"),
    ],
)
def test_runs_that_cannot_be_exported_are_reported(in_tmp, make, said):
    make()
    with pytest.raises(UserError, match=said):
        export("run", "exported")


@pytest.mark.parametrize("holds", ["notes.txt", "adapter_config.json", "config.json", "README.md"])
def test_an_export_does_not_mix_with_existing_files(in_tmp, holds):
    Path("exported").mkdir()
    Path("exported", holds).touch()
    with pytest.raises(UserError, match="exported must be a new folder or an earlier export"):
        export("run", "exported")


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_an_export_replaces_an_earlier_one_once_it_is_written(tiny_model, in_tmp, monkeypatch):
    module = DPO(PolicyConfig(tiny_model), lora=LoRAConfig(r=2))
    fit(module, OfflinePairs(write_pairs(in_tmp))).save_checkpoint("run/checkpoints/last.ckpt")
    for folder in ("new", "exported"):
        export("run/checkpoints/", folder)
    export("run", "exported", adapter=True)
    export("run", "exported", adapter=True)
    earlier = content("exported")
    assert "adapter_config.json" in earlier
    assert "model.safetensors" not in earlier
    with monkeypatch.context() as patch:
        patch.setattr("lit_align.export.model_card", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export("run", "exported")
    assert content("exported") == earlier
    Path("exported/model-q4.gguf").touch()
    Path("exported/.export").mkdir()  # of an export that was killed
    Path("exported/.export/half").touch()
    export("run", "exported")
    assert content("exported") == content("new") | {"model-q4.gguf": b""}


def test_predict_writes_the_policys_responses(tiny_model, in_tmp, capsys, recwarn):
    train(in_tmp, tiny_model)
    base = [
        "predict",
        "--config=dpo.yaml",
        "--ckpt_path=run/checkpoints/last.ckpt",
        "--predictions.prompts=prompts.jsonl",
    ]
    base += ["--predictions.sampling.max_new_tokens=6", "--predictions.responses_per_prompt=3"]
    main(base)
    rows = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(len(row["responses"]) == 3 for row in rows)
    capsys.readouterr()
    main([*base, "--data.max_prompt_length=16", "--data.long_prompts=drop"])
    short = [json.loads(line)["prompt"] for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert short == [prompt for prompt in prompts if len(prompt) <= 16]
    left_out = f"{len(short)} prompts from prompts.jsonl; {len(prompts) - len(short)} prompts too long, dropped"
    assert left_out in capsys.readouterr().out
    main([*base, "--predictions.out=out/table.parquet", *SCORER])
    table = pq.read_table("out/table.parquet").to_pylist()
    assert [row["responses"] for row in table] == [row["responses"] for row in rows]
    assert table[0]["scores"] == [float(sum(map(ord, text)) % 17) for text in table[0]["responses"]]

    with pytest.raises(SystemExit):
        main(["predict", "--config=dpo.yaml", "--ckpt_path=run/checkpoints/last.ckpt"])
    assert "--predictions.prompts=PATH" in capsys.readouterr().err
    assert not [warning for warning in recwarn if "returned None" in str(warning.message)]


SCORER = ["--predictions.scorer=FunctionScorer", "--predictions.scorer.function=rewards.py:reward"]


def test_a_chat_keeps_the_turns_of_each_speaker(tiny_model, capsys):
    lines = iter(["hello", "", "and you?", "/reset", "again", "/quit"])
    speakers = [Speaker(tiny_model, Sampling(max_new_tokens=4), seed) for seed in (0, 1)]
    chat(speakers, read=lambda _: next(lines))
    for speaker in speakers:
        assert [turn["content"] for turn in speaker.turns][:1] == ["again"]
        assert len(speaker.turns) == 2
        assert speaker.answered == 3
    assert capsys.readouterr().out.count(tiny_model) == 6


def test_a_long_chat_loses_its_oldest_turns_first(tiny_model, capsys):
    speaker = Speaker(tiny_model, Sampling(max_new_tokens=4))
    lines = iter(["a" * 200, "b" * 200, "c" * 200, "d" * 600, "e", "/quit"])
    chat([speaker], read=lambda _: next(lines))
    said = [turn["content"][0] for turn in speaker.turns if turn["role"] == "user"]
    assert said == ["b", "c", "e"], "512 places; the next question leaves out as much as it needs"
    assert "exceed the 512 positions of this model. Shorten the message" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_answer_leaves_the_chat_as_it_was(tiny_model, capsys, monkeypatch):
    speaker = Speaker(tiny_model, Sampling(max_new_tokens=4))
    lines = iter(["one", "two", "three", "/quit"])
    sample = lit_align.cli.chat.sample_responses

    def interrupted(*args: Any):
        if speaker.answered == 1:
            monkeypatch.setattr(lit_align.cli.chat, "sample_responses", sample)
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(lit_align.cli.chat, "sample_responses", interrupted)
    chat([speaker], read=lambda _: next(lines))
    assert [turn["content"] for turn in speaker.turns if turn["role"] == "user"] == ["one", "three"]
    assert "interrupted" in capsys.readouterr().out


THINKING = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n{{ thinks }}{% endif")


OPENED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [f"{OPENED}of A"]),
        (["--template-args={thinks: given}"], [f"{OPENED}given"]),
        (["--chat-template={{ messages[0].content }}?{{ thinks }}"], ["hi?of A"]),
        (["--plain"], ["hi"]),
        (["--against=B", "--template-args={thinks: given}"], [f"{OPENED}given", f"{OPENED}of B"]),
        (["--against=B", "--against-template-args={thinks: given}"], [f"{OPENED}of A", f"{OPENED}given"]),
    ],
)
def test_a_chat_prompts_as_its_run_was_trained(tiny_model, in_tmp, monkeypatch, options, expected):
    for run in ("A", "B"):
        shutil.copytree(tiny_model, f"{run}/model")
        Path(run, "model", "chat_template.jinja").write_text(THINKING)
        config = {"model": {}, "data": {"init_args": {"template_args": {"thinks": f"of {run}"}}}}
        Path(run, "config.yaml").write_text(yaml.safe_dump(config))
    prompts = []

    def record(model: Any, tokenizer: Any, request: SampleRequest) -> list[list[Response]]:
        prompts.append(tokenizer.decode(request.prompts[0]))
        return [[Response([0], "", finished=True)]]

    monkeypatch.setattr(lit_align.cli.chat, "sample_responses", record)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    main(["chat", "A", *options])
    assert prompts == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--template-args=3"], "--template-args"),
        (["--plain", "--chat-template=a.jinja"], "--plain"),
        (["--against-template-args={a: 1}"], "--against"),
        (["--max-new-tokens=0"], "--max-new-tokens=0 must be"),
        (["--temperature=-1"], "--temperature=-1.0 must be"),
        (["--chat-template=none.jinja"], "--chat-template=none.jinja must be"),
        (["--tokenizer=./none"], "--tokenizer: there is no folder './none'"),
    ],
)
def test_options_of_a_chat_that_cannot_be_are_refused(tiny_model, options, named, capsys):
    with pytest.raises(SystemExit):
        main(["chat", tiny_model, *options])
    said = capsys.readouterr().err
    assert said.startswith("error: chat: ")
    assert named in said
    assert not re.search(r"(data|sampling|model)\.[a-z_]+", said)


@pytest.mark.parametrize(("is_second", "option"), [(False, "--template-args"), (True, "--against-template-args")])
def test_answers_that_a_template_cannot_give_name_the_options_of_chat(tiny_model, capsys, is_second, option):
    prompting = Prompting({"unread": 1}, is_second=is_second)
    speaker, lines = Speaker(tiny_model, Sampling(), prompting=prompting), iter(["hi", "/quit"])
    chat([speaker], read=lambda _: next(lines))
    said = " ".join(capsys.readouterr().out.split())
    assert f" {option} hold 'unread', which the chat template" in f" {said}"
    assert "(--chat-template)" in said


def test_a_chat_ends_with_the_input(tiny_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    main(["chat", tiny_model, "--max-new-tokens", "2"])


def test_bytes_that_are_not_text_end_no_chat(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8"))
    main(["chat", tiny_model, "--max-new-tokens", "2"])
    assert capsys.readouterr().out.count("> ") == 3


def test_a_full_disk_is_one_message(in_tmp, monkeypatch):
    def save_pretrained(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    policy = SimpleNamespace(adapter=SimpleNamespace(save_pretrained=save_pretrained))
    monkeypatch.setattr("lit_align.export.load_policy", lambda path: (policy, SimpleNamespace(scores=False)))
    Path("last.ckpt").touch()
    with pytest.raises(UserError, match=r"exported cannot be written: .*No space left on device"):
        export("last.ckpt", "exported", adapter=True)
