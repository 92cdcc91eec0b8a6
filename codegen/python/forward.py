"""The ops of a program as the statements of a Python function."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from depthc.codegen.python.functions import PythonFunction
from depthc.codegen.python.pieces import entry, folded
from depthc.ir import sizes
from depthc.ir.names import Names
from depthc.ir.params import STEP
from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.selection import parse_rule
from depthc.ir.signature import Leaf
from depthc.ir.sizes import Size
from depthc.ir.text.fold import Piece, Statement, joined, line, number, words
from depthc.ir.text.functions import bound_name, function_key, prefix_of, walk
from depthc.ir.text.printer import wrap
from depthc.ir.text.syntax import WIDTH, literal_syntax, string, type_text
from depthc.ir.text.trees import Path, TreeWriter
from depthc.ir.types import Type

HELPERS = ("Kv", "atleast", "block", "everyone", "on", "stride", "threshold", "topk")
RULES = {"all": "everyone", "stride": "stride", "topk": "topk", "threshold": "threshold", "atleast": "atleast"}
LOCAL = ("w", "v", "c", "training", "device", "step", "taps", "slots", "under", "forward", "parameters", "weights")
BUILTIN = ("torch", "math", "operator", "aten", "END", "range", "max", "min", "dict", "sys", "f")


def value_names(program: Program) -> dict[str, str]:
    """Every value of a program as a Python name of its own."""
    loops = {op.index for op, _ in walk(program.body) if isinstance(op, Loop)}
    names = Names({*HELPERS, *LOCAL, *BUILTIN, *loops, *program.signature.ranges})
    found = [leaf.name for leaf in program.signature.inputs if leaf.type is not None]
    for op, _ in walk(program.body):
        found += [*_reads(op), *_writes(op)]
    return {value: names.new(value) for value in dict.fromkeys(found)}


def _reads(op: Op) -> tuple[str, ...]:
    match op:
        case Merge():
            return op.read, op.value, op.tokens, *op.extra, *filter(None, (op.over,))
        case Tap():
            return (op.read,)
        case On():
            return op.tokens, *op.reads
        case Loop():
            return (op.until,) if op.until else ()
    return op.reads


def _writes(op: Op) -> tuple[str, ...]:
    if isinstance(op, Select | Merge):
        return (op.write,)
    return getattr(op, "writes", ())  # type: ignore[no-any-return]


class Forward:
    """The function `forward` of a program.

    Args:
        functions: what its ops call, by `function_key`.
        names: `value_names(program)`.
        indices: names that the index of a loop over equal statements may not have.
    """

    def __init__(
        self, program: Program, functions: Mapping[Any, PythonFunction], names: Mapping[str, str], indices: set[str]
    ) -> None:
        self.program, self.functions, self.names = program, functions, dict(names)
        self.fresh = Names({*names.values(), *HELPERS, *LOCAL, *BUILTIN, *indices, *program.signature.ranges})
        self.sets: set[str] = set()  # the names that hold token sets
        self.region = ""  # what the region is called that calls run on
        self.uses: set[str] = set()  # of LOCAL, and sizes
        self.loops = {op.index for op, _ in walk(program.body) if isinstance(op, Loop)}
        self.taken = {*indices, *names.values(), *HELPERS, *LOCAL, *BUILTIN, *self.loops, *program.signature.ranges}

    def lines(self) -> list[str]:
        """Its definition."""
        statements = [s for item in self.program.body for s in self._item(item)]
        output = _Output(self.names).text(self.program)
        statements.append(line("return ", *output))
        body, numbered = folded(statements, self.taken, self.loops)
        lines = [*self._header(), *(f"    {text}" for text in (*self._begin(numbered), *body))]
        return [part for text in lines for part in ([text] if text.lstrip()[:1] in '#"' else _broken(text))]

    def _header(self) -> Iterator[str]:
        leaves = [leaf for leaf in self.program.signature.inputs if leaf.type is not None]
        arguments = [f"{self.names[leaf.name]}: {ast.unparse(string(type_text(leaf.type)))}" for leaf in leaves]
        options = ["training=False", *(["step=None"] if self._steps else []), "taps=None"]
        yield f"def forward(w, {', '.join([*arguments, '*', *options])}):"
        yield '    """The program: its outputs, from its parameters by name and the tensors that the model was given.'
        yield ""
        yield "    `taps`, a dict, is filled with the values that the program exposes: losses and routes."
        if self._steps:
            yield "    `step`: the optimizer steps taken, where capacities warm up; None: they have."
        yield '    """'

    @property
    def _steps(self) -> bool:
        return STEP in self.program.params or "step" in self.uses

    def _begin(self, numbered: set[str]) -> Iterator[str]:
        """What the statements need to be there."""
        leaves = [leaf for leaf in self.program.signature.inputs if leaf.type is not None]
        if len(self.program.modes) == 1:
            (mode,) = self.program.modes
            yield f"if training is not {mode}:"
            yield f'    raise ValueError("the model was captured with training={mode} only")'
        if "taps" in self.uses:
            yield "taps = {} if taps is None else taps"
        if "device" in self.uses:
            yield f"device = {self.names[leaves[0].name]}.device" if leaves else 'device = torch.device("cpu")'
        yield from self._sizes(leaves)
        if STEP in self.program.params:
            yield f'w = dict(w) if step is None else {{**w, "{STEP}": torch.tensor(step)}}'
        if "slots" in self.uses:
            yield "slots = {}  # keys and values that later applications read"
        if numbered:
            given = [self.names[leaf.name] for leaf in leaves if self.names[leaf.name] in numbered]
            yield f"v = {{{', '.join(f'{ast.unparse(string(name))}: {name}' for name in given)}}}"

    def _sizes(self, leaves: Sequence[Leaf]) -> Iterator[str]:
        found: set[str] = set()
        for leaf in leaves:
            for dim, size in enumerate(leaf.type.shape if isinstance(leaf.type, Type) else ()):
                if size in self.uses and size not in found:
                    found.add(str(size))
                    yield f"{size} = {self.names[leaf.name]}.shape[{dim}]"

    # ops

    def _item(self, item: Segment | Stack) -> Iterator[Statement]:
        if isinstance(item, Stack):
            yield line(f"# {item.name}: {item.depth} layers" if item.depth else f"# {item.name}")
            yield from self._ops(item.ops)
        else:
            yield from self._op(item)

    def _ops(self, ops: Iterable[Op]) -> Iterator[Statement]:
        for op in ops:
            yield from self._op(op)

    def _op(self, op: Op) -> Iterator[Statement]:
        match op:
            case Call() | Segment():
                yield self._guarded(op, self._applied(op))
            case Loop():
                body = tuple(self._ops(op.body)) or (line("pass"),)
                if op.until is not None:
                    end = Statement(("if not training and ", self._value(op.until), ".all():"), (line("break"),))
                    body = (*body, end)
                yield Statement((f"for {op.index} in range({self._size(op.count)}):",), body)
            case Select():
                self.sets.add(op.write)
                yield self._select(op)
            case On():
                yield from self._on(op)
            case Merge():
                yield self._merge(op)
            case Tap():
                self.uses.add("taps")
                yield line(*entry("taps", indexed_text(op.name)), " = ", self._value(op.read))

    def _guarded(self, op: Call | Segment, statement: Statement) -> Statement:
        """A statement inside of what it runs under: no gradient, no autocast."""
        if isinstance(op, Segment) and op.precise:
            self.uses.add("device")
            return Statement(("with torch.autocast(device.type, enabled=False):",), (statement,))
        if isinstance(op, Call) and op.grad is not None:
            condition = self._size(op.grad)
            return Statement((f"with torch.set_grad_enabled(torch.is_grad_enabled() and {condition}):",), (statement,))
        return statement

    def _applied(self, op: Call | Segment) -> Statement:
        function = self.functions[function_key(op)]
        reads: list[list[Piece]] = [[self._value(r), ".mask"] if r in self.sets else [self._value(r)] for r in op.reads]
        consts: list[list[Piece]] = [_constant(c) for c in op.consts] if isinstance(op, Call) else []
        options: list[list[Piece]] = []
        if isinstance(op, Call) and (self.region or op.kv):
            options += [[f"on={self.region}"]] if self.region else []
            if op.kv:
                self.uses.add("slots")
                plans: list[Piece] = joined([self._kv(plan.mode, plan.slot) for plan in op.kv], trailing=True)
                options.append(["kv=(", *plans, ")"])
                options.append(["slots=slots"])
        arguments: list[list[Piece]] = [*reads, *self._weights(function, op.params)]
        arguments += [*consts, *options, *self._env(function)]
        targets: list[Piece] = [*joined([[self._value(v)] for v in op.writes]), " = "] if op.writes else []
        self.sets -= set(op.writes)
        return line(*targets, f"{function.label}(", *joined(arguments), ")")

    def _kv(self, mode: str, slot: str) -> list[Piece]:
        if not slot:
            return [f'Kv("{mode}")']
        return [f'Kv("{mode}", ', words("string", indexed_text(slot)), ")"]

    def _env(self, function: PythonFunction) -> list[list[Piece]]:
        self.uses |= set(function.env) & {"device"}
        return [[f"{name}={name}"] for name in function.env]

    def _weights(self, function: PythonFunction, params: Sequence[str]) -> list[list[Piece]]:
        names = [indexed_text(name) for name in params]
        if not function.slots:
            return [entry("w", name) for name in names]
        self.uses.add("under")
        slots = function.function.slots
        prefix = prefix_of(slots, names) or ""
        others = [(s, n) for s, n in zip(slots, names, strict=True) if n != bound_name(prefix, s)]
        found: list[Piece] = ["*under(w, ", words("string", prefix), f", {function.slots}"]
        if others:
            pairs = joined([[words("string", s), ": ", words("string", n)] for s, n in others])
            found += [", {", *pairs, "}"]
        return [[*found, ")"]]

    def _select(self, op: Select) -> Statement:
        chosen = self._rule(op, op.rule, op.score)
        if op.inference is not None:
            chosen = [*chosen, " if training else ", *self._rule(op, op.inference, op.judge or op.score)]
        return line(self._value(op.write), " = ", *chosen)

    def _rule(self, op: Select, rule: str, score: str | None) -> list[Piece]:
        name, numbers, index, warmup = parse_rule(rule)
        parts: list[list[Piece]] = [] if score is None else [[self._value(score)]]
        if score is None and name == "stride":
            parts += [["None"]]
        if name != "all":
            shown = [self._size(n) if isinstance(n, str) else ast.unparse(_plain(n)) for n in numbers]
            parts += [[f"[{', '.join(shown)}][{self._size(index)}]" if index else shown[0]]]
        also = {"among": op.among} | ({"of": op.of, "within": op.within} if name == "topk" else {})
        parts += [[f"{key}=", self._value(value)] for key, value in also.items() if value is not None]
        if warmup:
            self.uses.add("step")
            parts += [[f"warmup={warmup}"], ["step=step"]]
        return [f"{RULES[name]}(", *joined(parts), ")"]

    def _on(self, op: On) -> Iterator[Statement]:
        """A region: its calls run on rows of the set; what it does not write keeps its name outside."""
        inside = [inner for inner, _ in walk(op.body)]
        calls = [inner for inner in inside if isinstance(inner, Call)]
        blocks = self.program.blocks
        made = {name for inner in inside for name in _writes(inner)}
        carried = {name for call in calls for name in call.reads[: blocks[call.block].carries]}
        rows = (carried | made) if calls else set(op.reads) | made
        outer, self.region = dict(self.names), self.fresh.new("rows")
        labels = dict.fromkeys(self.functions["block", call.block].label for call in calls)
        yield line(f"{self.region} = on(", *joined([[self._value(op.tokens)], *([label] for label in labels)]), ")")
        taken = [name for name in op.reads if name in rows]
        for name in (*taken, *sorted(made - set(op.reads))):
            if name not in op.writes:
                self.names[name] = self.fresh.new(f"{self.names[name]}_rows")
        for name in taken:
            yield line(self._value(name), f" = {self.region}.take(", words("value", outer[name]), ")")
        sets, self.sets = self.sets, set()
        yield from self._ops(op.body)
        self.sets = sets - set(op.writes)
        self.names, self.region = outer, ""

    def _merge(self, op: Merge) -> Statement:
        parts: list[list[Piece]] = [[self._value(op.read)], [self._value(op.value)]]
        if op.combine is not None:
            function = self.functions[function_key(op)]
            bound = [*self._weights(function, op.params), *self._env(function)]
            combine: list[Piece] = [function.label]
            if bound:
                combine = [f"lambda *rows: {function.label}(", *joined([["*rows"], *bound]), ")"]
            parts += [combine]
            extra = [[self._value(v)] for v in op.extra]
            parts += [["extra=(", *joined(extra, trailing=True), ")"]] if extra else []
        parts += [["over=", self._value(op.over)]] if op.over is not None else []
        found = line(self._value(op.write), " = ", self._value(op.tokens), ".merge(", *joined(parts), ")")
        self.sets.discard(op.write)
        return found

    def _value(self, name: str) -> Piece:
        return words("value", self.names[name])

    def _size(self, size: Size) -> str:
        """A size expression, whose names are loop indices and sizes of the arguments."""
        if isinstance(size, int):
            return str(size)
        tree = ast.parse(size, mode="eval")
        self.uses |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        return ast.unparse(tree)


