"""The commands and their options. What they print is in ``show``; what they do is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import run

app = typer.Typer(
    name="qformat",
    help="A documented file format for low-bit model weights: pack, convert, check, measure, run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="model folder, safetensors file, or org/name[@revision] on the Hub", show_default=False
    ),
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="folder to write", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]
Debug = Annotated[bool, typer.Option("--debug", help="a traceback with every error")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace DST if it exists")]


def _version(wanted: bool) -> None:
    if wanted:
        import qformat

        typer.echo(f"qformat {qformat.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version and stop")
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    source: Source,
    target: Target,
    codec: Annotated[str, typer.Option(help="one of those that `qformat codecs` lists")] = "trellis",
    bits: Annotated[float, typer.Option(help="bits per weight")] = 4,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any of the codec's params")
    ] = None,
    rotate: Annotated[
        str | None, typer.Option(metavar="hadamard|none|SIZE", help="SIZE: of blocks; default: hadamard for trellis")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="weights to pack besides linear layers")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="weights to leave dense")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pack a dense model."""

    def work() -> dict[str, Any]:
        from qformat.converters.quantize.job import quantize as job

        with run.progress("quantize", quiet) as progress:
            return job(
                source,
                target,
                codec=codec,
                bits=bits,
                settings=parse_settings(setting or []),
                rotate=rotate,
                include=include or (),
                exclude=exclude or (),
                overwrite=overwrite,
                progress=progress,
            )

    run.command(work, "packed", as_json, debug)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is JSON where it is JSON, else a string."""
    from qformat.errors import UsageError

    out: dict[str, Any] = {}
    for one in settings:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise UsageError("--set KEY=VALUE", repr(one))
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


@app.command()
def convert(
    source: Source,
    target: Target,
    to: Annotated[str, typer.Option(help="qformat, dense, gptq, awq, exl3, fp8 or mxfp4")] = "qformat",
    dtype: Annotated[str | None, typer.Option(help="with --to dense: float32, float16, bfloat16")] = None,
    scheme: Annotated[
        str | None, typer.Option("--from", metavar="SCHEME", help="what SRC is, if it is not recognised")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Bring a checkpoint in, or take it out."""

    def work() -> dict[str, Any]:
        from qformat.converters.convert import convert as job

        with run.progress("convert", quiet) as progress:
            return job(source, target, to, dtype=dtype, scheme=scheme, overwrite=overwrite, progress=progress)

    run.command(work, "converted", as_json, debug)


@app.command()
def inspect(source: Source, as_json: AsJson = False, debug: Debug = False) -> None:
    """What a checkpoint holds; reads headers only."""

    def work() -> dict[str, Any]:
        from qformat.converters.report import inspect as job

        return job(source)

    run.command(work, "inspected", as_json, debug)


@app.command()
def verify(source: Source, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check everything that can be checked."""

    def work() -> dict[str, Any]:
        from qformat.converters.report import verify as job

        return job(source)

    run.command(work, "verified", as_json, debug)


@app.command("eval")
def evaluate(
    source: Source,
    reference: Annotated[str | None, typer.Option(help="the dense model to compare with")] = None,
    text: Annotated[Path | None, typer.Option(help="text file; default: the bundled held-out text")] = None,
    window: Annotated[int, typer.Option(min=2, help="tokens of a window, each run alone")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="tokens of the text that are used")] = 100_000,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity, and KL divergence and top-1 agreement with a dense model."""

    def work() -> dict[str, Any]:
        from qformat.runtime.evaluate import evaluate as job

        with run.progress("eval", quiet) as progress:
            return job(source, reference=reference, text=text, window=window, tokens=tokens, progress=progress)

    run.command(work, "evaluated", as_json, debug)


@app.command()
def export(
    source: Source,
    target: Target,
    to: Annotated[str, typer.Option(help="onnx")] = "onnx",
    dtype: Annotated[str, typer.Option(help="of activations")] = "float32",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A runnable model for another runtime, beside the packed weights."""

    def work() -> dict[str, Any]:
        from qformat.errors import UsageError

        if to != "onnx":
            raise UsageError("--to onnx", to)
        from qformat.runtime.ort.export import export as job

        return job(source, target, dtype=dtype, overwrite=overwrite)

    run.command(work, "exported", as_json, debug)


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder that qformat packed", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name[@branch]", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="branch, made where there is none; default: main")] = None,
    private: Annotated[bool, typer.Option("--private", help="make a private repository")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="open a pull request")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be sent, and send nothing")] = False,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="default: where SRC was converted from")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Bring a packed model to the Hub; what is there already is not sent again."""

    def work() -> dict[str, Any]:
        from qformat.converters.hub import push as job

        return job(source, repo, revision=revision, private=private, pr=pr, dry_run=dry_run, base_model=base_model)

    run.command(work, "pushed", as_json, debug)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name[@revision]", show_default=False)],
    target: Target,
    everything: Annotated[
        bool, typer.Option("--all", help="second copies of the weights and other folders, too")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Bring a model from the Hub, its checksums compared."""

    def work() -> dict[str, Any]:
        from qformat.converters.hub import pull as job

        return job(repo, target, everything=everything, overwrite=overwrite)

    run.command(work, "pulled", as_json, debug)


@app.command()
def codecs(as_json: AsJson = False, debug: Debug = False) -> None:
    """The codecs, and what runs them here."""

    def work() -> dict[str, Any]:
        from .here import codecs as job

        return job()

    run.command(work, "codecs", as_json, debug)


@app.command()
def conformance(
    decoder: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="a program to hold against the vectors: CMD INPUT OUTPUT, see spec/vectors"),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Do the decoders that are here decode the specification's vectors, or does another program?"""

    def work() -> dict[str, Any]:
        from .here import conformance as job

        return job(decoder)

    run.command(work, "conformance", as_json, debug)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """What is installed, what is fast, what is missing."""

    def work() -> dict[str, Any]:
        from .here import doctor as job

        return job()

    run.command(work, "doctor", as_json, debug)
