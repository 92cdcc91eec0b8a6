"""Functions: the bodies of a program as private functions in the torch dialect."""

from __future__ import annotations

from typing import Any

from torch import fx

from depthc.ir.body import Body
from depthc.ir.errors import MlirError
from depthc.ir.mlir.trace import NOTHING, Sizes, trace


class Functions:
    """Imports graphs into a module, each as one private function."""

    def __init__(self, module: Any, sizes: Sizes = NOTHING) -> None:
        from torch_mlir.extras.fx_importer import FxImporter

        self._sizes = sizes
        self._importer = FxImporter(module=module)

    def add_body(self, body: Body, name: str) -> Any:
        """A body as the function `name` of its values, parameters and constants.

        Raises:
            MlirError: an op has no MLIR form; names the op, the body and the line of the model's source.
        """
        return self.add(trace(body, name, self._sizes), name)

    def add(self, made: fx.GraphModule, name: str) -> Any:
        """A traced graph as the function `name`."""
        for node in made.graph.nodes:
            node.meta.pop("tensor_meta", None)  # the importer prefers it, and it knows no symbols
        try:
            return self._importer.import_stateless_graph(made.graph, func_name=name, func_visibility="private")
        except Exception as error:
            raise MlirError(
                "torch-mlir cannot import a body",
                where=f"body {name!r}",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                remedy="write this part of the model with other ops",
            ) from error
