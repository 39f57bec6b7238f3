"""The study's statistics against hand calculation and simulation; its page from a miniature, to the byte."""

from pathlib import Path

import numpy as np
import pytest

from data.quickstart import Snippet
from studies.papers import analyse, prepare
from studies.papers.analyse import TABLES, page
from studies.papers.cells import (
    BETAS,
    LEARNING_RATES,
    SEEDS,
    Arm,
    Cell,
    Trial,
    choose,
    counted_cells,
    read_arms,
    settings,
    tuning_cells,
)
from studies.papers.comparison import Frontier, MeanTest, at_equal_kl, bootstrap_interval, holm, standard_error
from studies.papers.hypotheses import CLAIMS, MPO_PAIRS, SECONDARY, Study, findings, forgets_less, is_closed
from studies.papers.laws import predicted_shares
from studies.papers.results import Result, chosen, write_rows

HERE = Path(__file__).parent
ARMS = read_arms()
PROMPTS = 16


# --- a miniature of the results ---


def write_miniature(folder: Path, seeds: int, effect: float = 0.0) -> Study:
    """Results of all tuning cells and of some seeds; the gold reward of the iterative arms is greater by `effect`."""
    generator = np.random.default_rng(1)
    for cell in [*tuning_cells(ARMS), *counted_cells(ARMS, seeds)]:
        setting = settings()[cell.trial or 0]
        start = generator.normal(size=(2, PROMPTS))
        rows = []
        for place, step in enumerate((9, 18, 27, 32), 1):
            gain = place * (0.1 + effect * cell.arm.name.startswith("iterative"))
            gold, proxy = start + gain + generator.normal(size=(2, PROMPTS))
            for prompt in range(PROMPTS):
                own = {"step": step, "prompt": prompt, "gold": gold[prompt], "proxy": proxy[prompt]}
                own |= {"gold_start": start[0, prompt], "proxy_start": start[1, prompt]}
                rows.append(own | {"log_ratio": 0.7 * place, "length": 9 + prompt % 3, "length_start": 10})
        write_rows(folder, cell.name, rows)
        nll = {"start": 3.0, "end": 3.0 + 0.1 * generator.random() - 0.2 * (cell.arm.name == "mpo")}
        Result(
            arm=cell.arm.name,
            seed=cell.seed,
            trial=cell.trial,
            lr=setting.lr,
            beta=setting.beta,
            commit="0123456789",
            prepared="abcdef",
            machine="a machine",
            seconds=100.0,
            cpu_seconds=90.0,
            series={"kl_by_round": [0.0, 0.7, 1.4, 2.1], "gradient_scale": [setting.beta / 2] * 32},
            diversity={"end": {"distinct_2": 0.9}},
            forgetting={"news": nll, "tweets": nll},
            best_of_n={"2": {"kl": 0.19, "gold": 0.4, "proxy": 0.5}},
        ).write(folder, cell.name)
    return Study(folder, ARMS)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write_miniature(tmp_path_factory.mktemp("results"), seeds=2)


def test_the_miniature_gives_its_page_to_the_byte(miniature):
    template = "\n\n".join(f"{{{{{name}}}}}" for name in TABLES) + "\n"
    assert page(miniature, template) == (HERE / "miniature.md").read_text()


def test_the_page_names_every_table_once():
    template = (analyse.HERE / "page.md").read_text()
    assert all(template.count(f"{{{{{name}}}}}") == 1 for name in TABLES)


def test_an_open_study_gives_neither_p_values_nor_verdicts(miniature):
    assert not is_closed(miniature)
    lines = TABLES["hypotheses"](miniature).splitlines()[2:]
    assert len(lines) == 6
    assert all(line.endswith("| – | open |") for line in lines)


def test_a_closed_study_finds_a_real_difference_and_mpos_forgetting(tmp_path):
    study = write_miniature(tmp_path, seeds=len(SEEDS), effect=1.0)
    assert is_closed(study)
    lines = TABLES["hypotheses"](study).splitlines()[2:]
    verdicts = {line[2:4]: line.split("|")[-2].strip() for line in lines}
    assert verdicts["H1"] == "supported"
    assert verdicts["H2"] == "contradicted"  # only the iterative arms gain more
    assert verdicts["H4"] == verdicts["H5"] == "not shown"
    assert forgets_less(study).forgetting.mean == pytest.approx(0.2, abs=0.05)  # type: ignore[union-attr]
    assert len(findings(study)) == 5


def test_every_pair_that_is_compared_has_its_arms():
    pairs = [*(pair for _, each in CLAIMS.values() for pair in each), *MPO_PAIRS, *SECONDARY]
    assert {name for pair in pairs for name in pair} <= set(ARMS)


