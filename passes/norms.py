"""Which parameters of a layer are its norms and scales: vectors that are no bias of a product."""

from __future__ import annotations

from torch import fx

from depthc.ir.axes.ops import op_name
from depthc.ir.axes.ports import PRODUCTS
from depthc.ir.program import Block


def norm_slots(block: Block) -> frozenset[int]:
    """The numbers of the parameter slots that are vectors and belong to no product."""
    slots = block.body.placeholders_of("param")
    return frozenset(i for i, node in enumerate(slots) if len(node.meta["input"].type.shape) == 1 and not _bias(node))


def _bias(node: fx.Node) -> bool:
    """Whether a vector is added to a product."""
    return any(
        op_name(user) in PRODUCTS
        or (
            op_name(user) == "add"
            and any(op_name(n) in PRODUCTS for n in user.all_input_nodes if n.op != "placeholder")
        )
        for user in node.users
    )
