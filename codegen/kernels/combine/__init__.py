"""Rows back into their stream, gated."""

from depthc.codegen.kernels.combine.op import applies, combine, combine_
from depthc.codegen.kernels.combine.reference import combine_reference, inverse_of

__all__ = ["applies", "combine", "combine_", "combine_reference", "inverse_of"]
