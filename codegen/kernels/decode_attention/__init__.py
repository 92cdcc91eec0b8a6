"""Attention of one token to the rows of its caches."""

from depthc.codegen.kernels.decode_attention.op import applies, attend, decode_attention
from depthc.codegen.kernels.decode_attention.reference import reference

__all__ = ["applies", "attend", "decode_attention", "reference"]
