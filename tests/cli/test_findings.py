"""Each pattern is found in a report that a command line provokes, and named in what is printed."""

import sys
from pathlib import Path

import pytest

from lit_align.cli import main, parser
from lit_align.cli.findings import FINDING, PATTERNS

YAML = """
model: {class_path: DPO, init_args: {policy: {path: ./model}}}
data: {class_path: OfflinePairs, init_args: {train: pairs.jsonl}}
"""
FIT = ["fit", "--config=dpo.yaml"]

# the pattern: a command line, and the paragraph's beginning
PROVOKED = {
    "key": ([*FIT, "--model.beta=abc"], "model.init_args.beta: 'abc' is not a number."),
    "cls": ([*FIT, "--model.bta=1"], "model.init_args.bta: DPO has no option 'bta'."),
    "callable": (
        [*FIT, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lrr=1"],
        "model.init_args.optimizer.init_args.lrr: AdamW has no option 'lrr'.",
    ),
    "subtypes": ([*FIT, "--model=DPOO"], "model: there is no class 'DPOO'."),
    "option": (["fit", "--config=group.yaml"], "model.init_args.policy.dtpe: DPO has no option 'policy.dtpe'."),
    "extra": ([*FIT, "--data.bach_size=1"], "data.init_args.bach_size: OfflinePairs has no option 'bach_size'."),
    "argument": ([*FIT, "--trainer.max_epoks=1"], "trainer.max_epoks: there is no such option."),
    "required": (["fit"], "model: not given."),
    "other": (["fit", "--config=other.yaml"], "model: torch.nn.Linear is not a subclass of PreferenceObjective."),
    "path": (
        ["fit", "--model=DPO", "--model.policy.path=m", "--data=OnPolicyPairs", "--data.scorer=rewards.py:f"],
        "data.init_args.scorer=rewards.py:f is a function.",
    ),
    "unnamed": (["fit", "--config=unnamed.yaml"], "model: no class is named"),
    "made": (
        ["fit", "--config=popen.yaml"],
        "model.init_args.optimizer: subprocess.Popen is not a subclass of Optimizer.",
    ),
    "type": ([*FIT, "--trainer.max_epochs=two"], "trainer.max_epochs: 'two' is not an integer or null."),
    "file": (["fit", "--config=dpo.yml"], "config: there is no file 'dpo.yml'. Did you mean 'dpo.yaml'?"),
    "unloadable": ([*FIT, "--trainer=null"], "trainer=null must be options (key: value)."),
    "yaml": (["fit", "--config=broken.yaml"], "config: not a YAML with keys and values"),
    "command": (["fitt"], "there is no command 'fitt'. Did you mean 'fit'?"),
    "nothing": ([], "a command is needed: python train.py fit --config X.yaml."),
    "flag": ([*FIT, "--fresh=true"], "--fresh takes no value. Write --fresh alone, or leave it out."),
    "bare": ([*FIT, "--model.beta"], "--model, or the option below it, needs a value"),
}


def test_every_pattern_is_provoked():
    assert PROVOKED.keys() == PATTERNS.keys()


@pytest.mark.parametrize("name", PROVOKED)
def test_a_pattern_is_found_and_explained(name, in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    Path("dpo.yaml").write_text(YAML)
    Path("group.yaml").write_text(YAML.replace("path: ./model", "path: ./model, dtpe: float32"))
    Path("other.yaml").write_text(YAML.replace("DPO", "torch.nn.Linear"))
    popen = "{path: ./model}, optimizer: {class_path: subprocess.Popen}"
    Path("popen.yaml").write_text(YAML.replace("{path: ./model}", popen))
    Path("unnamed.yaml").write_text(YAML.replace("class_path: DPO", "class_pth: DPO"))
    Path("broken.yaml").write_text("model: [1")
    reports: list[str] = []
    explain = parser.explain

    def watched(report, of):
        reports.append(report)
        return explain(report, of)

    monkeypatch.setattr(parser, "explain", watched)
    args, begins = PROVOKED[name]
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2
    assert any(found[name] for found in FINDING.finditer(reports[0]))
    assert capsys.readouterr().err.startswith(f"error: {begins}")
