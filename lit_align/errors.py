"""The error that this package raises on purpose, and how its messages show values and other errors."""

import json
import math
import re
from typing import TypeVar, get_type_hints
from urllib.parse import urlsplit

T = TypeVar("T")


class UserError(ValueError):
    """A message for the user: it names the key, the value and the fix.

    The command line prints it as a paragraph and exits with code 2; any other exception keeps its traceback.
    """


def check_number(
    option: str, value: float | None, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    """Check a number of an option; None passes.

    Raises:
        UserError: it is not finite, below `least`, not above `above`, or above `most`.
    """
    if value is None or (math.isfinite(value) and least <= value <= most and value > above):
        return
    limits = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    limits += [f"at most {most:g}"] if most < math.inf else ["finite"] * (bool(limits) and not math.isfinite(value))
    too_low, too_high = value < least or value <= above, value > most or value == math.inf
    fix = "Raise it" if too_low else "Lower it" if too_high else "Change it"
    raise UserError(f"{option}={value} must be {' and '.join(limits) or 'a finite number'}. {fix}.")


def check_address(option: str, address: str, form: str, secret: str) -> None:
    """Check the HTTP address of a server. One that may hold a secret is not shown.

    Args:
        form: What an address looks like.
        secret: The option that names the environment variable for a secret.

    Raises:
        UserError: it is not an address, or has a user, a password, a query or a fragment.
    """
    try:
        parts = urlsplit(address)
        has_more = bool(parts.username or parts.password or parts.query or parts.fragment)
        is_valid = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:  # a bracket without its pair, a port that is not a number
        has_more, is_valid = "@" in address, False
    if has_more:
        raise UserError(
            f"{option} must not contain a user, password, query or fragment, since addresses are written to logs and "
            f"config.yaml. Put the key into an environment variable and name it: {secret}=NAME."
        )
    if not is_valid:
        raise UserError(f"{option}={address!r} must be an address. Give {form}.")


def check_types(record: T) -> T:
    """Check that the fields of a dataclass or a named tuple that was read from a file have their types.

    Its numbers are counts and shares.

    Raises:
        TypeError: names the first field that does not, or that is a number below 0.
    """
    for name, expected in get_type_hints(type(record)).items():
        value = getattr(record, name)
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        if not fits or (isinstance(value, int | float) and not value >= 0):
            raise TypeError(f"{name} is {shown(value)}")
    return record


def counted(name: str, value: object, least: int = 0) -> int:
    """A count that was read from a file.

    Raises:
        TypeError: it is not an integer, or it is smaller than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TypeError(f"{name} is {shown(value)}")
    return value


_PLURAL = re.compile(r"(?<!all )\b(?:(\w+)ies|(\w+(?:ch|ss))es|(\w*[^s\W])s)\b")


def amount(count: float, what: str) -> str:
    """A count and what it counts: 2 rows too long, 1 row too long.

    Args:
        what: Its first plural is what is counted.
    """
    if count != 1:
        return f"{count:g} {what}" if isinstance(count, float) else f"{count} {what}"
    one = _PLURAL.sub(lambda found: f"{found[1]}y" if found[1] else found[2] or found[3], what, count=1)
    return f"1 {one.replace(' their ', ' its ')}"


def decimal(value: float, form: str = ".3f") -> str:
    """A number in a fixed form, or with two digits where it would read as 0: 0.250, but 1.2e-07."""
    text = f"{value:{form}}"
    is_hidden = float(text) == 0 and abs(value) > 1e-12  # rounding leaves less
    return f"{value:{'+' * form.startswith('+')}.2g}" if is_hidden else text


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shown(value: object, width: int = 80) -> str:
    """Show a value in a message: one line of JSON, cut after `width` characters.

    Characters that cannot be printed, such as those that control a terminal, are escaped.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or thousands of levels
        return f"a value of type {type(value).__name__} that is too large to show"
    text = text[: width + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= width else f"{text[:width]}…"
