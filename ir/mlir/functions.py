"""Functions: the bodies of a program as private functions in the torch dialect."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.errors import MlirError
from depthc.ir.mlir.trace import NOTHING, Sizes, trace

# Functions on sizes that torch-mlir's importer does not know, as the ops that it has for them.
_SIZE_OPS = {torch.sym_max: torch.ops.prim.max.int, torch.sym_min: torch.ops.prim.min.int}


class Functions:
    """Imports graphs into a module, each as one private function."""

    def __init__(self, module: Any, sizes: Sizes = NOTHING) -> None:
        from torch_mlir.extras.fx_importer import FxImporter, GraphNodeImporter

        class Importer(GraphNodeImporter):
            """Remembers which op it is at."""

            def import_nodes(inner, nodes: Any, **options: Any) -> None:
                super().import_nodes(self._each(nodes), **options)

        self._sizes, self._at = sizes, list[fx.Node]()
        self._importer = FxImporter(module=module, graph_node_importer_cls=Importer)

    def _each(self, nodes: Any) -> Any:
        for node in nodes:
            self._at[:] = [node]
            yield node

    def add_body(self, body: Body, name: str) -> Any:
        """A body as the function `name` of its values, parameters and constants.

        Raises:
            MlirError: an op has no MLIR form; names the op, the body and the line of the model's source.
        """
        return self.add(trace(body, name, self._sizes), name)

    def add(self, made: fx.GraphModule, name: str) -> Any:
        """A traced graph as the function `name`.

        Raises:
            MlirError: torch-mlir cannot import an op; names the op, the body and the line of the model's source.
        """
        for node in made.graph.nodes:
            node.target = _SIZE_OPS.get(node.target, node.target)
            node.meta.pop("tensor_meta", None)  # the importer prefers it, and it knows no symbols
        try:
            return self._importer.import_stateless_graph(made.graph, func_name=name, func_visibility="private")
        except Exception as error:  # whatever torch-mlir raises, it is about the op at hand
            raise self._unimportable(name, error) from error

    def _unimportable(self, name: str, error: Exception) -> MlirError:
        node = self._at[0] if self._at else None
        place = re.search(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "") if node else None
        return MlirError(
            f"the op {node.target if node else name} has no MLIR form",
            where=f"body {name!r}" + (f", {place[1]}:{place[2]}" if place else ""),
            found=next(iter(str(error).strip().splitlines()), type(error).__name__)[:300],
            remedy="write this line of the model with other ops",
        )
