"""The line that a phase prints at its end, and texts that are printed unchanged."""

from types import SimpleNamespace

from lit_align import console


def test_a_phase_reports_the_pace_of_its_own_work(monkeypatch, capsys):
    """40 of 100 were done before; 60 in 30 s are 120 a minute."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with console.phase("sample", 100, "prompts (40 stored before)", done=40) as running:
        running.advance(60)
        now[0] += 30
    with console.phase("score", 100, "prompts") as running:
        running.advance(100)
        now[0] += 0.01
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  sample          100/100 prompts (40 stored before) · 30.0 s · 120 a minute"
    assert second == "  score           100/100 prompts · 0.0 s"


def test_text_that_looks_like_markup_is_shown_unchanged(capsys):
    text = "[INST] hello [/INST] [b]bold[/b] :smile:"
    console.print_line(text)
    console.print_field("prompt", text)
    with console.phase("[b]", 1, text) as running:
        running.advance(note=text)
    assert capsys.readouterr().out.count(text) == 4
