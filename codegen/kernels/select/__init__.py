"""Router logits -> chosen tokens, in order."""

from depthc.codegen.kernels.select.op import applies, select_topk, select_where
from depthc.codegen.kernels.select.reference import Ragged, Selection

__all__ = ["Ragged", "Selection", "applies", "select_topk", "select_where"]
