"""The one exception of our own: a failure while running that is not the user's setting."""


class RunError(RuntimeError):
    """A run cannot go on (NaN loss, torn checkpoint, disk full): the message says what to do.

    Bad settings raise `ValueError` instead. The command line turns a `ValueError` into exit code 2
    and a `RunError` into exit code 1, each with one line on stderr.
    """
