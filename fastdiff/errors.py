"""The errors that fastdiff raises, and the one sentence pattern that they follow.

Every message reads: *where*: *what is wrong with what was given* (got ...); *what is accepted*; *what to do*.
"""


class FastdiffError(Exception):
    """Base of every error that fastdiff raises on purpose."""


class InvalidArgument(FastdiffError, ValueError):
    """An argument of a public call is of the wrong type, shape, dtype, range, or excludes another argument."""


class InvalidHistory(InvalidArgument):
    """A user's history holds ids that are not in the catalogue, or is not a sequence of ids."""


class CatalogError(InvalidArgument):
    """An operation on the item catalogue names items that it does not hold, or holds twice."""


class DataError(FastdiffError, ValueError):
    """A file of sequences cannot be read; the message names the file and the line."""


class CheckpointError(FastdiffError, ValueError):
    """A checkpoint or its settings do not describe the model that was asked for."""


class BackendUnavailable(FastdiffError, RuntimeError):
    """A backend was named that cannot run here; the message holds the reason and what can."""
