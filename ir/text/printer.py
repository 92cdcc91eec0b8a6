"""Program text: a Python subset that a person can read and `depthc.parse` reads back without loss."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

from depthc.ir.params import Expr, Init, Mean, Param, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap, calls
from depthc.ir.sections import sections_of
from depthc.ir.signature import Leaf, Signature
from depthc.ir.text.fold import Piece, Statement, fold, joined, line, number, words, write
from depthc.ir.text.functions import Function, bound_name, collect, derived_params, function_key, prefix_of, walk
from depthc.ir.text.print_body import BodyText
from depthc.ir.text.syntax import (
    HEADER,
    RESERVED,
    STATEMENTS,
    VERSION,
    WIDTH,
    call,
    is_value_name,
    literal_syntax,
    name,
    size_syntax,
    slot_syntax,
    string,
    type_syntax,
    type_text,
    unique,
)
from depthc.ir.text.trees import Path, TreeWriter, leaf_name, qualified

_Parts = list[Sequence[Piece]]


def program_text(program: Program) -> str:
    """The text of a program; `parse` gives back an equal one, without its weights."""
    return _Printer(program).text()


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.tree = TreeWriter()
        self.header = self._header()
        self.output = self._output()
        taken = {*STATEMENTS, *self.tree.classes, program.name}
        self.functions = collect(program, taken)
        self.loops = {op.index for op, _ in walk(program.body) if isinstance(op, Loop)}
        self.taken = {*self.loops, *program.signature.ranges, *RESERVED}

    def text(self) -> str:
        lines = [f"{HEADER} {VERSION}"]
        lines += [f'{alias} = registered("{qualified(cls)}")' for alias, cls in self.tree.classes.items()]
        for function in self.functions.values():
            lines += ["", *self._function(function)]
        lines += ["", *self._main()]
        return "\n".join(wrapped for line in lines for wrapped in wrap(line)) + "\n"

    def _write(self, statements: Sequence[Statement]) -> Iterator[str]:
        return write(fold(statements, self.taken), self.loops, "    ")

    # functions

    def _function(self, function: Function) -> Iterator[str]:
        renamed = function.kind != "glue" and function.name != function.label
        marks = [ast.unparse(string(function.name))] if renamed else []
        marks += [f"carries={function.carries}"] if function.carries != 1 else []
        yield f"@{function.kind}" + (f"({', '.join(marks)})" if marks else "")
        text = BodyText(function.body, function.slots, function.results)
        yield f"def {function.label}({', '.join(text.parameters)}):"
        infos = function.body.inputs_of("param")
        declared = zip(function.slots, infos, function.kinds, strict=True)
        slots = [line(words("slot", slot), f": {_declared(info.type, kind)}") for slot, info, kind in declared]
        yield from self._write(slots)
        infos = function.body.inputs_of("const")
        consts = zip(unique(i.name for i in infos), infos, strict=True)
        yield from (f"    {ast.unparse(slot_syntax('c', slot))}: {type_text(info.type)}" for slot, info in consts)
        yield from (f"    {statement}" for statement in text.statements)

    # the program itself

    def _main(self) -> Iterator[str]:
        program, signature = self.program, self.program.signature
        if program.modes != (False, True):
            yield f"@training({', '.join(map(str, program.modes))})"
        yield f"def {program.name}({self.header}):"
        if signature.ranges:
            yield f"    sizes({', '.join(range_text(n, *span) for n, span in signature.ranges.items())})"
        yield from (f"    assert {ast.unparse(size_syntax(guard))}" for guard in signature.guards)
        derived = derived_params(self.functions.values())
        extra = [_param(n, p) for n, p in program.params.items() if derived.get(n) != p]
        yield from self._write([*extra, *self._ops(program.body)])
        yield f"    return {self.output}"

    def _header(self) -> str:
        signature = self.program.signature
        leaves = iter(signature.inputs)
        written: dict[str, ast.expr] = {}
        for argument, spec in zip(signature.in_spec.context, signature.in_spec.children(), strict=True):
            written[argument] = self.tree.write(spec, lambda path: _leaf(next(leaves), path), (argument,))
        parts: list[str] = []
        for parameter in signature.parameters:
            plain = parameter.strip("*=")
            if parameter.endswith("=") and not any(p.startswith("*") for p in parts):
                parts.append("*")
            note = f": {ast.unparse(written[plain])}" if plain in written else ""
            parts.append(parameter.rstrip("=") + note)
        return ", ".join(parts)

    def _output(self) -> str:
        signature: Signature = self.program.signature
        outputs = iter(signature.outputs)

        def leaf(_: Path) -> ast.expr:
            output = next(outputs)
            if isinstance(output, str):
                return _value_syntax(output)
            return _leaf(output, ())

        return ast.unparse(self.tree.write(signature.out_spec, leaf))

    # ops

    def _ops(self, ops: Iterable[Op | Stack]) -> tuple[Statement, ...]:
        return tuple(map(self._op, ops)) or (line("pass"),)

    def _op(self, op: Op | Stack) -> Statement:
        match op:
            case Stack():
                return Statement(
                    ("with stack(", words("string", op.name), f"):{self._sections(op)}"), self._ops(op.ops)
                )
            case Call():
                return self._call(op)
            case Segment():
                function = self.functions[function_key(op)]
                own_name: _Parts = [["name=", words("string", op.name)]] if op.name != function.name else []
                own_name += [["precise=True"]] if op.precise else []
                return line(*_targets(op.writes), *self._apply(function, op.reads, op.params, own_name))
            case Loop():
                until: list[Piece] = [", until=", words("value", op.until)] if op.until is not None else []
                head = f"for {op.index} in loop({ast.unparse(size_syntax(op.count))}"
                return Statement((head, *until, "):"), self._ops(op.body))
            case Select():
                parts: _Parts = [[words("string", op.rule)]]
                names = {"score": op.score, "among": op.among, "of": op.of}
                parts += [[f"{k}=", words("value", v)] for k, v in names.items() if v is not None]
                parts += [["inference=", words("string", op.inference)]] if op.inference is not None else []
                names = {"judge": op.judge, "within": op.within}
                parts += [[f"{k}=", words("value", v)] for k, v in names.items() if v is not None]
                return line(*_targets([op.write]), "select(", *joined(parts), ")")
            case On():
                parts = [[words("value", op.tokens)], ["reads=", *_tuple(op.reads)], ["writes=", *_tuple(op.writes)]]
                return Statement(("with on(", *joined(parts), "):"), self._ops(op.body))
            case Merge():
                return self._merge(op)
            case Tap():
                return line("tap(", words("string", op.name), ", ", words("value", op.read), ")")
        raise TypeError(f"not an op: {op!r}")

    def _sections(self, stack: Stack) -> str:
        """A comment where generation can run parts of a step at the same time; no reader needs it."""
        if all(self.program.blocks[one.block].carries == 1 for one, _ in calls(stack.ops)):
            return ""
        depths = [str(section.depth) for section in sections_of(self.program, stack)]
        return f"  # sections side by side in a step: {', '.join(depths)} layers" if len(depths) > 1 else ""

    def _call(self, op: Call) -> Statement:
        function = self.functions["block", op.block]
        options: list[Sequence[Piece]] = []
        if op.consts:
            options.append(["c=(", *joined([[number(c)] for c in op.consts], trailing=True), ")"])
        if op.kv:
            options.append(["kv=(", *joined([_kv(plan) for plan in op.kv], trailing=True), ")"])
        if op.grad is not None:
            options.append(["grad=", words("string", op.grad)])
        if op.layer and op.layer != prefix_of(function.slots, op.params):
            options.append(["layer=", words("string", op.layer)])
        return line(*_targets(op.writes), *self._apply(function, op.reads, op.params, options))

    def _merge(self, op: Merge) -> Statement:
        parts: list[Sequence[Piece]] = [[words("value", v)] for v in (op.read, op.value, op.tokens)]
        if op.combine is not None:
            function = self.functions[function_key(op)]
            parts.append([f"combine={function.label}"])
            parts += [["extra=", *_tuple(op.extra)]] if op.extra else []
            parts += _weights(function.slots, op.params)
        parts += [["over=", words("value", op.over)]] if op.over is not None else []
        return line(*_targets([op.write]), "merge(", *joined(parts), ")")

    def _apply(
        self, function: Function, reads: Sequence[str], params: Sequence[str], options: Sequence[Sequence[Piece]]
    ) -> list[Piece]:
        parts = [[words("value", r)] for r in reads]
        return [f"{function.label}(", *joined([*parts, *_weights(function.slots, params), *options]), ")"]


# pieces of lines


def _tuple(names: Iterable[str]) -> list[Piece]:
    return ["(", *joined([[words("value", n)] for n in names], trailing=True), ")"]


def _targets(writes: Sequence[str]) -> list[Piece]:
    return [*joined([[words("value", n)] for n in writes]), " = "] if writes else []


def _weights(slots: Sequence[str], params: Sequence[str]) -> list[list[Piece]]:
    """`w=` of an application: a prefix, and what does not follow it; nothing where every slot names its parameter."""
    prefix = prefix_of(slots, params)
    others = [(s, p) for s, p in zip(slots, params, strict=False) if p != bound_name(prefix or "", s)]
    entries = joined([[words("string", s), ": ", words("string", p)] for s, p in others])
    if prefix:
        return [["w=", words("string", prefix), *([" | {", *entries, "}"] if others else [])]]
    return [["w={", *entries, "}"]] if others else []


def _kv(plan: Kv) -> list[Piece]:
    return [f"{plan.mode}(", words("string", plan.slot), ")"] if plan.slot else [plan.mode]


def range_text(size: str, low: int, high: int | None) -> str:
    """The smallest and largest legal value of a size."""
    return f"{low} <= {size}" + (f" <= {high}" if high is not None else "")


def _value_syntax(value: str) -> ast.expr:
    return name(value) if is_value_name(value) else ast.Subscript(name("v"), string(value))


def _leaf(leaf: Leaf, path: Path) -> ast.expr:
    """A leaf of the arguments or outputs; its name only where it is not the usual one."""
    content = type_syntax(leaf.type) if leaf.type is not None else literal_syntax(leaf.value)
    if leaf.name == leaf_name(path):
        return content
    return call("leaf", [string(leaf.name), content])


def _declared(type: object, kind: str) -> str:
    text = type_text(type)  # type: ignore[arg-type]
    return text if kind == "parameter" else f"{kind}({text})"


def _param(path: str, param: Param) -> Statement:
    value = [" = ", *_expr(param.expr)] if param.expr is not None else []
    return line(words("slot", path), f": {_declared(param.type, param.kind)}", *value)


def _expr(expr: Expr) -> list[Piece]:
    match expr:
        case Ref(name=path):
            return ["ref(", words("string", path), ")"]
        case Mean(terms=terms):
            return ["mean(", *joined(map(_expr, terms)), ")"]
        case Svd(side=side, a=a, b=b, rank=rank):
            return [f"svd_{side}(", *_expr(a), " - ", *_expr(b), ", ", number(rank), ")"]
        case Init(type=type, law=law, seed=seed):
            options: list[Piece] = [", seed=", number(seed)] if seed else []
            return ["init(", type_text(type), ", ", words("string", law), *options, ")"]
        case Shuffle(term=term, seed=seed):
            options = [", seed=", number(seed)] if seed else []
            return ["shuffle(", *_expr(term), *options, ")"]
        case Tile(term=term, count=count, over=over):
            options = [", over=", number(over)] if over != 1 else []
            return ["tile(", *_expr(term), ", ", number(count), *options, ")"]
    raise TypeError(f"not a parameter expression: {expr!r}")


def expr_text(expr: Expr) -> str:
    """A parameter expression as the text of a program writes it.

    Example:
        >>> expr_text(Mean((Ref("a"), Ref("b"))))
        'mean(ref("a"), ref("b"))'
    """
    return next(write([line(*_expr(expr))], set()))


# long lines


def wrap(line: str) -> list[str]:
    """A long line broken after commas inside brackets."""
    if len(line) <= WIDTH:
        return [line]
    line = _bracketed(line)
    more = line[: len(line) - len(line.lstrip())] + ("        " if line.lstrip().startswith("def ") else "    ")
    breaks = [at + 1 for at, char, depth in _outside_strings(line) if char == " " and depth and line[at - 1] in ",|"]
    lines, start, indent = [], 0, ""
    while len(indent) + len(line) - start > WIDTH:
        room = start + WIDTH - len(indent)
        fits = [b for b in breaks if start < b <= room + 1] or [b for b in breaks if b > start][:1]
        if not fits:
            break
        lines.append(indent + line[start : fits[-1]].rstrip())
        start, indent = fits[-1], more
    return [*lines, indent + line[start:]]


def _bracketed(line: str) -> str:
    """A list of results or of targets in brackets, so that it can be broken."""
    indent = line[: len(line) - len(line.lstrip())]
    text = line.lstrip()
    commas = [at for at, char, depth in _outside_strings(text) if char == "," and not depth]
    equals = next((at for at, char, depth in _outside_strings(text) if char == "=" and not depth), 0)
    if commas and text.startswith("return "):
        return f"{indent}return ({text[7:]})"
    if commas and commas[0] < equals:
        return f"{indent}({text[: equals - 1]}) {text[equals:]}"
    return line


def _outside_strings(line: str) -> Iterator[tuple[int, str, int]]:
    """(position, character, depth of brackets) of everything outside of strings."""
    depth, quote, escaped = 0, "", False
    for at, char in enumerate(line):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            yield at, char, depth
