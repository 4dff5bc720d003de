"""No codec is half there. Its files are counted in ``test_tree``, the table of its page is held against its layout in
``test_spec``, its kernels against its definition in ``kernels/``; here are its vectors, its encoder, and random bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import codecs, conformance
from qformat.converters.quantize.weight import encoder
from qformat.dtypes import NUMPY, Array
from qformat.errors import QformatError, UnsupportedError

CASES = conformance.find()


def presets(name: str) -> list[dict[str, Any]]:
    """Every term that ``quantize`` may write with this codec, all widths from 1 to 8 bits."""
    found: dict[str, dict[str, Any]] = {}
    for bits in range(1, 9):
        for rotated in (False, True):
            try:
                terms = codecs.preset(name, bits, rotated, {})
            except UnsupportedError:
                continue
            found |= {repr(term): term for term in terms}
    return list(found.values())


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_codec_has_vectors_of_each_kind(name: str) -> None:
    own = [case.facts for case in CASES if case.name.startswith(f"{name}/")]
    assert {facts.group for facts in own} >= {"valid", "invalid"}
    cuts = [cut for facts in own for cut in facts.slices]
    assert {cut.axis for cut in cuts if cut.error is None} == {0, 1}
    decoded = [term for facts in own if facts.group != "invalid" for entry in facts.entries for term in entry["terms"]]
    usual = {key for term in presets(name) for key in term}
    assert any(term.keys() - usual for term in decoded)  # uncommon: of params that ``quantize`` leaves alone


@pytest.mark.parametrize("name", codecs.NAMES)
def test_what_the_encoder_writes_decodes(name: str) -> None:
    """Each preset, on a matrix of the smallest shape and on one of several units. Encoders that are fast equal those of
    the codecs, which the codecs' own tests hold them against.
    """
    terms = presets(name)
    assert terms
    for term in terms:
        codec, params = codecs.read_params(term)
        rows, cols = codec.units(params)
        for shape in ((rows, cols), (3 * rows, 2 * cols)):
            weight = np.random.default_rng(0).standard_normal(shape, np.float32)
            parts = encoder(codec)(params, weight)
            layout = {part.name: (NUMPY[str(part.dtype)], part.shape) for part in codec.layout(params, shape)}
            assert {part: (array.dtype, array.shape) for part, array in parts.items()} == layout
            codec.check(params, shape, parts)
            decoded = codec.decode(params, shape, parts)
            assert decoded.dtype == np.float32 and decoded.shape == shape
            assert ((decoded - weight) ** 2).mean() < (weight**2).mean()  # better than zeros


@pytest.mark.parametrize("name", codecs.NAMES)
@given(data=st.data())
def test_random_bytes_decode_or_are_refused(name: str, data: st.DataObject) -> None:
    """Every part of nothing but random bytes: a value for each element, or a named error; the same each time."""
    codec, params = codecs.read_params(data.draw(st.sampled_from(presets(name))))
    rows, cols = codec.units(params)
    shape = rows * data.draw(st.integers(1, 3)), cols * data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    parts: dict[str, Array] = {}
    for part in codec.layout(params, shape):
        parts[part.name] = np.frombuffer(rng.bytes(part.nbytes), NUMPY[str(part.dtype)]).reshape(part.shape)
    try:
        codec.check(params, shape, parts)
    except QformatError:
        return
    with np.errstate(all="ignore"):
        first, second = (codec.decode(params, shape, parts) for _ in range(2))
    assert first.dtype == np.float32 and first.shape == shape
    assert np.array_equal(first.view(np.uint32), second.view(np.uint32))
