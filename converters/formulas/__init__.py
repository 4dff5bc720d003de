"""The arithmetic of each foreign scheme as its authors have it: what the values of a conversion are held against.

A module a scheme, under the name of its importer, with ``rows(source, item, start, stop)``: rows [start, stop) of the
matrices as codecs see them, one below another (``[prod(stack) * out, in]``, padding included), float32. Where there is
a rotation they are those of the stored matrix. ``start`` and ``stop`` are multiples of 128, or the end. It reads no
more of the source than it needs, and uses no codec and nothing that the importer made.
"""
