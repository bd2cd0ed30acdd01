"""The one exception type for what a user can get wrong."""


class UserError(Exception):
    """A mistake in a setting, a file or a command line.

    The message is one sentence that names the setting or file, what was found, what is legal and what to do.
    Entry points print it and exit with code 2; every other exception is a defect of this program.
    """


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
