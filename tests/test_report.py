"""Reports of runs: from files alone, with nothing of a response but its text, and paired tests against scipy's."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from lit_align.cli import main
from lit_align.errors import UserError
from lit_align.reporting import report

HOSTILE = '</td><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> $\\frac$ \u202eabc\x00'


def held_out(seed: int, shift: float = 0.0, count: int = 40) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(count):
        rewards, start = (torch.randn(2, generator=generator) + shift).tolist(), torch.randn(2).tolist()
        row = {"source": f"p:{place}", "prompt": f"Prompt {place} {HOSTILE}", "responses": [HOSTILE, "fine"]}
        row |= {"responses_start": ["before", "that"], "lengths": [5, 7], "lengths_start": [4, 4]}
        row |= {"logps": [-1.0, -2.0], "logps_start": [-2.0, -3.0], "rewards": rewards, "rewards_start": start}
        row["win_rate"] = sum(x > y for x in rewards for y in start) / 4
        rows.append(row | {"rewards_judge": rewards, "rewards_start_judge": start})
    return rows


def make_run(folder: Path, seed: int, shift: float = 0.0) -> Path:
    (folder / "held_out").mkdir(parents=True)
    rows = held_out(seed, shift)
    for name in ("test", "validation-000004", "validation-000008"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "held_out" / f"{name}.parquet")
    scored = {"reward_start": 0.0, "reward_end": shift, "win_rate": 0.6, "win_rate_low": 0.5, "win_rate_high": 0.7}
    grade = {"coherence_start": 3.0, "coherence_end": 3.5, "coherence_end_low": 3.25, "coherence_end_high": 3.75}
    summary = scored | {"kl_from_start": 1.0, "judge": scored | grade}
    forgetting = {"nll_start": 2.0, "nll_end": 2.5, "change_low": -0.25, "change_high": 0.75}
    summary |= {"length_start": 4.0, "length_end": 6.0, "forgetting": {"books": forgetting}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text(
        "step,train/loss,reference/refreshes,round,round/seconds_sample,val/kl_from_start,val/reward,val/win_rate,"
        "val/win_rate_low,val/win_rate_high,drift/kl_policy_start\n"
        "0,0.7,0,0,2.0,,,,,,\n2,0.6,1,,,,,,,,0.3\n4,0.5,2,1,2.5,0.5,0.2,0.6,0.5,0.7,0.6\n8,0.4,4,,,1,0.4,0.7,0.6,0.8,1\n"
    )
    (folder / "config.yaml").write_text(f"model: {HOSTILE!r}\n")
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


def test_a_report_has_all_pictures_and_shows_hostile_responses_as_text(tmp_path):
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


def test_refreshes_are_marked_where_their_count_goes_up(tmp_path):
    marks = report.Run(make_run(tmp_path / "run", 0), "run").marks()
    assert marks["reference refreshed"][1] == [2, 4, 8]
    assert marks["new round"][1] == [4]


def test_several_runs_are_compared_in_one_file(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, seed=1, shift=shift)) for name, shift in (("a", 0.0), ("b", 1.0))]
    main(["compare", *runs, "--out", str(tmp_path / "both.html")])
    assert "both.html" in capsys.readouterr().out.replace("\n", "")
    page = (tmp_path / "both.html").read_text()
    check_page(page)
    assert page.count("&lt; 0.001") == 2, "by the training scorer and by the judge"
    assert re.search(r"<span>−1\.0+<small>−1\.\d+ to −[01]\.\d+<", page)
    assert "3.50<small>3.25 to 3.75\nfrom 3.00<" in page


def test_the_paired_test_is_scipys(tmp_path):
    a, b = held_out(1), held_out(2, shift=0.2)
    ours = report.paired_comparison(a, b)
    assert ours is not None
    means = [[sum(row["rewards"]) / 2 for row in rows] for rows in (a, b)]
    theirs = stats.permutation_test(
        means,
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
    )
    assert ours["p"] == pytest.approx(theirs.pvalue, abs=0.02)
    assert ours["difference"] == pytest.approx(theirs.statistic)
    wins = [
        sum((x > y) + 0.5 * (x == y) for x in m["rewards"] for y in n["rewards"]) / 4 for m, n in zip(a, b, strict=True)
    ]
    assert ours["win_rate"] == pytest.approx(sum(wins) / len(wins))
    same = report.paired_comparison(a, a)
    assert same is not None
    assert (same["difference"], same["p"], same["win_rate"]) == (0, 1, 0.5)
    assert report.paired_comparison(a, []) is None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["compare", "one"], "at least two runs"),
        (["compare", "nowhere", "else"], "nowhere: no run's folder"),
        (["report"], "the following arguments are required: RUN"),
    ],
)
def test_what_is_wrong_is_one_paragraph(in_tmp, capsys, command, said):
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
    with pytest.raises(UserError, match=r"python train\.py test --config"):
        report.compare([run, make_run(tmp_path / "b", 0)], tmp_path / "out.html")
