"""One run at a time in a folder, with real processes."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from processes import fork, give_up_privileges
from tiny import write_pairs

from lit_align.cli import main
from lit_align.cli.run_lock import hold
from lit_align.errors import UserError

LOCK = Path("run", "run.lock")


def fit(model: str) -> None:
    options = {
        "model": "SFT",
        "model.policy.path": model,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "data": "OfflinePairs",
        "data.train": "pairs.jsonl",
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": "run",
        "trainer.max_steps": 1,
    }
    main(["fit", *(f"--{key}={value}" for key, value in options.items())])


def test_a_second_run_in_the_folder_of_a_living_one_is_refused(tiny_model, in_tmp, capsys):
    write_pairs(in_tmp)
    held, done = multiprocessing.Event(), multiprocessing.Event()

    def other() -> None:
        with hold("run"):
            held.set()
            done.wait(60)

    holder = multiprocessing.get_context("fork").Process(target=other)
    holder.start()
    assert held.wait(30)
    with pytest.raises(SystemExit) as exit:
        fit(tiny_model)
    done.set()
    holder.join(30)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: trainer.default_root_dir=run is in use: process {holder.pid} on {socket.gethostname()} trains there. "
        "Wait for its end, or name another folder.\n"
    )
    assert not [*Path("run").iterdir()], "the refused run has written nothing, and the first one deleted its lock"
    fit(tiny_model)
    assert Path("run/metrics.csv").exists()
    assert not LOCK.exists()


def test_of_two_runs_that_start_together_one_trains(tiny_model, in_tmp, blank_figures):
    write_pairs(in_tmp)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def start() -> None:
        together.wait(30)
        fit(tiny_model)

    both = [context.Process(target=start) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert {process.exitcode for process in both} == {0, 2}
    assert len(json.loads(Path("run/run.json").read_text())["starts"]) == 1
    assert not LOCK.exists()


def test_a_run_does_not_read_the_lock_while_another_takes_it(in_tmp):
    LOCK.parent.mkdir()

    def start() -> None:
        with hold("run"):
            Path("held").touch()

    run = threading.Thread(target=start)
    folder = os.open("run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as the other run does between reading and writing
    run.start()
    run.join(0.2)
    assert run.is_alive()
    os.close(folder)
    run.join(30)
    assert Path("held").exists()


@pytest.mark.parametrize(
    ("read_only", "said"),
    [
        (".", "run cannot be written: Permission denied"),
        ("run", "run/run.lock cannot be written: Permission denied"),
        ("run/checkpoints", "checkpoints/step=1.ckpt cannot be written: Permission denied"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named(tiny_model, in_tmp, capfd, read_only: str, said: str):
    write_pairs(in_tmp)
    Path(read_only).mkdir(parents=True, exist_ok=True)
    Path(read_only).chmod(0o555)

    def without_privileges() -> None:
        give_up_privileges()
        fit(tiny_model)

    assert fork(without_privileges) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert "name another folder" in error


def test_the_lock_of_a_killed_run_is_taken_over_with_one_line(in_tmp, capsys):
    def killed() -> None:
        with hold("run"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(killed) == -signal.SIGKILL
    pid = json.loads(LOCK.read_text())["pid"]
    with hold("run"):
        assert json.loads(LOCK.read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out == (
        f"run/run.lock: process {pid} has ended without deleting it; this run takes it over\n"
    )
    assert not LOCK.exists()


def test_an_id_that_another_process_has_now_does_not_hold(in_tmp):
    LOCK.parent.mkdir()
    LOCK.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}))
    with hold("run"):
        pass


def test_another_hosts_lock_names_the_file_to_delete(in_tmp):
    LOCK.parent.mkdir()
    LOCK.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1"}))
    with (
        pytest.raises(UserError, match=r"process 7 on elsewhere .* If it has ended, delete run/run\.lock"),
        hold("run"),
    ):
        pass
    LOCK.write_text("{")
    with pytest.raises(UserError, match=r"run/run\.lock cannot be read\. Delete it"), hold("run"):
        pass


def test_an_error_and_a_forked_process_leave_the_right_lock(in_tmp):
    def child() -> None:
        raise SystemExit(3)

    def failing() -> None:
        with hold("run"):
            assert fork(child) == 3
            assert LOCK.exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert not LOCK.exists()
