"""Rows of a stream, and their norm in the same pass."""

from depthc.codegen.kernels.gather_norm.op import applies, gather_norm
from depthc.codegen.kernels.gather_norm.reference import gather_norm_reference

__all__ = ["applies", "gather_norm", "gather_norm_reference"]
