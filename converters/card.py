"""``card``: the model card of a packed model, README.md on the Hub."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from qformat import sources
from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError, QformatError

from .report import summary

CARD = "README.md"
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the base model's card
BODY = """
# {title}

{base} with qformat: {bits:.3f} stored bits a packed weight (codes, scales, tables and padding together),
{size:.1f} MB of weights in all.

| packed as | weights | shape | stored bits | label |
| --- | --- | --- | --- | --- |
{rows}

`bit-exact`, `value-exact`: the values of the checkpoint it was converted from; `quantized`: rounded anew.

## Use it

Without `import qformat` transformers returns a model of random weights, with no more than a warning.

transformers:

```python
# pip install 'qformat-weights[transformers,hub]'
import qformat

model = qformat.load("{repo}")
```

ONNX Runtime:

```sh
# pip install 'qformat-weights[onnx,hub]'
qformat export {repo} ONNX --to onnx    # ONNX/model.onnx beside the packed weights
```

NumPy alone:

```python
# pip install 'qformat-weights[hub]'
import qformat

checkpoint = qformat.open("{repo}")
values = checkpoint[next(iter(checkpoint))].decode()
```

## Recipe

```json
{recipe}
```
"""


def card(opened: Checkpoint, repo: str, base_model: str | None = None) -> tuple[str, list[str]]:
    """The text of the card, and notes on what it lacks. A README.md in the folder stays as it is but for the metadata
    that it lacks; :class:`DamagedError` where that cannot be read. ``base_model``: by default where the model was
    converted from.
    """
    from huggingface_hub import ModelCard, ModelCardData

    assert opened.manifest is not None
    notes: list[str] = []
    base = base_model or str(opened.manifest.provenance.get("origin", "")).partition("@")[0]
    metadata: dict[str, Any] = {"library_name": "qformat", "tags": ["qformat"]}
    if base:
        kept, base = _of_base(base, base_model is not None, notes)
        metadata |= {**kept, "base_model": base, "base_model_relation": "quantized"}
    else:
        notes.append("the card names no base model: --base-model does")
    if (opened.path / CARD).is_file():
        try:
            own = ModelCard.load(opened.path / CARD)
        except Exception as error:  # of the YAML parser, or of whatever meets what it made
            raise DamagedError("a card with metadata in YAML", str(error), file=opened.path / CARD) from None
        lacking = {key: value for key, value in metadata.items() if getattr(own.data, key, None) in (None, [])}
        if not lacking:
            return own.content, notes
        data = ModelCardData(**{**own.data.to_dict(), **lacking})
        text = f"---\n{data.to_yaml()}\n---\n{own.text}"
    else:
        data = ModelCardData(**metadata)
        text = f"---\n{data.to_yaml()}\n---\n{_body(opened, repo, base)}"
    if not data.license:
        notes.append("the card names no license")
    return text, notes


def _of_base(base: str, told: bool, notes: list[str]) -> tuple[dict[str, Any], str]:
    """What is kept of the card of the base model, and its name: where the model came from is itself a quantized form
    of another, that one's.
    """
    from huggingface_hub import HfApi

    try:
        with sources.asking(sources.parse(base)):
            data = HfApi().model_info(base).card_data
    except QformatError as error:
        notes.append(f"the card of {base} was not read: {error}")
        return {}, base
    found = data.to_dict() if data is not None else {}
    above = found.get("base_model")
    if isinstance(above, list) and len(above) == 1:
        above = above[0]
    if not told and found.get("base_model_relation") == "quantized" and isinstance(above, str):
        base = above
    return {key: found[key] for key in KEPT if key in found}, base


def _body(opened: Checkpoint, repo: str, base: str) -> str:
    report = summary(opened)
    groups = Counter(
        (one["codec"], " x ".join(map(str, one["shape"])), f"{one['stored_bits']:.3f}", one["label"])
        for one in report["weights"]
    )
    assert opened.manifest is not None
    recipe = [
        {key: value for key, value in msgspec.to_builtins(entry).items() if key in ("terms", "rotation") and value}
        for entry in opened.manifest.entries
    ]
    distinct = {json.dumps(one, sort_keys=True): None for one in recipe}
    return BODY.format(
        title=repo.partition("/")[2],
        base=f"`{base}`, packed" if base else "Packed",
        bits=report["stored_bits"] or 0.0,
        size=report["bytes"] / 1e6,
        rows="\n".join(
            f"| {codec} | {count} | {shape} | {bits} | {label} |"
            for (codec, shape, bits, label), count in groups.items()
        ),
        recipe="\n".join(distinct),
        repo=repo,
    )
