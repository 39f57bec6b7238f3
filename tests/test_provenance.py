"""A checkpoint resumes the run that it is of. Another one stops with a list of what differs."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, fit, llama_config, on_policy, same, sgd, weights, write_pairs, write_prompts
from transformers import LlamaForCausalLM

from lit_align.callbacks import WinRate
from lit_align.cli import AlignCLI
from lit_align.data import BestWorst, FunctionScorer, OfflinePairs
from lit_align.data.batches import Example
from lit_align.data.examples import digest_of_examples
from lit_align.data.prompts import identity_of_prompts
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError
from lit_align.export import export
from lit_align.objectives import CPO, DPO, EXO, IPO, KTO, MPO, ORPO, SFT, SPPO, AnchoredObjective, RewardModel, SimPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.provenance import check, of_optimizer, save


def run(model: str, ckpt_path: str | None = None, objective=DPO, data=None, options=None, also=(), **trainer) -> DPO:
    module = objective(PolicyConfig(model, dtype="float32"), **({"optimizer": adamw()} | (options or {})))
    saving = ModelCheckpoint("ckpt", save_last=True)
    fit(module, data or OfflinePairs("pairs.jsonl", batch_size=2), saving, *also, ckpt_path=ckpt_path, **trainer,
        enable_checkpointing=True)  # fmt: skip
    return module


@pytest.fixture
def checkpoint(tiny_model, in_tmp) -> str:
    write_pairs(in_tmp)
    run(tiny_model)
    return "ckpt/last.ckpt"


CHANGES = {
    "model": {"objective": IPO},
    "model.beta: 0.1 → 0.3": {"options": {"beta": 0.3}},
    "model.schedule: linear → cosine": {"options": {"schedule": "cosine"}},
    "model.optimizer: AdamW → SGD": {"options": {"optimizer": sgd()}},
    "model.optimizer.lr: 0.001 → 0.01": {"options": {"optimizer": adamw(1e-2)}},
    "data.batch_size: 2 → 4": {"data": lambda: OfflinePairs("pairs.jsonl", batch_size=4)},
    "data.seed: 1 → 5": {"data": lambda: OfflinePairs("pairs.jsonl", batch_size=2, seed=5)},
    "data.pairing.min_margin: 0.0 → 0.5": {
        "data": lambda: OfflinePairs("pairs.jsonl", batch_size=2, pairing=BestWorst(0.5))
    },
    "trainer.accumulate_grad_batches: 1 → 2": {"accumulate_grad_batches": 2},
    "trainer.limit_train_batches: 1.0 → 1": {"limit_train_batches": 1},
    "trainer.gradient_clip_val: None → 0.5": {"gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("change", [name for name in CHANGES if "pairing" not in name])
def test_a_run_of_other_options_does_not_resume(tiny_model, checkpoint, change):
    changed = dict(CHANGES[change])
    if "data" in changed:
        changed["data"] = changed["data"]()
    with pytest.raises(UserError, match="of another run") as error:
        run(tiny_model, checkpoint, max_epochs=2, **changed)
    assert f"  {change}" in str(error.value)


def test_an_optimizer_of_matrices_alone_is_identified():
    assert of_optimizer(partial(torch.optim.Muon, lr=0.1))["model.optimizer.lr"] == 0.1


def test_a_change_that_is_accepted_resumes(tiny_model, checkpoint):
    options = {"beta": 0.3, "accept_changes": ["model.beta"]}
    module = run(tiny_model, checkpoint, options=options, max_epochs=2)
    assert module.trainer.current_epoch == 2
    with pytest.raises(UserError, match=r"accept_changes=\['beta'\]: the checkpoint has no such option. Changed: none"):
        run(tiny_model, checkpoint, options={"beta": 0.3, "accept_changes": ["beta"]}, max_epochs=2)


class Groups(Callback):
    """The optimizer's options at each step."""

    def __init__(self):
        self.seen: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append({name: value for name, value in optimizer.param_groups[0].items() if name != "params"})


