"""ONNX Runtime: :mod:`.export` writes a packed model as a graph, :func:`session` runs it from its packed weights."""

from .sessions import session as session
