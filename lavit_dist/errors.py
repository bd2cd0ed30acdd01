"""The exceptions that entry points tell in one sentence: what a user can get wrong, and what befell a run from outside."""


class UserError(Exception):
    """A mistake in a setting, a file or a command line.

    The message is one sentence that names the setting or file, what was found, what is legal and what to do.
    Entry points print it and exit with code 2; every other exception but `Fault` is a defect of this program.
    """


class Fault(Exception):
    """Something outside of the program failed: a machine, a network, a disk. Starting again may go well.

    The message is one sentence, too. Entry points print it and exit with code 1.
    """


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