def test_accepted_options_of_the_optimizer_take_effect_at_once(tiny_model, checkpoint):
    as_before, changed, checkpoint = Groups(), Groups(), shutil.copy(checkpoint, "start.ckpt")
    run(tiny_model, checkpoint, also=[as_before], max_epochs=2)
    options: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=0.01, betas=(0.5, 0.9), weight_decay=0.3)}
    options["accept_changes"] = [f"model.optimizer.{name}" for name in ("lr", "betas", "weight_decay")]
    run(tiny_model, checkpoint, also=[changed], options=options, max_epochs=2)
    rates = [group["lr"] for group in as_before.seen]
    assert len(rates) > 1
    assert [group["lr"] for group in changed.seen] == pytest.approx([10 * rate for rate in rates])
    assert all(group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0.3 for group in changed.seen)


def test_the_first_step_of_a_longer_run_has_its_own_rate(tiny_model, checkpoint):
    """The checkpoint's rate of the next step is 0: its run was over."""
    longer = Groups()
    run(tiny_model, checkpoint, also=[longer], max_epochs=2)
    assert longer.seen[0]["lr"] == pytest.approx(0.001 / 2)


def test_a_resume_at_the_end_of_warm_up_does_not_record_it_again(tiny_model, in_tmp):
    write_pairs(in_tmp)
    first = run(tiny_model, options={"warmup_steps": 4}).learning_rate.warmed_up_at
    assert first == (4, 0, 1.0)
    resumed = run(tiny_model, "ckpt/last.ckpt", options={"warmup_steps": 4}, max_epochs=2)
    assert resumed.learning_rate.warmed_up_at == first


def test_another_optimizer_starts_without_state(tiny_model, checkpoint, capsys):
    options: dict[str, Any] = {"optimizer": partial(torch.optim.Adafactor, lr=0.001)}
    with pytest.raises(UserError, match=r"model\.optimizer: AdamW → Adafactor") as error:
        run(tiny_model, checkpoint, options=options, max_epochs=2)
    (listed,) = re.findall(r"accept_changes=\[(.*)\]", str(error.value))
    options["accept_changes"] = listed.split(",")
    module = run(tiny_model, checkpoint, options=options, max_epochs=2)
    assert "Adafactor starts without the state of the checkpoint's optimizer" in capsys.readouterr().out
    assert module.trainer.current_epoch == 2
    assert run(tiny_model, "ckpt/last.ckpt", options=options, max_epochs=3).trainer.current_epoch == 3


OBJECTIVES = (CPO, DPO, EXO, IPO, KTO, MPO, ORPO, RewardModel, SFT, SimPO, SPPO)
# To state of its own and from it, to a reference and from it, and to another network.
LIGHT = {(DPO, KTO), (KTO, DPO), (SimPO, IPO), (DPO, SimPO), (DPO, RewardModel)}
PAIRS = [
    pytest.param(*pair, marks=() if pair in LIGHT else pytest.mark.slow, id="-".join(each.__name__ for each in pair))
    for pair in permutations(OBJECTIVES, 2)
]


@pytest.fixture(scope="module")
def of_objective(tiny_model, tmp_path_factory) -> Callable[[Any], str]:
    """A finished run of an objective: gives its checkpoint."""

    @cache
    def checkpoint(objective: Any) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("then"))
            write_pairs(Path())
            run(tiny_model, objective=objective, options=own_options(objective))
            return str(Path("ckpt/last.ckpt").resolve())

    return checkpoint


def own_options(objective: Any) -> dict[str, Any]:
    return {SPPO: {"hard_labels": True}, MPO: {"beta": 0.0}}.get(objective, {})


