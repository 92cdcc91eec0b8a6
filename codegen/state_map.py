"""The map of a rewrite over state dicts: what every parameter of a program is made of, and what nothing reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from depthc.ir.cost.layers import owner_of
from depthc.ir.params import Expr, Mean, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Program
from depthc.ir.text.printer import expr_text
from depthc.ir.types import DTYPE_NAMES

SAME = "same"


def state_map(program: Program, captured: Program) -> dict[str, Any]:
    """What every parameter of a program is made of, as data that `json.dumps` takes.

    It speaks of a program as a recipe made it: `settle` and `compile` evaluate the expressions, and what is made is a
    weight of its own from then on. `captured` is the program that the recipe began with.

    Returns:
        "parameters": by state-dict name, each with "shape", "dtype" (as in program text), "kind" ("parameter",
        "frozen", "buffer" that is saved, "constant" buffer that is not), "from": "same" where it is the weight of its
        name, else the expression as program text writes it, and "ties": the other names of the same tensor.
        "unread": the captured model's names that no parameter takes its value from.

    Example:
        >>> import torch, depthc
        >>> from depthc.passes.pipeline import run_recipe
        >>> from depthc.passes.recipe import Recipe
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> program = depthc.capture(model, (torch.ones(2, 5, 4),))
        >>> tied, _ = run_recipe(program, Recipe.parse('tie(loops=2, init="average")'))
        >>> found = state_map(tied, program)
        >>> found["parameters"]["0.bias"]["from"]
        'mean(ref("0.bias"), ref("2.bias"))'
        >>> found["unread"]
        []
    """
    owners: dict[Any, list[str]] = {}
    for name, param in program.params.items():
        owners.setdefault(_tensor(name, param.expr), []).append(name)
    parameters = {}
    for name, param in program.params.items():
        parameters[name] = {
            "shape": list(param.type.sizes({})),
            "dtype": DTYPE_NAMES[param.type.dtype],
            "kind": param.kind,
            "from": SAME if param.expr in (None, Ref(name)) else expr_text(param.expr),  # type: ignore[arg-type]
            "ties": [other for other in owners[_tensor(name, param.expr)] if other != name],
        }
    read = {source for name, param in program.params.items() for source in sources(param.expr or Ref(name))}
    tensors = {owner_of(captured, name) for name in read if name in captured.params}
    unread = [name for name in captured.params if owner_of(captured, name) not in tensors]
    return {"parameters": parameters, "unread": unread}


def _tensor(name: str, expr: Expr | None) -> tuple[str, str]:
    """What tells two tensors apart: a weight is one tensor under all its names, all else is made for each name."""
    if expr is None or isinstance(expr, Ref):
        return "weight", name if expr is None else expr.name
    return "made", name


def sources(expr: Expr) -> Iterator[str]:
    """The names of the weights that an expression reads.

    Example:
        >>> list(sources(Mean((Ref("a"), Ref("b")))))
        ['a', 'b']
    """
    match expr:
        case Ref(name=name):
            yield name
        case Mean(terms=terms):
            for term in terms:
                yield from sources(term)
        case Svd(a=a, b=b):
            yield from (*sources(a), *sources(b))
        case Shuffle(term=term) | Tile(term=term):
            yield from sources(term)
