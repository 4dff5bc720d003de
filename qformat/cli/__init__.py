"""The command line: ``main`` runs one command; each command is a thin call of a function of the same name."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any


def main() -> None:
    """Run the command of ``sys.argv`` and leave with its exit code."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy multiplies little here; threads cost a start
    import typer

    from qformat.errors import UsageError

    from . import run
    from .commands import app

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt: exit 75, and nothing lost
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the Hub's client is imported
    if "--quiet" in sys.argv or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    wrong_usage: Any = typer.BadParameter.__mro__[1]  # its base class, which typer gives no name
    try:
        app(standalone_mode=False)
    except wrong_usage as error:
        if not sys.argv[1:]:
            error.show()  # the help text
            sys.exit(2)
        run.fail(UsageError(error.format_message(), hint="--help lists what there is"), "--json" in sys.argv)
