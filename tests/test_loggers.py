"""metrics.csv, over runs and resumes."""

from lit_align.loggers import MetricsCSV, read_metrics


def log(folder, *rows):
    logger = MetricsCSV(folder)
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.save()


def test_columns_may_come_later_and_values_come_back(tmp_path):
    log(tmp_path, (0, {"loss": 1.5, "epoch": 0}), (3, {"reward": 0.1 + 0.2}))
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "loss": 1.5}, {"step": 3, "reward": 0.1 + 0.2}]


def test_a_resumed_run_replaces_what_came_behind_its_checkpoint_and_keeps_the_rest(tmp_path):
    log(tmp_path, *((step, {"loss": step}) for step in range(5)))
    log(tmp_path, (2, {"loss": 20}), (3, {"loss": 30}))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (1, 1), (2, 20), (3, 30)]


def test_a_new_run_in_the_same_folder_begins_anew(tmp_path):
    log(tmp_path, (0, {"loss": 1}), (1, {"loss": 2}))
    log(tmp_path, (0, {"loss": 3}))
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "loss": 3}]
    assert read_metrics(tmp_path / "none.csv") == []
