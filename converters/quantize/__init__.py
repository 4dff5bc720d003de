"""Quantizing dense weights: which (``select``), how (``recipe``), one weight (``weight``), a model (``job``)."""
