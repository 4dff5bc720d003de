"""Every failure that a user can meet, and the exit code of the command line that goes with it.

    QformatError                 1  a bug of ours, if it ever surfaces bare
    ├── UsageError               2  wrong usage, source not found, target exists
    ├── DamagedError             3  the data is damaged or a check failed
    ├── UnsupportedError         4  understood, but not supported
    ├── SurroundingsError        5  network, disk, memory, permission
    └── InterruptedJob          75  run the same command again to resume

A message is one line: ``FILE: WEIGHT: expected ..., found ...``, then at most one hint.
"""

from __future__ import annotations


class QformatError(Exception):
    exit_code = 1

    def __init__(self, expected: str, found: str = "", *, file: object = "", weight: str = "", hint: str = "") -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found
        self.file, self.weight, self.hint = str(file), weight, hint

    def __str__(self) -> str:
        file, weight, expected, found = map(one_line, (self.file, self.weight, self.expected, self.found))
        what = f"expected {expected}, found {found}" if found else expected
        return ": ".join(part for part in (file, weight, what) if part)

    def located(self, *, file: object = "", weight: str = "") -> QformatError:
        """The same error with the place filled in where it was still unknown; for ``raise error.located(...)``."""
        self.file, self.weight = self.file or str(file), self.weight or weight
        return self

    def as_json(self) -> dict[str, str]:
        return {key: one_line(getattr(self, key)) for key in ("file", "weight", "expected", "found", "hint")}


class UsageError(QformatError):
    exit_code = 2


class DamagedError(QformatError):
    exit_code = 3


class UnsupportedError(QformatError):
    exit_code = 4


class SurroundingsError(QformatError):
    exit_code = 5


class InterruptedJob(QformatError):
    exit_code = 75


def one_line(text: str, limit: int = 400) -> str:
    """Names and values from a file may hold anything: newlines and escape sequences do not reach the terminal."""
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
