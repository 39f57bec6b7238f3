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
    logger = MetricsCSV(tmp_path)
    logger.resume({"rows": 2, "pending": None})
    logger.log_metrics({"loss": 20}, 2)
    logger.save()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (1, 1), (2, 20)]


def test_a_new_run_drops_the_rows_of_an_earlier_one(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (1, {"loss": 2}))
    log(tmp_path, (0, {"loss": 3}))
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "loss": 3}]
    assert read_metrics(tmp_path / "none.csv") == []


def test_the_row_that_a_checkpoint_still_has_to_log_is_kept_with_it(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (1, {"round/seconds_train": 2}), (1, {"loss": 4}), (2, {"loss": 5}))
    logger = MetricsCSV(tmp_path)
    logger.resume({"rows": 2, "pending": {"step": 1, "loss": 7, "epoch": 0}})
    logger.log_metrics({"round/reward": 6}, 1)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 0, "loss": 1},
        {"step": 1, "round/seconds_train": 2},
        {"step": 1, "loss": 7, "epoch": 0},
        {"step": 1, "round/reward": 6},
    ]


def test_a_fresh_run_that_logs_late_keeps_no_earlier_rows(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (3, {"loss": 2}))
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 3}, 6)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 6, "loss": 3}]
