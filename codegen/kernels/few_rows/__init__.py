"""Linear maps of a few rows, several at once."""

from depthc.codegen.kernels.few_rows.op import FEW, MOST, SECTIONS, WIDEST, applies, few_rows_linear

__all__ = ["FEW", "MOST", "SECTIONS", "WIDEST", "applies", "few_rows_linear"]