def test_a_failed_run_has_the_value_of_the_start(tmp_path):
    study = write_miniature(tmp_path, seeds=2)
    Result("pr_dpo_1", 2, None, 1e-4, 0.1, "0123456789", "abcdef", "a machine", 1.0, 1.0, failed="nan").write(
        tmp_path, "pr_dpo_1-2"
    )
    differences, _ = Study(tmp_path, ARMS).differences([("pr_dpo_1", "iterative_dpo")])
    wins = study.frontiers["wins"]["iterative_dpo", 2]
    np.testing.assert_allclose(differences[1], 0.5 - wins.values[-1])


# --- statistics ---


def test_a_frontier_is_interpolated_where_it_first_reaches_a_kl():
    run = Frontier(np.array([0.0, 4.0, 1.0, 9.0]), np.array([[0.5], [0.7], [0.4], [0.8]]))
    assert run.at(0.0) == [0.5]
    assert run.at(1.0) == pytest.approx([0.6])  # half of the way in √KL, before the step back
    assert run.at(4.0) == pytest.approx([0.7])
    assert run.at(6.25) == pytest.approx([0.4 + 0.4 * (2.5 - 1) / (3 - 1)])
    other = Frontier(np.array([0.0, 1.0]), np.array([[0.5], [0.5]]))
    difference, kl = at_equal_kl(run, other)
    assert (difference.item(), kl) == (pytest.approx(0.1), 1.0)
    with pytest.raises(ValueError, match="reaches a KL of 1, not 2"):
        other.at(2.0)


def test_the_standard_error_is_that_of_random_seeds_and_prompts():
    """Var = 0.5/S + 0.3/P + 1/(SP), from the simulation's own components; the intervals cover the mean in 95 %."""
    S, P = 5, 40
    generator = np.random.default_rng(0)
    errors, covered, means = [], 0, []
    for _ in range(2000):
        parts = generator.normal(size=(S, 1)) * 0.5**0.5 + generator.normal(size=(1, P)) * 0.3**0.5
        test = MeanTest.of(parts + generator.normal(size=(S, P)))
        errors.append(test.error**2)
        means.append(test.mean)
        covered += test.low <= 0 <= test.high
    law = 0.5 / S + 0.3 / P + 1 / (S * P)
    assert np.mean(errors) == pytest.approx(law, rel=0.05)
    assert np.var(means) == pytest.approx(law, rel=0.1)
    assert 0.935 < covered / 2000 < 0.975


def test_one_column_gives_students_test_over_seeds():
    values = np.array([[0.1], [0.3], [0.2], [0.6]])
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2)


def test_holm_corrects_by_rank():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_bootstrap_resamples_seeds_and_prompts():
    values = np.array([0.0, 1.0, 0.0, 1.0])[:, None] * np.ones((1, 50))
    low, high = bootstrap_interval(values)
    assert (low, high) == (0.0, 1.0)  # four seeds, all else equal


# --- choices that are made before ---


def test_every_arm_is_tuned_over_the_same_latin_hypercube():
    found = settings()
    assert len({setting.lr for setting in found}) == len({setting.beta for setting in found}) == len(found) == 4
    assert all(LEARNING_RATES[0] <= setting.lr <= LEARNING_RATES[1] for setting in found)
    assert all(BETAS[0] <= setting.beta <= BETAS[1] for setting in found)


def test_the_best_trial_within_the_kl_cap_is_chosen(tmp_path):
    trials = [Trial(gold=1.0, kl=3.0), Trial(gold=5.0, kl=11.0), Trial(gold=2.0, kl=9.0), Trial()]
    assert choose(trials) == 2
    assert choose([Trial(gold=1.0, kl=30.0), Trial(gold=0.0, kl=20.0), Trial()]) == 1
    arm = Arm("a", "pairs", {})
    assert chosen(tmp_path, {"a": arm}) == {}, "no tuning cell has run"
    assert Cell(arm, 1).prompts.endswith("test.jsonl")


def test_no_sentence_is_in_two_parts():
    snippets = [Snippet(number % 9 - 4.0, f"Sentence number {number} about a film") for number in range(9500)]
    parts, rest = prepare.split(snippets)
    texts = [snippet.text for part in [*parts.values(), rest] for snippet in part]
    assert len(texts) == len(set(texts)) == 9500
    assert {name: len(part) for name, part in parts.items()} == prepare.PARTS
    better = {snippet.text: snippet.rating for snippet in snippets}
    for pair in prepare.preferences(parts["preferences"]):
        assert better[pair["chosen"]] - better[pair["rejected"]] >= 1


def test_the_bandit_predicts_growing_shares_of_the_last_rounds_kl():
    for proximal, moving in ((1.0, False), (4.0, False), (0.0, True)):
        shares = predicted_shares(proximal, moving)
        assert shares == sorted(shares)
        assert shares[-1] == 1
    assert predicted_shares(0.0, moving=False) == pytest.approx([1, 1, 1, 1])
