"""The errors that this package raises on purpose."""


class UserError(ValueError):
    """A message for the person at the keyboard: it names the key, the value and the fix.

    The command line prints it as a paragraph and exits with code 2; any other exception keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
