"""Example arguments of a program: small legal sizes, random weights, random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, product

import torch
from torch import fx

from depthc.codegen.python.pieces import entry, folded
from depthc.ir import sizes
from depthc.ir.errors import StateDictError
from depthc.ir.params import Expr, Init, Mean, Param, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Program, Segment
from depthc.ir.signature import Signature
from depthc.ir.text.fold import line
from depthc.ir.types import Type

aten = torch.ops.aten
_BATCH, _LENGTH, _TRIED = 2, 8, 20_000  # what is wished for, and how many combinations are looked at
# What the lines below assign, and the builtins that they and the printed bodies call.
EXAMPLE = ("gigabytes", "limit", "inputs", "print", "float", "len", "tuple", "slice", "complex", "getattr")
GUARD = """\
gigabytes, limit = {bytes} / 1e9, float(sys.argv[1]) if len(sys.argv) > 1 else {limit}
print(f"weights: {{gigabytes:.3g}} GB on the CPU; the limit is {{limit:g}} GB, the first argument of this file")
if gigabytes > limit:
    sys.exit("too large; give a higher limit")
torch.manual_seed(0)
"""
LIMIT = 8


def example_lines(program: Program, names: Mapping[str, str]) -> list[str]:
    """What runs when the file is run: random weights and inputs, and the shapes of the outputs.

    Args:
        names: what the tensor arguments are called in Python.

    Raises:
        StateDictError: the shape of a weight cannot be told.
    """
    types = weight_types(program)
    kinds = {name: param.kind for name, param in program.params.items()}
    size = sum(t.dtype.itemsize * _count(t) for t, _ in types.values())
    found = legal_sizes(program.signature)
    lines = ['if __name__ == "__main__":']
    if found is None:
        return [*lines, '    raise SystemExit("no small sizes are legal for this program: write an example by hand")']
    lines += [f"    {line}" for line in GUARD.format(bytes=size, limit=LIMIT).splitlines()]
    if found:
        lines += [f"    {', '.join(found)} = {', '.join(map(str, found.values()))}"]
    lines += ["    weights = {}"]
    statements = []
    for name, (type, owner) in sorted(types.items(), key=lambda item: bool(item[1][1])):
        trained = kinds.get(name, "parameter") in ("parameter", "frozen")
        value = entry("weights", owner) if owner else [_drawn(type, "0.02 * torch.randn" if trained else "torch.rand")]
        statements.append(line(*entry("weights", name), " = ", *value))
    lines += [f"    {text}" for text in folded(statements, {"weights", *found}, set())[0]]
    limits = vocabularies(program)
    lines += ["    inputs = {"]
    for leaf in program.signature.inputs:
        if leaf.type is not None:
            draw = f"torch.randint({limits[leaf.name]}, ({{}}))" if leaf.name in limits else "torch.randn"
            lines += [f'        "{names[leaf.name]}": {_drawn(leaf.type, draw)},']
    mode = "" if False in program.modes else ", training=True"
    lines += ["    }", "    with torch.no_grad():", f"        out = forward(parameters(weights), **inputs{mode})"]
    lines += ["    print(torch.utils._pytree.tree_map(lambda x: tuple(x.shape) if torch.is_tensor(x) else x, out))"]
    return lines


def _count(type: Type) -> int:
    count = 1
    for size in type.sizes({}):
        count *= size
    return count


def _drawn(type: Type, draw: str) -> str:
    """A random tensor; numbers and masks that nothing is known of are ones."""
    shape = ", ".join(map(str, type.shape))
    if "randint" in draw:
        return draw.format(f"{shape}," if len(type.shape) == 1 else shape) + f".to({type.dtype})"
    if type.dtype.is_floating_point or type.dtype.is_complex:
        return f"{draw}({shape or '()'}, dtype={type.dtype})"
    return f"torch.ones({shape or '()'}, dtype={type.dtype})"


def legal_sizes(signature: Signature) -> dict[str, int] | None:
    """A small legal value for every size of the arguments; None if none is found.

    Example:
        >>> legal_sizes(program.signature)  # doctest: +SKIP
        {'b': 2, 's': 8}
    """
    types = [leaf.type for leaf in signature.inputs if leaf.type is not None]
    names = list(dict.fromkeys([*signature.ranges, *sorted({n for t in types for n in t.size_names()})]))
    for values in islice(product(*(_candidates(name, signature) for name in names)), _TRIED):
        found = dict(zip(names, values, strict=True))
        if all(sizes.met(guard, found) for guard in signature.guards) and all(
            size > 0 for type in types for size in type.sizes(found)
        ):
            return found
    return None


def _candidates(name: str, signature: Signature) -> Iterator[int]:
    low, high = signature.ranges.get(name, (1, None))
    wish = _BATCH if name == "b" else _LENGTH
    wish = max(low, wish) if high is None else min(max(low, wish), high)
    yield wish
    last = low + 256 if high is None else min(high, low + 256)
    yield from (value for value in range(low, last + 1) if value != wish)


def vocabularies(program: Program) -> dict[str, int]:
    """Arguments that are read as rows of a table, with the number of its rows."""
    found: dict[str, int] = {}
    for item in program.body:
        if not isinstance(item, Segment):
            continue
        read = dict(zip(item.body.placeholders_of("value"), item.reads, strict=True))
        for node in item.body.nodes:
            if node.target is not aten.embedding.default:
                continue
            table, index = node.all_input_nodes[0], node.args[1]
            if table.op == "placeholder" and isinstance(index, fx.Node) and index in read:
                rows = table.meta["input"].type.shape[0]
                found[read[index]] = min(rows, found.get(read[index], rows))
    leaves = {leaf.name for leaf in program.signature.inputs}
    return {name: rows for name, rows in found.items() if name in leaves}


def weight_types(program: Program) -> dict[str, tuple[Type, str]]:
    """Every tensor of the captured model that a parameter is made of: its type, and the name whose tensor it is, if
    it is that of another one.

    Raises:
        StateDictError: an expression does not tell the shape, and the program has no weights.
    """
    found: dict[str, tuple[Type, str]] = {}
    owners: dict[int, str] = {}
    for name, param in program.params.items():
        for source, type in _sources(param.expr or Ref(name), param, program):
            held = program.weights.get(source)
            owner = source if held is None else owners.setdefault(id(held), source)
            found.setdefault(source, (type, "" if owner == source else owner))
    return found


def _sources(expr: Expr, param: Param, program: Program) -> Iterator[tuple[str, Type]]:
    match expr:
        case Ref(name=name):
            held = program.weights.get(name)
            type = Type(held.dtype, tuple(held.shape)) if held is not None else param.type
            yield name, type
        case Mean(terms=terms):
            for term in terms:
                yield from _sources(term, param, program)
        case Shuffle(term=term):
            yield from _sources(term, param, program)
        case Tile(term=term, count=count):
            rows, columns = param.type.sizes({})
            narrow = Type(param.type.dtype, (rows, columns // count))
            yield from _sources(term, replace(param, type=narrow), program)
        case Svd(a=a, b=b):
            for term in (a, b):
                for name, type in _sources(term, param, program):
                    if name not in program.weights:
                        what, remedy = f"the shape of the weight {name!r} is not known", "give the program its weights"
                        raise StateDictError(what, expected="program.with_weights(...)", remedy=remedy)
                    yield name, type
        case Init():
            return
