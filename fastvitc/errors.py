"""Errors a user can mend. Each message says what was wrong, what was expected and what to do."""


class FastvitcError(Exception):
    """Base of the library's errors. The command-line programs print the message and exit with `exit_code`."""

    exit_code = 1


class UsageError(FastvitcError, ValueError):
    """The call or command line asks for something that cannot be."""

    exit_code = 2


class DataError(FastvitcError):
    """A data folder or file cannot be used."""


class Interrupted(FastvitcError):
    """A run was asked to stop, and its state is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(FastvitcError):
    """A checkpoint cannot be read, or does not fit what it is to be loaded into."""
