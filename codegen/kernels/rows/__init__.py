"""Rows out of a stream and back."""

from depthc.codegen.kernels.rows.op import named, spread_rows, take_rows

__all__ = ["named", "spread_rows", "take_rows"]
