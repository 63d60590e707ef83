"""The error types of the package; they know nothing of what raises them."""


class InputError(ValueError):
    """A mistake in what the caller handed in, said in one line: what, where, both values, what to do.

    The command line prints the line and exits with code 2.
    """


class RunError(RuntimeError):
    """A run that could not go on for a reason outside its input (a full disk, a signal), said in one line.

    The command line prints the line and exits with code 1.
    """


class DivergedError(RunError):
    """A loss or gradient that is not finite: the same run again would end at the same place."""