def _broken(text: str) -> list[str]:
    """A long line as several; a choice between two is broken at the choice."""
    target, equals, value = text.partition(" = ")
    chosen, choice, other = value.partition(" if training else ")
    if len(text) <= WIDTH or not choice:
        return wrap(text)
    indent = target[: len(target) - len(target.lstrip())]
    parts = [*wrap(f"{indent}    {chosen}"), f"{indent}    if training", *wrap(f"{indent}    else {other}")]
    return [f"{target}{equals}(", *parts, f"{indent})"]


def _plain(value: float) -> ast.expr:
    """A number; infinity, and what is none, by their names in Python."""
    text = re.sub("inf|nan", r"math.\g<0>", ast.unparse(literal_syntax(value)))
    return ast.parse(text, mode="eval").body


def _constant(value: float) -> list[Piece]:
    """A number that may grow from line to line, if it is one."""
    return [number(value) if math.isfinite(value) else ast.unparse(_plain(value))]


def indexed_text(name: str) -> str:
    """A name whose expressions in braces are spelled as Python spells them; one without an index is its value.

    Example:
        >>> indexed_text("layers.{2*r+1}.w"), indexed_text("layers.{1 + 1}.w")
        ('layers.{2 * r + 1}.w', 'layers.2.w')
    """

    def spelled(match: re.Match[str]) -> str:
        tree = sizes.read(match[1])
        return f"{{{ast.unparse(tree)}}}" if sizes.names(tree) else str(sizes.evaluate(match[1], {}))

    return re.sub(r"\{([^{}]*)\}", spelled, name)


