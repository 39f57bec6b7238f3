"""The error this package raises on purpose."""


class UserError(ValueError):
    """A message for the person at the keyboard: it names the key, the value and the mend.

    The command line prints it as a paragraph and exits with code 2; any other exception keeps its traceback.
    """
