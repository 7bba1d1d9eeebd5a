"""Readers of weights that other libraries packed: each packed tensor as a lazy array of plain numbers.

`methods` says by what a source is quantized and whether spqt can unpack that; `find` says which stored
tensors stand for which weights. What is unpacked equals the publishing library's own unpacking, to its
last rounding (tests/data/packed). Nothing here knows models or layouts.
"""
