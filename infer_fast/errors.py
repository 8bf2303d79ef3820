"""The one exception that a user is meant to read."""


class InferFastError(Exception):
    """Something the user can put right. Its text is one sentence: what was given, what was expected, what to do."""


class DiskError(InferFastError):
    """A file could not be written; nothing that was there before is lost."""
