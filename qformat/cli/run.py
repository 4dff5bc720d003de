"""Running a command: its exit code, its error line, its JSON, its progress."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from qformat.errors import InterruptedJob, QformatError, SurroundingsError, one_line

Report = dict[str, Any]
EXTRAS = {  # package -> the extra that brings it
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "transformers",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "huggingface_hub": "hub",
}
LINE_SECONDS = 10  # between progress lines where there is no terminal


def command(work: Callable[[], Report], show: str, as_json: bool, debug: bool) -> None:
    """Do ``work`` and print its report, by the function ``show`` of the module of that name; leave with the exit code
    that belongs to how it ended.

    A report with ``"ok": False`` or a positive ``"failed"`` is a check that failed: exit 3.
    """
    try:
        report = work()
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "run the same command again"
        fail(InterruptedJob("an uninterrupted run", "an interrupt", hint=hint), as_json, debug)
    except MemoryError:
        fail(SurroundingsError("enough memory", "less"), as_json, debug)
    except QformatError as error:
        fail(error, as_json, debug)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        hint = f"pip install 'qformat-weights[{EXTRAS[package]}]'"
        fail(SurroundingsError(f"the package {package}", "none", hint=hint), as_json, debug)
    if as_json:
        json.dump(report, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    else:
        module = importlib.import_module(".show", __package__)  # imports rich: not needed for JSON
        getattr(module, show)(report)
    for problem in report.get("problems", ()):
        print_error(str(QformatError(**problem)), problem["hint"])
    if report.get("ok") is False or report.get("failed"):
        sys.exit(3)


def fail(error: QformatError, as_json: bool, debug: bool = False) -> NoReturn:
    """Tell of an error and leave with its exit code."""
    if debug:
        traceback.print_exc()
    if as_json:
        json.dump({"error": error.as_json()}, sys.stdout)
        sys.stdout.write("\n")
    print_error(str(error), error.hint)
    sys.exit(error.exit_code)


def print_error(message: str, hint: str = "") -> None:
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {one_line(hint)}\n")


@contextlib.contextmanager
def progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A callback ``(done, total, label)``: a bar with an estimate on a terminal, plain lines elsewhere, None when
    quiet.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[label]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, label="")
        yield lambda done, total, label: bar.update(task, completed=done, total=total, label=label)


def _lines(what: str) -> Callable[[int, int, str], None]:
    started = last = time.monotonic()

    def line(done: int, total: int, label: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS or not done:
            return
        last = now
        left = (now - started) * (total - done) / done
        sys.stderr.write(f"{what}: {100 * done // total} %, about {left:.0f} s left, {label}\n")
        sys.stderr.flush()

    return line
