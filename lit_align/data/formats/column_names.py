"""Columns that several layouts know by these names. `a|b` is either; the first that a row fills is read."""

CHATS = "messages|conversations|conversation|dialog|dialogue|trajectory"
QUESTIONS = "instruction|question|query|problem|input|context"
PROMPT_BESIDE = f"{CHATS}|{QUESTIONS}"
"""Columns that hold a prompt if none is named `prompt`."""
ANSWERS = "completion|response|output|answer|solution"
"""Columns that hold the one response to a prompt."""
RESPONSES = "responses|completions|answers|candidates|generations|outputs"
