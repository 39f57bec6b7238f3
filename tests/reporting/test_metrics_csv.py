"""metrics.csv, over runs and resumes."""

from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics


def log(folder, *rows):
    logger = MetricsCSV(folder)
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.save()


def test_columns_may_come_later_and_values_come_back(tmp_path):
    log(tmp_path, (0, {"loss": 1.5, "epoch": 0}), (3, {"reward": 0.1 + 0.2}))
    rows = [{"step": 0, "loss": 1.5, "epoch": 0}, {"step": 3, "reward": 0.1 + 0.2}]
    assert read_metrics(tmp_path / "metrics.csv") == rows


def test_integers_have_no_fraction(tmp_path):
    log(tmp_path, (8, {"round": 2.0, "loss": 1.5, "epoch": 1}))
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,round,loss,epoch", "8,2,1.5,1"]


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    log(tmp_path, *((step, {"loss": step}) for step in range(5)))
    log(tmp_path, (2, {"loss": 20}), (3, {"loss": 30}))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (1, 1), (2, 20), (3, 30)]


def test_a_new_run_drops_the_rows_of_an_earlier_one(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (1, {"loss": 2}))
    log(tmp_path, (0, {"loss": 3}))
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "loss": 3}]
    assert read_metrics(tmp_path / "none.csv") == []


def test_a_run_resumed_at_a_rounds_end_keeps_its_last_steps_rows(tmp_path):
    log(
        tmp_path,
        (0, {"loss": 1}),
        (1, {"round/seconds_train": 2}),
        (1, {"val/reward": 3}),
        (1, {"loss": 4}),
        (2, {"loss": 5}),
    )
    logger = MetricsCSV(tmp_path)
    logger.resumes = True
    for values in ({"round/reward": 6}, {"loss": 7}, {"loss": 8}):
        logger.log_metrics(values, 1)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 0, "loss": 1},
        {"step": 1, "round/seconds_train": 2},
        {"step": 1, "val/reward": 3},
        {"step": 1, "round/reward": 6},
        {"step": 1, "loss": 7},
        {"step": 1, "loss": 8},
    ]


def test_a_fresh_run_that_logs_late_keeps_no_earlier_rows(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (3, {"loss": 2}))
    logger = MetricsCSV(tmp_path)
    logger.resumes = False
    logger.log_metrics({"loss": 3}, 6)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 6, "loss": 3}]
