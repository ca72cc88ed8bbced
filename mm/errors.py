"""Errors that a user can act on. The command line prints them as one line; everything else is a bug and keeps its traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do, in one line."""


class ConfigError(UserError):
    """A configuration file, key or override is wrong."""


class DataError(UserError):
    """A data source cannot be read as what it claims to be."""


class CheckpointError(UserError):
    """A checkpoint or model folder is missing, damaged or of another shape."""


class BadSample(Exception):  # noqa: N818 - it describes the sample; most are counted, not raised to the user
    """One sample cannot be used. The loader counts it by ``cause`` and puts a substitute in its slot.

    Args:
        cause: Short, countable category: ``"truncated"``, ``"too many pixels"``, ``"unknown format"``, ``"missing text"``, ...
        where: Source name and position of the sample, for the log.
    """

    def __init__(self, cause: str, where: str = "") -> None:
        super().__init__(f"{cause} ({where})" if where else cause)
        self.cause = cause
        self.where = where

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:
        return type(self), (self.cause, self.where)
