"""Messages for the user: each that refuses a value ends with the fix."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_align.errors import UserError, amount, check_number, decimal

ROOT = Path(__file__).parents[1]
REFUSALS = re.compile(r"\b(must|has no effect|have no effect)\b")


def text_of(node: ast.AST) -> str:
    """A message with N in place of what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "N"


def messages() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "lit_align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"(User|Data|Scorer)Error", ast.unparse(node.func)):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text_of(node.args[0])


def has_fix(message: str) -> bool:
    """Whether a sentence follows the one that refuses."""
    refusal = REFUSALS.search(message)
    return refusal is None or re.search(r"[.:] [A-Z]", message[refusal.end() :]) is not None


def test_a_message_that_refuses_a_value_ends_with_the_fix():
    assert not has_fix("N=N must be at least N.")
    found = [*messages()]
    assert len(found) > 200
    assert [f"{place}: {message}" for place, message in found if not has_fix(message)] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "data.size=0 must be at least 1 and at most 9. Raise it."),
        (10, "data.size=10 must be at least 1 and at most 9. Lower it."),
        (float("nan"), "data.size=nan must be at least 1 and at most 9. Change it."),
    ],
)
def test_the_fix_of_a_number_is_its_direction(value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_number("data.size", value, least=1, most=9)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.25, ".3f", "0.250"),
        (0.0, ".3f", "0.000"),
        (1.2e-7, ".3f", "1.2e-07"),
        (-1.2e-7, ".3f", "-1.2e-07"),
        (1.2e-7, "+.4f", "+1.2e-07"),
        (0.1 + 0.2 - 0.3, ".3f", "0.000"),
        (float("nan"), ".3f", "nan"),
    ],
)
def test_a_small_number_does_not_read_as_0(value, form, shown):
    assert decimal(value, form) == shown


@pytest.mark.parametrize(
    ("count", "what", "shown"),
    [
        (2, "rows", "2 rows"),
        (1, "rows", "1 row"),
        (0, "rows", "0 rows"),
        (1, "empty responses", "1 empty response"),
        (1, "responses with an end token before their end", "1 response with an end token before its end"),
        (1, "groups of other than 3 responses", "1 group of other than 3 responses"),
        (1, "batches", "1 batch"),
        (1, "entries", "1 entry"),
        (1, "tied", "1 tied"),
        (1, "all responses equal or empty", "1 all responses equal or empty"),
        (1.0, "minutes", "1 minute"),
        (0.5, "minutes", "0.5 minutes"),
    ],
)
def test_one_is_in_the_singular(count, what, shown):
    assert amount(count, what) == shown
