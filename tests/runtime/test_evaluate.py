"""``evaluate`` against a calculation of its own from the decoded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.errors import UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DENSE = Path(__file__).parents[2] / "examples" / "tiny-llama"
WINDOW, TOKENS = 128, 1024


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("evaluate") / "packed"
    qformat.quantize(DENSE, target, codec="int", bits=3)
    return target


def probabilities(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float64 [windows, window, vocabulary], one window at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(input_ids=torch.from_numpy(window[None])).logits[0].double() for window in ids]
    return torch.softmax(torch.stack(logits), dim=-1).numpy()


def test_figures_are_those_of_the_decoded_weights(packed: Path, tmp_path: Path) -> None:
    qformat.convert(packed, tmp_path / "decoded", "dense", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DENSE)
    text = (DENSE.parent / "heldout.txt").read_text()
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids[:TOKENS]).reshape(-1, WINDOW)
    p, q = probabilities(DENSE, ids)[:, :-1], probabilities(tmp_path / "decoded", ids)[:, :-1]
    target = ids[:, 1:, None]

    report = qformat.evaluate(packed, reference=DENSE, window=WINDOW, tokens=TOKENS)

    kl = (p * np.log(p / q)).sum(-1).mean()
    assert report["kl"] == pytest.approx(kl, rel=1e-4)
    assert report["kl_ci95"][0] < kl < report["kl_ci95"][1]
    assert report["perplexity"] == pytest.approx(np.exp(-np.log(np.take_along_axis(q, target, -1)).mean()), rel=1e-5)
    assert report["reference_perplexity"] == pytest.approx(
        np.exp(-np.log(np.take_along_axis(p, target, -1)).mean()), rel=1e-5
    )
    assert report["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2 / TOKENS)
    assert report["tokens"] == TOKENS


def test_stored_bits_count_every_byte(packed: Path) -> None:
    report = qformat.evaluate(packed, window=WINDOW, tokens=WINDOW)
    weights = list(qformat.open(packed).values())
    stored = sum(array.nbytes for weight in weights for array in weight.parts.values())
    assert report["stored_bits"] == 8 * stored / sum(int(np.prod(weight.shape)) for weight in weights)
    assert report["bytes"] == sum(path.stat().st_size for path in packed.glob("*.safetensors"))


def test_without_a_reference_there_is_nothing_to_compare(packed: Path) -> None:
    report = qformat.evaluate(packed, window=WINDOW, tokens=WINDOW)
    assert [report[key] for key in ("kl", "kl_ci95", "top1", "reference_perplexity")] == [None] * 4


def test_a_text_too_short_for_one_window_is_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("In the beginning")
    with pytest.raises(UsageError, match="at least 128 tokens"):
        qformat.evaluate(packed, text=tmp_path / "short.txt", window=WINDOW)