class _Output(TreeWriter):
    """Outputs as dicts, tuples and lists: a class with named fields is a dict."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def text(self, program: Program) -> list[Piece]:
        """The outputs as pieces."""
        outputs = iter(program.signature.outputs)
        marks: list[str] = []

        def leaf(_: Path) -> ast.expr:
            output = next(outputs)
            if not isinstance(output, str):
                return _plain(output.value) if isinstance(output.value, float) else literal_syntax(output.value)
            marks.append(self.names[output])
            return ast.Name(f"_output_{len(marks) - 1}_")

        tree = _Plain().visit(self.write(program.signature.out_spec, leaf))
        parts = re.split(r"_output_(\d+)_", ast.unparse(tree))
        return [words("value", marks[int(p)]) if at % 2 else p for at, p in enumerate(parts)]


class _Plain(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.expr:
        """`Class(a=x)` is a dict, `tree(Class, [x], context)` a tuple."""
        if node.keywords:
            keys: list[ast.expr | None] = [string(str(word.arg)) for word in node.keywords]
            return ast.Dict(keys, [self.visit(word.value) for word in node.keywords])
        if isinstance(node.func, ast.Name) and node.func.id == "tree":
            return ast.Tuple([self.visit(child) for child in node.args[1].elts])  # type: ignore[attr-defined]
        return node
