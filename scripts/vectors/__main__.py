"""What of ``spec/`` is generated: the schema, the hex dump of the README, the list of tables, and the vectors.

    scripts/spec [--add] [--change] [--check]

writes the first three and compares every vector with its draft. A vector that is missing, differs, or has no draft is
an error: ``--add`` writes those that are missing, ``--change`` rewrites those that differ, and a case that is to go is
removed by hand. ``--check`` writes nothing at all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qformat import codecs, manifest

from . import files
from .case import Draft, files_of, make

SPEC = Path(__file__).resolve().parents[2] / "spec"
DUMP = re.compile(r"(?<=```hexdump\n).*?(?=```)", re.DOTALL)


KINDS = ("files", "manifest", "values", "rotation", *codecs.NAMES)  # a module here and a folder of vectors for each


def drafts() -> list[Draft]:
    modules = [importlib.import_module(f"{__package__}.{kind}") for kind in KINDS]
    return [draft for module in modules for draft in module.drafts()]


def schema() -> str:
    return json.dumps(manifest.schema(), indent=1) + "\n"


def readme() -> str:
    """The README with the hex dump of the vector that it shows."""
    lines = files.dump(SPEC / "vectors" / "files" / "example" / "input.safetensors")
    return DUMP.sub(lambda _: "\n".join(lines) + "\n", (SPEC / "README.md").read_text())


def list_of_tables() -> str:
    """The page about the named tables, a row for each."""
    rows = []
    for path in sorted((SPEC / "tables").glob("*.json")):
        table = json.loads(path.read_text())
        sizes = f"{len(table['entries'])} | {len(table['entries'][0])} | `{table['dtype']}`"
        rows.append(
            f"| `{path.stem}` | {sizes} | "
            + " | ".join(table[k].replace("|", "\\|") for k in ("what", "source"))
            + " |"
        )
    page = (SPEC / "tables" / "README.md").read_text()
    head, rule, _ = page.partition("| --- | --- | --- | --- | --- | --- |\n")
    return head + rule + "\n".join(rows) + "\n"


def differs(fresh: Path, stored: Path) -> bool:
    def contents(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in [*files_of(folder), folder / "case.json"]}

    return contents(fresh) != contents(stored)


def vectors(every: list[Draft], add: bool, change: bool, work: Path) -> Iterator[str]:
    """Bring the folder of vectors up to date as far as allowed; what remains is told."""
    root = SPEC / "vectors"
    for draft in every:
        fresh, stored = work / draft.name, root / draft.name
        make(draft, fresh)
        if not stored.exists():
            if not add:
                yield f"{draft.name}: missing (--add writes it)"
                continue
        elif differs(fresh, stored):
            if not change:
                yield f"{draft.name}: differs (--change rewrites it)"
                continue
            shutil.rmtree(stored)
        else:
            continue
        shutil.copytree(fresh, stored)
    known = {draft.name for draft in every}
    for path in sorted(root.glob("*/*/")):
        if (name := path.relative_to(root).as_posix()) not in known:
            yield f"{name}: no draft makes it"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/spec", description="Regenerate or check what of spec/ is generated.")
    parser.add_argument("--add", action="store_true", help="write vectors that are missing")
    parser.add_argument("--change", action="store_true", help="rewrite vectors that differ")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would be written")
    options = parser.parse_args()
    every = drafts()
    allowed = not options.check
    with tempfile.TemporaryDirectory() as work:
        problems = list(vectors(every, options.add and allowed, options.change and allowed, Path(work)))
    generated = {"manifest.schema.json": schema(), "README.md": readme(), "tables/README.md": list_of_tables()}
    for name, text in generated.items():
        path = SPEC / name
        if not path.exists() or path.read_text() != text:
            if allowed:
                path.write_text(text)
            else:
                problems.append(f"{name}: differs from what is generated")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(every)} vectors, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
