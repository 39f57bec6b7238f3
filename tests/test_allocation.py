"""Freed memory stays with the process where glibc would give it back."""

import os
import platform
import subprocess
import sys

import pytest

from lit_align import allocation
from lit_align.allocation import keep_freed_memory, keeps_freed_memory
from lit_align.objectives import SFT
from lit_align.objectives.memory import memory_line
from lit_align.policy import PolicyConfig

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")

FAULTS_OF_TEN_BLOCKS = """
import resource
from lit_align.allocation import keep_freed_memory, keeps_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(32 << 20)
print(int(keeps_freed_memory()), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEPT_AFTER_A_COMMAND = """
from lit_align.allocation import keeps_freed_memory
from lit_align.cli import main
try:
    main(["rounds", "show", "none"])
finally:
    print(keeps_freed_memory())
"""
PAGES = (32 << 20) // os.sysconf("SC_PAGE_SIZE")


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    """Whether a new process keeps freed memory, and its page faults while it takes and frees a block 10 times."""
    run = [sys.executable, "-c", FAULTS_OF_TEN_BLOCKS]
    output = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | environment).stdout
    kept, faults = map(int, output.split())
    return bool(kept), faults


def test_a_block_that_is_freed_and_taken_again_faults_once():
    kept, faults = kept_and_faults()
    assert kept
    assert faults < 2 * PAGES


@pytest.mark.parametrize("variable", ["LIT_ALIGN_KEEP_MEMORY", "MALLOC_TRIM_THRESHOLD_"])
def test_users_can_have_the_memory_given_back(variable):
    kept, faults = kept_and_faults(**{variable: "0"})
    assert not kept
    assert faults > 9 * PAGES


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocation, "_kept", False)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    assert not keeps_freed_memory()


def test_the_command_line_keeps_memory_and_the_header_says_so(tiny_model, monkeypatch):
    run = subprocess.run([sys.executable, "-c", KEPT_AFTER_A_COMMAND], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "True"

    module = SFT(PolicyConfig(tiny_model))
    module.configure_model()
    for kept in (False, True):
        monkeypatch.setattr(allocation, "_kept", kept)
        assert memory_line(module).endswith("and freed memory stays with the process") == kept
