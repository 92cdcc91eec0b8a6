"""The Python form: any program as a module of plain PyTorch code that runs by itself and may be edited."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from depthc.codegen.python.example import EXAMPLE, example_lines
from depthc.codegen.python.forward import BUILTIN, HELPERS, LOCAL, Forward, value_names
from depthc.codegen.python.functions import PythonFunction, libraries, python_function
from depthc.codegen.python.parameters import DEFINITIONS, parameter_lines
from depthc.ir.names import Names
from depthc.ir.program import Call, Loop, On, Program
from depthc.ir.text.functions import Function, collect, walk

_UNDER = '''
def under(w, prefix, slots, others={}):
    """The parameters of some slots: those of their names under a prefix, or what `others` says instead."""
    return [w[others.get(slot, f"{prefix}.{slot}" if prefix else slot)] for slot in slots]
'''
_ABOUT = """\
{title}: what it computes, as PyTorch code. Written by depthc {version}.

What runs is what stands here, and it may be edited. `parameters` makes the program's parameters of the captured
model's tensors, `forward` computes its outputs from them:

    w = parameters(dict(model.named_buffers()) | model.state_dict())
    out = forward(w, {arguments})

`python FILE` does so with random numbers, and prints the shapes of the outputs."""
_ROUTED = """
Functions marked @block run on some of the tokens, or with keys and values of other applications. depthc looks at what
they do to every token, and moves the rows: see depthc.codegen.python.routed."""


def python_text(program: Program, title: str = "") -> str:
    """A program as the text of a Python module.

    The module has one function for every block, segment and combine of the program, `parameters(weights)`, which makes
    its parameters of the captured model's tensors (bitwise as `depthc.ir.params.value_of` does), and
    `forward(w, <the tensor arguments>, *, training=False, taps=None)`, which returns its outputs: a tensor, or tensors
    in dicts (for output classes too), tuples and lists. `taps`, a dict, is filled with what the program taps. Where
    capacities warm up, there is a further `step=None`. Arguments are not checked.

    The module needs torch alone, unless the program has token sets or key/value plans: then the functions of the
    blocks concerned are still what runs, and `depthc.codegen.python.routed` runs them on rows. Run as a script, it
    draws small random arguments and prints the shapes of the outputs.

    Args:
        program: any verified program; its weights may be missing or on the meta device.
        title: what it is, for its first line; the program's name by default.

    Raises:
        StateDictError: an SVD of weights whose shapes are not known: a parsed program without weights.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> program = depthc.capture(model, (torch.ones(2, 5, 4),))
        >>> module = {}
        >>> exec(python_text(program), module)
        >>> w = module["parameters"](model.state_dict())
        >>> bool((module["forward"](w, torch.ones(1, 7, 4)) == model(torch.ones(1, 7, 4))).all())
        True
    """
    names = value_names(program)
    loops = {op.index for op, _ in walk(program.body) if isinstance(op, Loop)}
    functions = _functions(program, names, loops)
    indices = {f.label for f in functions.values()} | {f.slots for f in functions.values()} | loops
    forward = Forward(program, functions, names, indices)
    main = forward.lines()
    blocks = [part for f in functions.values() for part in (*f.lines, "", "")]
    helpers = [name for name in HELPERS if any(_calls(name, text) for text in (*blocks, *main))]
    code = [*blocks, *([*_UNDER.strip().splitlines(), "", ""] if "under" in forward.uses else [])]
    code += [*parameter_lines(program), "", "", *main, "", "", *example_lines(program, names)]
    arguments = ", ".join(names[leaf.name] for leaf in program.signature.inputs if leaf.type is not None)
    about = _ABOUT.format(title=title or program.name, version=version("depthc"), arguments=arguments)
    about += "\n" + _ROUTED if helpers else ""
    header = [f"# {text}".rstrip() for text in about.splitlines()]
    return (
        "\n".join(
            [*header, "", *_imports(code, helpers, libraries(f.function for f in functions.values())), "", "", *code]
        )
        + "\n"
    )


def _calls(name: str, text: str) -> bool:
    """Whether a text calls a function, and no other whose name ends like it."""
    return re.search(rf"(?<![\w.]){name}\(", text) is not None


def _imports(code: Sequence[str], helpers: Sequence[str], libraries: Sequence[str]) -> Iterator[str]:
    used = [name for name in ("sys", "math", "operator") if any(f"{name}." in text for text in code)]
    yield from (f"import {name}" for name in sorted(used))
    yield ""
    yield "import torch"
    yield from (f"import {name}  # it defines operations that are called here" for name in libraries)
    if helpers:
        yield ""
        yield f"from depthc.codegen.python.routed import {', '.join(helpers)}"
    yield ""
    yield "aten = torch.ops.aten"
    if any("END" in text for text in code):
        yield "END = 2**63 - 1  # the open end of a slice"


def _functions(program: Program, names: Mapping[str, str], loops: Collection[str]) -> dict[Any, PythonFunction]:
    """The functions of a program, under names that nothing else in the module has."""
    others = {*HELPERS, *LOCAL, *BUILTIN, *DEFINITIONS, *EXAMPLE}
    taken = Names({*names.values(), *loops, *program.signature.ranges, *others})
    found = collect(program, taken.taken)
    routed = _routed(program)
    made: dict[Any, PythonFunction] = {}
    for function in found.values():
        taken.taken.add(function.label)
    for key, function in found.items():
        mark = _mark(function) if function.kind == "block" and function.name in routed else ""
        made[key] = python_function(function, function.label, taken.new(function.label.upper()), mark)
    return made


def _mark(function: Function) -> str:
    values = len(function.body.inputs_of("value"))
    return f"@block(values={values}{f', carries={function.carries}' if function.carries != 1 else ''})"


def _routed(program: Program) -> set[str]:
    """The blocks that are called on token sets or with key/value plans."""
    found = {op.block for op, _ in walk(program.body) if isinstance(op, Call) and op.kv}
    for op, _ in walk(program.body):
        if isinstance(op, On):
            found |= {inner.block for inner, _ in walk(op.body) if isinstance(inner, Call)}
    return found
