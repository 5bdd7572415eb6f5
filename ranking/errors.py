"""Errors meant for the person at the terminal: one line that says what was wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """Wrong input or set-up. Programs print it as one line and exit with exit_code; it is never a stack trace."""

    exit_code = 1


class Refused(InputError):
    """Nothing is wrong with the input: what was measured of it is not good enough."""

    exit_code = 3


class DataError(InputError):
    """A row or file that does not hold what its table promises.

    path: the file; row: 1-based number of the first bad row, None if the whole file is unreadable; reason: what is
    wrong.
    """

    def __init__(self, path: str | Path, reason: str, row: int | None = None):
        self.path, self.reason, self.row = str(path), reason, row
        where = self.path if row is None else f"{self.path}, row {row}"
        super().__init__(f"{where}: {reason}")
