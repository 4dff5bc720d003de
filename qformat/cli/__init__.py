"""The command line: ``main`` runs one command; each command is a thin call of a function of the same name."""

from __future__ import annotations


def main() -> None:
    from .commands import app

    app()
