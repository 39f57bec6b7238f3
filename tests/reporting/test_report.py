"""Reports of runs: from files alone, with nothing of a response but its text."""

import io
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lit_align.cli import main
from lit_align.console import console
from lit_align.errors import UserError
from lit_align.evaluation.rows import HeldOutRow, ScoredRow, write_held_out
from lit_align.evaluation.summary import (
    DataComparison,
    Diversity,
    Forgetting,
    PartSummary,
    ScorerSummary,
    Summary,
)
from lit_align.metrics.win_rate import Estimate
from lit_align.model_card import model_card
from lit_align.objectives.saved import SavedObjective
from lit_align.policy import PolicyConfig
from lit_align.reporting import report
from lit_align.reporting.page import number
from lit_align.reporting.plots import run_plots
from lit_align.reporting.run_folder import Run
from lit_align.reporting.run_record import RunRecord, RunStart
from lit_align.reporting.terminal import print_summary

HOSTILE = '</td><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> $\\frac$ \u202eabc\x00'


def held_out(seed: int, shift: float = 0.0, count: int = 40, identity: str = "a") -> list[HeldOutRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(count):
        rewards, start = (torch.randn(2, generator=generator) + shift).tolist(), torch.randn(2).tolist()
        win_rate = sum(x > y for x in rewards for y in start) / 4
        rows.append(
            HeldOutRow(
                source=f"p:{place}",
                prompt=f"Prompt {place} {HOSTILE}",
                prompt_ids=[7],
                responses=[HOSTILE, "fine"],
                responses_start=["before", "that"],
                response_ids=[[1] * 5, [1] * 7],
                response_ids_start=[[1] * 4] * 2,
                finished=[True, True],
                finished_start=[True, True],
                logps=[-1.0, -2.0],
                logps_start=[-2.0, -3.0],
                scorers=[ScoredRow(name, identity + name, rewards, start, win_rate) for name in ("training", "judge")],
            )
        )
    return rows


def make_run(folder: Path, seed: int, shift: float = 0.0, identity: str = "a", finished: float = 0.9) -> Path:
    rows = held_out(seed, shift, identity=identity)
    for name in ("test", "validation-000004", "validation-000008"):
        write_held_out(folder / "held_out" / f"{name}.parquet", rows)
    scored = ScorerSummary(
        identity=f"{identity}training",
        reward_start=Estimate(0.0, -0.1, 0.1),
        reward_end=Estimate(shift, shift - 0.1, shift + 0.1),
        win_rate=Estimate(0.6, 0.5, 0.7),
        win_rate_ties_as_wins=0.65,
        win_rate_length_controlled=Estimate(0.55, 0.5, 0.6),
    )
    grade = PartSummary(Estimate(3.0, 2.75, 3.25), Estimate(3.5, 3.25, 3.75))
    judged = replace(scored, identity=f"{identity}judge", parts={"coherence": grade})
    Summary(
        prompts=40,
        responses_per_prompt=2,
        kl_from_start=Estimate(1.0, 0.9, 1.1),
        length_start=4.0,
        length_end=6.0,
        finished_start=1.0,
        finished_end=finished,
        diversity_start=Diversity(0.5, 0.6, 0.7),
        diversity_end=Diversity(0.4, 0.5, 0.8),
        scorers={"training": scored, "judge": judged},
        forgetting={"books": Forgetting(2.0, 2.5, Estimate(0.5, -0.25, 0.75))},
    ).write(folder)
    (folder / "metrics.csv").write_text(
        "step,train/loss,reference/refreshes,round,round/seconds_sample,val/kl_from_start,val/reward,val/win_rate,"
        "val/win_rate_low,val/win_rate_high,drift/kl_policy_start\n"
        "0,0.7,0,0,2.0,,,,,,\n2,0.6,1,,,,,,,,0.3\n4,0.5,2,1,2.5,0.5,0.2,0.6,0.5,0.7,0.6\n8,0.4,4,,,1,0.4,0.7,0.6,0.8,1\n"
    )
    (folder / "config.yaml").write_text(f"model: {HOSTILE!r}\n")
    header = [("objective", f"DPO {HOSTILE}"), ("", "more"), ("scorer", f"{identity}training")]
    starts = [
        RunStart("2026-01-02 03:04 UTC", "train.py fit --a-b=<1>", 0),
        RunStart("2026-01-03 03:04 UTC", "again", 4),
    ]
    RunRecord(header, starts).write(folder)
    return folder


class Tags(HTMLParser):
    """Tags, their attributes, and what is open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "script" not in [tag for tag, _ in tags.tags]
    assert all(attrs["src"].startswith("data:") for tag, attrs in tags.tags if tag == "img")
    assert not any(name.startswith("on") or name == "href" for _, attrs in tags.tags for name in attrs)
    assert "\u202e" not in page
    assert "\x00" not in page
    return tags


def test_a_report_has_all_plots_and_shows_hostile_text_as_text(tmp_path):
    run = make_run(tmp_path / "a_$run", seed=0, shift=0.5)
    page = report.write_report(run).read_text()
    tags = check_page(page)
    names = {attrs["alt"] for tag, attrs in tags.tags if tag == "img"}
    assert names == {"loss", "drift", "reward", "frontier", "win_rate", "seconds", "lengths"}
    assert {path.stem for path in (run / "plots").glob("*.png")} == names
    assert "&lt;script&gt;alert(1)" in page
    assert 'data-head="step 4"' in page
    for what in ("coherence, judge", "3.50<small>3.25 to 3.75<", "nats per token of books", "−0.2500 to +0.7500"):
        assert what in page
    assert page == report.write_report(run).read_text(), "the same run gives the same bytes"


def test_a_report_opens_with_the_run_and_the_verdict_in_words(tmp_path):
    run = make_run(tmp_path / "run", seed=0, shift=0.5)
    page = report.write_report(run).read_text()
    check_page(page)
    opening = page.partition("<figure>")[0]
    for piece in ("objective", "; more", "8 optimizer steps in 2 rounds", "40 × 2 responses", "train.py fit"):
        assert piece in opening
    assert '<span class="option">--a-b=&lt;1&gt;</span>' in opening
    assert "resumed at step 4" in opening
    assert "win 60.0% of the comparisons" in opening
    assert page.count("<figcaption>") == page.count("<img")
    assert "n/a" not in page
    cut = report.write_report(make_run(tmp_path / "cut", seed=0, finished=0.1)).read_text()
    assert "Only 100% of the start" in cut
    assert 'data-head="at equal length">n/a' in cut


def test_the_start_of_held_out_rewards_is_drawn(tmp_path):
    run = Run(make_run(tmp_path / "run", 0), "run")
    (figure,) = [figure for name, figure in run_plots(run) if name == "reward"]
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "val/reward"]
    steps, rewards = line.get_xdata(), line.get_ydata()
    start = [reward for row in run.validations[4] for reward in row.scorers[0].rewards_start]
    assert [*steps] == [0, 4, 8]
    assert rewards[0] == pytest.approx(sum(start) / len(start))


def test_seconds_are_drawn_in_the_round_that_they_belong_to(tmp_path):
    """Three rounds of four steps: sampled at their beginning, evaluated after the second alone, and within it."""
    (tmp_path / "metrics.csv").write_text(
        "step,round/seconds_sample,val/seconds,round/seconds_train\n"
        "0,1,,\n4,,,9\n4,2,,\n6,,5,\n8,,6,\n8,,,9\n8,3,,\n12,,,9\n12,4,,\n"
    )
    (figure,) = [figure for name, figure in run_plots(Run(tmp_path, "run")) if name == "seconds"]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in figure.axes[0].containers}
    assert widths == {"sample": [1, 2, 3, 4], "train": [9, 9, 9, 0], "held-out": [0, 11, 0, 0]}


def test_refreshes_are_marked_where_their_count_goes_up(tmp_path):
    marks = Run(make_run(tmp_path / "run", 0), "run").marks()
    assert marks["reference refreshed"][1] == [2, 4, 8]
    assert marks["new round"][1] == [4]


def test_several_runs_are_compared_in_one_file(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, seed=1, shift=shift)) for name, shift in (("a", 0.0), ("b", 1.0))]
    main(["compare", *runs, "--out", str(tmp_path / "both.html")])
    printed = capsys.readouterr().out
    assert "both.html" in printed
    assert all(len(line) <= 80 for line in printed.splitlines()[:-1]), "but for the report's path"
    assert "Prompt by prompt" in printed
    assert printed.count("< 0.001") == 2
    page = (tmp_path / "both.html").read_text()
    check_page(page)
    assert page.count("&lt; 0.001") == 2, "by the training scorer and by the judge"
    assert re.search(r"<span>−1\.0+<small>−1\.\d+ to −[01]\.\d+<", page)
    assert "3.50<small>3.25 to 3.75\nfrom 3.00\n2.75 to 3.25<" in page


def test_rewards_of_different_scorers_are_not_paired(tmp_path):
    runs = [make_run(tmp_path / name, seed=1, identity=name) for name in ("a", "b")]
    page = report.compare(report.compared_runs(runs), tmp_path / "both.html").read_text()
    assert "no scorer in common" in page
    assert "A beats B" not in page
    assert "training: atraining" in page, "scorers with the same name are distinguished"
    assert "training: btraining" in page
    third = make_run(tmp_path / "c", seed=2, identity="a")
    page = report.compare(report.compared_runs([*runs, third]), tmp_path / "three.html").read_text()
    assert page.count('data-head="A beats B"') == 2, "a against c, by two scorers"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["compare", "one"], "at least two runs"),
        (["compare", "one", "./one/"], "./one/ is named twice"),
        (["compare", "nowhere", "else"], "nowhere: not a run's folder"),
        (["report"], "the following arguments are required: RUN"),
    ],
)
def test_errors_are_one_paragraph(in_tmp, capsys, command, said):
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_run_without_a_verdict_cannot_be_compared(tmp_path):
    run = make_run(tmp_path / "a", 0)
    (run / "summary.json").unlink()
    for win_rate, needs_options in (("win_rate: null", True), ("win_rate:\n  prompts: p.jsonl", False)):
        (run / "config.yaml").write_text(f"seed_everything: 1\n{win_rate}\n")
        with pytest.raises(UserError, match=r"python train\.py test --config") as error:
            report.compared_runs([run, make_run(tmp_path / "b", 0)])
        assert ("--win_rate.prompts=PATH" in str(error.value)) == needs_options


def test_commands_in_messages_write_to_the_folder_that_they_name(tmp_path):
    run = make_run(tmp_path / "my run", 0)
    (run / "summary.json").write_text("{}")
    with pytest.raises(UserError) as error:
        report.write_report(run)
    words = shlex.split(str(error.value).partition("again: ")[2])
    assert words[2:4] == ["test", "--config"]
    assert words[-1] == f"--trainer.default_root_dir={run}"


def test_responses_of_validations_belong_to_their_prompt(tmp_path):
    """A run that is resumed may have other validation prompts."""
    run = make_run(tmp_path / "run", 0)
    rows = [replace(row, prompt=f"Prompt {place}", responses=["first"]) for place, row in enumerate(held_out(0))]
    write_held_out(run / "held_out" / "validation-000004.parquet", rows)
    later = [replace(rows[1], responses=["later"]), replace(rows[0], prompt="another", responses=["new"])]
    write_held_out(run / "held_out" / "validation-000008.parquet", later)
    page = report.write_report(run).read_text()
    table = page.partition("During training")[2].partition("Test prompts")[0]
    shown = re.findall(r'data-head="step 8">([^<]*)<', table)
    assert shown[:3] == ["–", "later", "–"]


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(0.5, 0.4, 0.6), "0.50\n0.40 to 0.60"),
        (Estimate(1.2e-7, 1e-7, 1.4e-7), "1.2e−07\n1e−07 to 1.4e−07"),
        (Estimate(-1.2e-7, -1.2e-7, -1.2e-7), "−1.2e−07\n−1.2e−07 to −1.2e−07"),
        (Estimate(0.0, 0.0, 0.0), "0.000\n0.000 to 0.000"),
        (Estimate(1e-9, -1.0, 1.0), "0.00\n−1.00 to 1.00"),
        (Estimate(7.0, 6.9999999, 7.0000001), "7.000000\n7.000000 to 7.000000"),
    ],
)
def test_numbers_have_the_digits_of_their_interval(estimate, shown):
    assert number(estimate) == shown


def test_small_rewards_are_seen_within_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    summary = Run(make_run(tmp_path / "run", 0), "run").summary
    assert summary is not None
    small = replace(summary.training, reward_start=Estimate(-1.2e-7, 0, 0), reward_end=Estimate(3.4e-7, 0, 0))
    print_summary(replace(summary, scorers={"training": small}, kl_from_start=Estimate(-1e-7, 0, 0)))
    said = capsys.readouterr().out
    assert "KL from start 0.00 nats" in said
    assert "-1.2e-07 → 3.4e-07" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_kl_of_filtered_samples_says_so_wherever_it_is(tmp_path, capsys):
    folder = make_run(tmp_path / "run", 0)
    summary = Run(folder, "run").summary
    assert summary is not None
    summary = replace(summary, kl_sampling="temperature 0.7")
    summary.write(folder)
    print_summary(summary)
    page = report.write_report(folder).read_text()
    objective = SavedObjective("DPO", "", "logp", PolicyConfig("base"), None, 0.1, 0.0, None, None)
    for text in (capsys.readouterr().out, page, model_card(objective, {}, folder, False)):
        assert "(sampled at temperature 0.7)" in " ".join(text.split())


def test_the_card_of_another_step_has_no_verdict(tmp_path):
    folder = make_run(tmp_path / "run", 0)
    summary = Run(folder, "run").summary
    assert summary is not None
    replace(summary, step=20).write(folder)
    assert "by the policy of step 20" in report.write_report(folder).read_text()
    objective = SavedObjective("DPO", "", "logp", PolicyConfig("b"), None, 0.1, 0.0, None, None, step=20)
    assert "held-out prompts, against the start" in model_card(objective, {}, folder, False)
    card = model_card(replace(objective, step=10), {}, folder, False)
    assert "against the start" not in card
    assert "This model is of step 10. The run's results on held-out prompts are of step 20." in card


def test_a_comparison_with_the_data_looks_at_the_lengths_of_the_data(tmp_path, capsys):
    folder = make_run(tmp_path / "run", 0)
    summary = Run(folder, "run").summary
    assert summary is not None
    rate = Estimate(0.6, 0.5, 0.7)
    for gap, shown in ((3.0, "n/a"), (0.2, "60.0%")):
        data = DataComparison(rate, rate, 0.6, rate, gap)
        scorers = {name: replace(each, data=data) for name, each in summary.scorers.items()}
        print_summary(replace(summary, scorers=scorers))
        assert shown in capsys.readouterr().out.partition("own responses")[2]


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_plots(tmp_path):
    runs = [make_run(tmp_path / f"{'x' * 150}{end}", seed) for seed, end in enumerate("ab")]
    page = report.compare(report.compared_runs(runs), tmp_path / "all.html").read_text()
    check_page(page)


def test_a_table_has_whole_numbers_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 40)
    print_summary(Run(make_run(tmp_path / "run", 0), "run").summary)
    said = capsys.readouterr().out
    assert "…" not in said
    assert "trai" in said


def test_an_output_that_is_not_unicode_gets_escapes(tmp_path, monkeypatch):
    runs = [str(make_run(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main(["compare", *runs, "--out", str(tmp_path / "all.html")])
    assert b"0.000 \\u2192 0.000" in written.getvalue()
    assert b"-----" in written.getvalue()
