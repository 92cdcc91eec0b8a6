"""The logit of every token by a linear router."""

from depthc.codegen.kernels.score.op import applies, score_rows
from depthc.codegen.kernels.score.reference import score_reference

__all__ = ["applies", "score_reference", "score_rows"]
