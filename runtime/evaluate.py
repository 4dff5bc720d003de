"""``evaluate``: how far a model's predictions are from those of its dense original, on held-out text.

The recipe is that of ``examples/tiny-llama/reference.json``: consecutive windows, each run alone from position 0, no
``<s>``, float32; every prediction of a window but the first token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qformat import sources, tables
from qformat.checkpoint import Checkpoint
from qformat.errors import UsageError

BATCH = 4  # windows run together
RESAMPLES = 1000


def evaluate(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    window: int = 512,
    tokens: int = 100_000,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """The report that ``qformat eval --json`` prints. ``kl`` is the mean over predictions of KL(reference ‖ source)
    in nats, ``kl_ci95`` a bootstrap over windows; they, ``top1`` and ``reference_perplexity`` are None without a
    reference.
    """
    opened = sources.open(source)
    against = sources.open(reference) if reference is not None else None
    path = Path(text) if text is not None else tables.resource("examples/heldout.txt")
    model = _model(opened)
    other = _model(against) if against is not None else None
    windows = _windows(opened, path, window, tokens)
    rows: list[np.ndarray] = []
    for batch in _batches(windows):
        rows.append(_measure(model, other, batch))
        if progress is not None:
            done = sum(len(part) for part in rows)
            progress(done, len(windows), f"window {done} of {len(windows)}")
    loss, reference_loss, divergence, agreement = np.concatenate(rows).T
    weights = list(opened.values())
    elements = sum(int(np.prod(weight.shape)) for weight in weights)
    with_reference = other is not None
    return {
        "kl": float(divergence.mean()) if with_reference else None,
        "kl_ci95": _interval(divergence) if with_reference else None,
        "perplexity": float(np.exp(loss.mean())),
        "reference_perplexity": float(np.exp(reference_loss.mean())) if with_reference else None,
        "top1": float(agreement.mean()) if with_reference else None,
        "tokens": int(windows.size),
        "predictions": int(len(windows) * (window - 1)),
        "text": str(path),
        "stored_bits": 8 * sum(weight.nbytes for weight in weights) / elements if elements else None,
        "bytes": opened.nbytes,
        "reference_bytes": against.nbytes if against is not None else None,
    }


def _model(opened: Checkpoint) -> Any:
    import torch
    import transformers

    from . import huggingface

    transformers.utils.logging.disable_progress_bar()  # this job has its own
    if opened.manifest is not None:
        return huggingface.load(opened.path, dtype=torch.float32)
    if opened.settings is not None:
        raise UsageError(
            "a qformat or dense model", "another scheme", file=opened.path, hint="`qformat convert` brings it in"
        )
    return transformers.AutoModelForCausalLM.from_pretrained(opened.path, dtype=torch.float32).eval()


def _windows(opened: Checkpoint, path: Path, window: int, tokens: int) -> np.ndarray:
    """Token ids int64 [windows, window]."""
    from tokenizers import Tokenizer

    if not (opened.folder / "tokenizer.json").is_file():
        raise UsageError("tokenizer.json beside the weights", "none", file=opened.path)
    if not path.is_file():
        raise UsageError("a text file", "none", file=path)
    tokenizer = Tokenizer.from_file(str(opened.folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids[:tokens], np.int64)
    count = len(ids) // window
    if not count:
        raise UsageError(f"a text of at least {window} tokens", str(len(ids)), file=path)
    return ids[: count * window].reshape(count, window)


def _batches(windows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(windows), BATCH):
        yield windows[start : start + BATCH]


def _measure(model: Any, other: Any, windows: np.ndarray) -> np.ndarray:
    """Means over the predictions of each window: loss, reference loss, divergence, agreement: float64 [windows, 4]."""
    import torch

    ids = torch.from_numpy(windows)
    out = torch.zeros(len(windows), 4, dtype=torch.float64)
    with torch.no_grad():  # not inference_mode: what layers share of a product goes by the versions of tensors
        log_q = _log_probabilities(model, ids)
        target = ids[:, 1:, None]
        out[:, 0] = -log_q.gather(-1, target).squeeze(-1).double().mean(dim=1)
        if other is not None:
            log_p = _log_probabilities(other, ids)
            out[:, 1] = -log_p.gather(-1, target).squeeze(-1).double().mean(dim=1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
            out[:, 2] = divergence.mean(dim=1)
            out[:, 3] = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(dim=1)
    return out.numpy()


def _log_probabilities(model: Any, ids: Any) -> Any:
    """float32 [windows, window - 1, vocabulary]."""
    import torch

    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return torch.log_softmax(logits[:, :-1].float(), dim=-1).cpu()


def _interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean over windows."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]
