"""Processes of this host, and its cores."""

import os
import subprocess
import sys

from lit_align.running import usable_cores


def test_where_the_system_does_not_name_the_cores_all_are_used(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS lacks it
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores() == [0, 1, 2]


def test_windows_is_refused_with_a_way_out():
    code = "import sys; sys.platform = 'win32'; import lit_align"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "lit_align needs Linux or macOS. On Windows, use it within WSL 2." in done.stderr