class Begun(Callback):
    """The weights with which the training begins."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.weights, self.step = weights(pl_module), trainer.global_step


@pytest.mark.parametrize(("then", "now"), PAIRS)
def test_what_a_message_offers_to_accept_is_accepted(tiny_model, in_tmp, capsys, of_objective, then, now):
    """A run of one objective resumes as another with the same policy, or one message says why it cannot."""
    write_pairs(in_tmp)
    checkpoint, options, begun = of_objective(then), own_options(now), Begun()
    with pytest.raises(UserError) as error:
        run(tiny_model, checkpoint, objective=now, options=options, max_epochs=2)
    listed = re.findall(r"accept_changes=\[(.*)\]", str(error.value))
    lacks_reference = issubclass(now, AnchoredObjective) and not issubclass(then, AnchoredObjective)
    if lacks_reference or RewardModel in (then, now):
        assert not listed
        why = (
            "is not of an objective with a reference"
            if lacks_reference
            else "with another model its weights do not fit."
        )
        assert why in str(error.value)
        return
    options["accept_changes"] = listed[0].split(",")
    module = run(tiny_model, checkpoint, objective=now, options=options, also=[begun], max_epochs=2)
    saved = torch.load(checkpoint, weights_only=True)
    assert same(begun.weights, {name: saved["state_dict"][f"policy.model.{name}"] for name in begun.weights})
    assert (begun.step, module.trainer.global_step) == (saved["global_step"], 2 * saved["global_step"])
    z0 = "z0 of the new objective begins as at the start of a run"
    assert (z0 in capsys.readouterr().out) == (now is KTO)
    again = run(tiny_model, "ckpt/last.ckpt", objective=now, options=options, max_epochs=3)
    assert again.trainer.current_epoch == 3


def test_a_run_without_an_accepted_option_resumes_its_own_checkpoints():
    then, now, accepted = {"model": "DPO", "model.robust": False}, {"model": "IPO"}, ["model", "model.robust"]
    check(then, now, accepted, {})
    checkpoint: dict[str, Any] = {}
    save(checkpoint, now, accepted)
    check(checkpoint["identity"], now, accepted, {})


def test_the_offered_option_may_be_pasted_into_a_shell(tiny_model, in_tmp):
    write_pairs(in_tmp)
    then, now = ({"model": name, "model.policy (its weights)": name, "data.train": name} for name in ("SFT", "IPO"))
    with pytest.raises(UserError) as error:
        check(then, now, [], {})
    offered = str(error.value).rpartition("accept the changes: ")[2]
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\n' {offered}"], capture_output=True, text=True, check=True)
    options = {"model": "IPO", "model.policy.path": tiny_model, "data": "OfflinePairs", "data.train": "pairs.jsonl"}
    args = [*(f"--{key}={value}" for key, value in options.items()), *pasted.stdout.splitlines()]
    accepted = AlignCLI(args, run=False).model.accept_changes
    check(then, now, accepted, {})


def test_weights_without_an_adapter_are_not_taken_for_one(tiny_model, checkpoint):
    options = {"lora": LoRAConfig(r=2), "accept_changes": ["model.lora.r"]}
    with pytest.raises(
        UserError, match=r"model\.lora\.r: None → 2\n(.|\n)*with another model\.lora\.r or model\.lora\."
    ):
        run(tiny_model, checkpoint, options=options, max_epochs=2)


def test_other_data_do_not_resume(tiny_model, checkpoint, in_tmp):
    text = (in_tmp / "pairs.jsonl").read_text()
    (in_tmp / "pairs.jsonl").write_text(text.replace("yes 3", "yes 8"))  # as many tokens as before
    with pytest.raises(UserError, match=r"data\.train: "):
        run(tiny_model, checkpoint, max_epochs=2)


def test_other_validation_pairs_do_not_resume(tiny_model, in_tmp):
    for name in ("train", "held"):
        (in_tmp / name).mkdir()
        write_pairs(in_tmp / name)

    def validated(validation: str | None = "held/pairs.jsonl") -> OfflinePairs:
        return OfflinePairs("train/pairs.jsonl", batch_size=2, validation=validation)

    run(tiny_model, data=validated())
    text = (in_tmp / "held/pairs.jsonl").read_text()
    (in_tmp / "held/pairs.jsonl").write_text(text.replace("yes 3", "yes 8"))  # as many tokens as before
    with pytest.raises(UserError, match=r"\(then → now\):\n  data\.validation: \w+ → \w+\nResume"):
        run(tiny_model, "ckpt/last.ckpt", data=validated(), max_epochs=2)
    run(tiny_model, "ckpt/last.ckpt", data=validated(validation=None), max_epochs=2)  # it changes no other number


def test_data_are_told_apart_by_every_token_label_and_reward():
    """However many examples there are: an edited row in a long file, and labels that were turned round."""
    made = [Example([1, 2], [[place, 5], [6]], "a", labels=[1.0, 0.0], rewards=[0.5, 0.1]) for place in range(3000)]
    changes = {1499: {"response_ids": [[7, 5], [6]]}, 2999: {"labels": [0.0, 1.0]}, 0: {"rewards": [0.6, 0.1]}}
    tables = [made, *([*made[:at], replace(made[at], **new), *made[at + 1 :]] for at, new in changes.items())]
    assert len({digest_of_examples(ExampleTable.of(each)) for each in tables}) == 4
    prompts = [Example([place, place + 1], [], "a", prompt="") for place in range(3000)]
    edited = [*prompts[:1499], replace(prompts[0], prompt_ids=[7, 7]), *prompts[1500:]]
    assert identity_of_prompts(ExampleTable.of(prompts)) != identity_of_prompts(ExampleTable.of(edited))


def test_other_held_out_prompts_and_judges_do_not_resume(tiny_model, in_tmp):
    write_pairs(in_tmp)
    write_prompts(in_tmp, 2)

    def verdict() -> WinRate:
        return WinRate("prompts.jsonl", FunctionScorer("rewards.py:reward"), responses_per_prompt=1)

    run(tiny_model, also=[verdict()])
    rewards = (in_tmp / "rewards.py").read_text()
    (in_tmp / "rewards.py").write_text(f"{rewards}\n# another judge")
    with pytest.raises(UserError, match=r"\(then → now\):\n  win_rate\.scorer: rewards\.py:reward@\w+ → .*\nResume"):
        run(tiny_model, "ckpt/last.ckpt", also=[verdict()], max_epochs=2)
    write_prompts(in_tmp, 3)
    with pytest.raises(UserError, match=r"\(then → now\):\n  win_rate\.prompts: \w+ → \w+\n"):
        run(tiny_model, "ckpt/last.ckpt", also=[verdict()], max_epochs=2)


def test_an_evaluation_may_be_added_and_left_out():
    without, beside = {"model.beta": 0.1}, {"model.beta": 0.1, "win_rate.prompts": "digest"}
    for then, now in ((without, beside), (beside, without)):
        check(then, now, [], {})


def test_an_adapter_of_another_base_neither_resumes_nor_is_exported(tiny_model, in_tmp):
    write_pairs(in_tmp)
    shutil.copytree(tiny_model, "base")
    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained("other")
    DPO(PolicyConfig(tiny_model)).tokenizer.save_pretrained("other")
    lora = {"lora": LoRAConfig(r=2)}
    run("base", options=lora)
    accepting = lora | {"accept_changes": ["model.policy (its weights)"]}
    with pytest.raises(UserError, match="trained on a base model with other weights"):
        run("other", "ckpt/last.ckpt", options=accepting, max_epochs=2)
    shutil.copytree("other", "base", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"last\.ckpt: its adapter was trained on a base model with other weights"):
        export("ckpt/last.ckpt", "exported")
    assert not Path("exported").exists()


def test_rounds_of_another_scorer_or_other_prompts_do_not_resume(tiny_model, in_tmp):
    run(tiny_model, data=on_policy(in_tmp))
    (in_tmp / "rewards.py").write_text("def reward(prompts, responses): return [float(len(r)) for r in responses]\n")
    other = on_policy(in_tmp)
    (in_tmp / "rewards2.py").write_text("def reward(prompts, responses): return [float(len(r)) for r in responses]\n")
    other.scorer = FunctionScorer(f"{in_tmp / 'rewards2.py'}:reward")
    with pytest.raises(UserError, match=r"data\.scorer: "):
        run(tiny_model, "ckpt/last.ckpt", data=other, max_epochs=2)


def test_an_option_that_an_earlier_version_lacked_had_its_default(tiny_model, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["identity"]["model.length_normalize"], saved["identity"]["model.policy.compile"]
    torch.save(saved, "older.ckpt")
    run(tiny_model, "older.ckpt", max_epochs=2)
    with pytest.raises(UserError, match=r"model\.length_normalize: False → True"):
        run(tiny_model, "older.ckpt", options={"length_normalize": True}, max_epochs=2)
