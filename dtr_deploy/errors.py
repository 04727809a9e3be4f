"""Errors a user can cause, each with the exit code of `dtr-deploy` it leads to.

Every message is one line that names the file, the key and what would be accepted; the command line prints it without a
traceback (`--debug` shows it).
"""


class DtrError(Exception):
    """Base of all errors with a message meant for a person."""

    exit_code = 1


class UsageError(DtrError):
    """Wrong input: a recipe, a file, a model or an engine that is not there. Exit code 1."""

    exit_code = 1


class TargetNotMet(DtrError):
    """No layout reaches the recipe's target. Exit code 2."""

    exit_code = 2


class ParityFailed(DtrError):
    """An exported model does not compute what was trained. Exit code 3."""

    exit_code = 3
