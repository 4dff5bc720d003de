"""Reports as a person reads them. Every function takes the report that ``--json`` prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qformat.errors import one_line

from .run import print_error

Report = dict[str, Any]


def _console() -> Console:
    return Console(highlight=False)


def _table(*headers: str, right: int = 0) -> Table:
    """A plain table; the last ``right`` columns hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number >= len(headers) - right else "left", overflow="fold")
    return table


def _safe(text: str) -> str:
    """Names from a file may hold markup and escape sequences."""
    return escape(one_line(text))


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _count(number: int) -> str:
    power = min((len(str(number)) - 1) // 3, 3)
    return f"{number / 1000**power:.3g} {'kMG'[power - 1]}" if power else str(number)


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def _summary(report: Report) -> None:
    console = _console()
    table = _table("packed as", "shape", "label", "weights", "stored bits", right=2)
    groups = Counter((w["codec"], tuple(w["shape"]), w["label"], w["stored_bits"]) for w in report["weights"])
    for (codec, shape, label, bits), count in groups.items():
        table.add_row(codec, " x ".join(map(str, shape)), label, str(count), _bits(bits))
    if groups:
        console.print(table)
    console.print(
        f"{report['format']}: {_size(report['bytes'])}, {_bits(report['stored_bits'])} stored bits a packed weight"
    )
    coverage = report["coverage"]
    if coverage:
        left = coverage["left_out"]
        names = f": {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}" if left else ""
        ends = f"{coverage['consumed']} consumed + {coverage['passed']} passed through + {len(left)} left out{names}"
        console.print(_safe(f"source tensors: {coverage['tensors']} = {ends}"))


def _files(report: Report) -> None:
    for file in report["files"]:
        if file["fate"] == "left out":
            _console().print(_safe(f"left out: {file['name']}, {file['why']}"))


def packed(report: Report) -> None:
    inspected(report)
    if report["resumed"]:
        _console().print(f"resumed: {report['resumed']} weights of an interrupted run were kept")
    _console().print(f"{report['seconds']:.1f} s")


def converted(report: Report) -> None:
    _console().print(_safe(f"from {report['from']} ({report['because']})"))
    packed(report)
    if proof := report["proof"]:
        weights, by_formula = proof["weights"], proof["by_formula"]
        compared = f"{_count(proof['values'])} of {_count(proof['of'])} values decoded again"
        equal = f"the formula of {report['from']}" if by_formula == weights else "the source"
        partly = f", {by_formula} weights by its formula" if 0 < by_formula < weights else ""
        _console().print(
            f"proof: {weights} weight{'s' if weights > 1 else ''}, {compared}: all equal to {equal}{partly}",
            soft_wrap=True,
        )


def inspected(report: Report) -> None:
    for note in report["notes"]:
        _console().print(_safe(f"note: {note}"))
    _files(report)
    _summary(report)


def verified(report: Report) -> None:
    if report["ok"]:
        _console().print(f"ok: {report['weights']} packed weights, {report['tensors']} tensors, nothing wrong")


def evaluated(report: Report) -> None:
    table = _table("", "packed", "reference", right=2)
    table.add_row("perplexity", f"{report['perplexity']:.4f}", _number(report["reference_perplexity"], ".4f"))
    if report["kl"] is not None:
        low, high = report["kl_ci95"]
        table.add_row("KL, nats", f"{report['kl']:.5f} [{low:.5f}, {high:.5f}]", "0")
        table.add_row("top-1 agreement", f"{report['top1']:.4f}", "1")
    table.add_row("stored bits", _bits(report["stored_bits"]), "")
    table.add_row(
        "bytes", _size(report["bytes"]), _size(report["reference_bytes"]) if report["reference_bytes"] else "-"
    )
    _console().print(table)
    _console().print(_safe(f"{report['tokens']} tokens of {report['text']}"))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def exported(report: Report) -> None:
    _console().print(
        _safe(f"{report['path']}: {_size(report['onnx_bytes'])} beside {_size(report['bytes'])} of shards")
    )


def pushed(report: Report) -> None:
    for note in report["notes"]:
        _console().print(_safe(f"note: {note}"))
    for file in report["files"]:
        _console().print(_safe(f"{file['name']}: {_size(file['bytes'])}"))
    for name in report["deleted"]:
        _console().print(_safe(f"removed: {name}, of an earlier model"))
    what = "nothing sent" if report["dry_run"] else report["url"] if report["changed"] else "already there"
    _console().print(_safe(f"{report['repo']}, {report['revision']}: {_size(report['bytes'])}, {what}"))


def pulled(report: Report) -> None:
    for name in report["left_out"]:
        _console().print(_safe(f"left out: {name}; --all takes everything"))
    checked = f"checksums of {report['checked']} of {report['shards']} shards compared"
    _console().print(_safe(f"{report['path']}: {_size(report['bytes'])} from {report['repo']}, {checked}"))


def codecs(report: Report) -> None:
    table = _table("codec", "what it is", "native", "triton")
    for row in report["codecs"]:
        table.add_row(row["name"], row["what"], _yes(row["native"]), _yes(row["triton"]))
    _console().print(table)
    _console().print("tables: " + ", ".join(report["tables"]))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def conformance(report: Report) -> None:
    counts = Counter((row["codec"] or "-", row["decoder"], row["result"]) for row in report["cases"])
    table = _table("codec", "decoder", "passed", "failed", "skipped", right=3)
    for codec, decoder in dict.fromkeys((row["codec"] or "-", row["decoder"]) for row in report["cases"]):
        table.add_row(codec, decoder, *(str(counts[codec, decoder, kind]) for kind in ("passed", "failed", "skipped")))
    _console().print(table)
    for row in report["cases"]:
        if row["result"] == "failed":
            print_error(f"{row['case']}: {row['decoder']}: {row['problem']}")
    _console().print(f"{report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped")


def doctor(report: Report) -> None:
    table = _table("", "found", "")
    for row in report["rows"]:
        table.add_row(row["what"], _safe(row["found"]), _safe(row["note"]))
    _console().print(table)
