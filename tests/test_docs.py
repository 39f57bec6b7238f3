"""Commands in the documentation exist as they are written: every option of them parses, every file is there."""

import re
import shlex
from pathlib import Path

import pytest

from lit_align.cli import COMMANDS, AlignCLI

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = [line for page in PAGES for block in BLOCK.findall(page.read_text()) for line in block.splitlines()]


@pytest.mark.skipif(not (ROOT / "data/quickstart/judge").exists(), reason="`make install` prepares data/quickstart")
@pytest.mark.parametrize("command", RUN)
def test_a_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "train.py", "fit"]
    AlignCLI(words[3:], run=False)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere_and_commands_are_known(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for command in re.findall(r"lit-align ([a-z]+)", text):
        assert command in COMMANDS
