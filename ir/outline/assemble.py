"""Assemble: a trace and its towers become a program of segments, stacks and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from depthc.ir.graph.size_nodes import assigned_name
from depthc.ir.graph.trace import Trace
from depthc.ir.names import Names
from depthc.ir.outline.build import BodyBuilder, layer_block, size_names, size_names_of
from depthc.ir.outline.outline import Tower
from depthc.ir.outline.repeats import best_repeat
from depthc.ir.outline.spans import Span, data_inputs, is_data, numbers_of
from depthc.ir.program import Block, Call, Loop, Op, Program, Segment, Stack


def assemble(trace: Trace, towers: Sequence[Tower]) -> Program:
    """The program of a trace: every op is in exactly one segment or layer, in the order of execution."""
    return _Assembler(trace, towers).program()


class _Assembler:
    def __init__(self, trace: Trace, towers: Sequence[Tower]) -> None:
        self.trace, self.towers = trace, towers
        self.names = Names(leaf.name for leaf in trace.signature.inputs)
        self.values: dict[fx.Node, str] = {}
        self.inputs: dict[str, tuple[fx.Node, int]] = {}
        self.layer_of = {n: layer for tower in towers for layer in tower.layers for n in layer.nodes}
        self.order = {n: i for i, n in enumerate(trace.graph.nodes)}
        self.blocks: dict[str, Block] = {}
        self.body: list[Segment | Stack] = []
        self._block_of_text: dict[tuple[Any, ...], str] = {}
        for node in trace.graph.nodes:
            if node.op == "placeholder" and "value" in node.meta:
                self.values[node] = node.meta["value"]
                for dim, size in enumerate(trace.type_of(node).shape):  # type: ignore[union-attr]
                    if isinstance(size, str) and size.isidentifier():
                        self.inputs.setdefault(size, (node, dim))

    def program(self) -> Program:
        output = next(n for n in reversed(self.trace.graph.nodes) if n.op == "output")
        results = list(output.args[0])  # type: ignore[arg-type]
        self.needed_at_end = set(results)
        carries = [self.names.new("h") for _ in self.towers]
        for index, (tower, carry) in enumerate(zip(self.towers, carries, strict=True)):
            self._stack(tower, carry, "prologue" if index == 0 else f"bridge{index}")
        self._segment("epilogue", results)
        values = iter(results)
        outputs = tuple(self.values[next(values)] if isinstance(o, str) else o for o in self.trace.signature.outputs)
        signature = replace(self.trace.signature, outputs=outputs)
        return Program(
            self.trace.name,
            signature,
            self.blocks,
            tuple(self.body),
            self.trace.params,
            self.trace.weights,
            self.trace.modes,
        )

    # stacks

    def _stack(self, tower: Tower, carry: str, before: str) -> None:
        own = tower.nodes
        reads = [tower.layers[0].start, *(s for layer in tower.layers for s in layer.sides)]
        early = [n for n in reads if not self._depends(n, own)]
        start = tower.layers[0].start
        if not self._is_read_elsewhere(start, tower.layers[0]) and start not in self.values:
            self.values[start] = carry
            self._segment(before, early, given={start})
        else:
            self._segment(before, early)
        ops: list[Op] = []
        names = self._block_names(tower)
        for layer, following in zip(tower.layers, [*tower.layers[1:], None], strict=True):
            glue = self._make_segment(f"glue{len(self.body)}_{len(ops)}", layer.sides)
            ops += [glue] if glue else []
            ops.append(self._call(layer, following, carry, names[layer.text]))
        self.body.append(Stack(self._unique(_stack_name(tower)), _rolled(ops)))

    def _unique(self, name: str) -> str:
        taken = {item.name for item in self.body}
        count = sum(other == name or other.startswith(f"{name}#") for other in taken)
        return f"{name}#{count + 1}" if count else name

    def _call(self, layer: Span, following: Span | None, carry: str, block: str) -> Call:
        reads = [layer.start, *self._block_sides(layer)]
        read_names = tuple(self.values[n] for n in reads)
        passing = following is None or not self._is_read_elsewhere(layer.end, following)
        self.values[layer.end] = carry if passing else self.names.new(carry)
        for extra in layer.extras:
            self.values[extra] = self.names.new(assigned_name(extra) or extra.name)
        writes = tuple(self.values[n] for n in (layer.end, *layer.extras))
        varying = [i.name for i in self.blocks[block].body.inputs_of("const")]
        consts = tuple(layer.consts[int(name.removeprefix("c"))] for name in varying)
        return Call(block, read_names, writes, layer.params, consts, layer=_label(layer))

    def _block_sides(self, layer: Span) -> list[fx.Node]:
        """Side inputs, and arguments of the model that are read for a size alone."""
        known = {s for n in (layer.start, *layer.sides) for s in self._plain_sizes(n)}
        missing = sorted({s for s in size_names(layer, self.trace) if s not in known})
        return [*layer.sides, *dict.fromkeys(self.inputs[s][0] for s in missing if s in self.inputs)]

    def _plain_sizes(self, node: fx.Node) -> list[str]:
        type = self.trace.type_of(node)
        return [s for s in (type.shape if type else ()) if isinstance(s, str) and s.isidentifier()]

    def _block_names(self, tower: Tower) -> dict[str, str]:
        """The block of every certificate in the tower; makes those that are new."""
        groups: dict[str, list[Span]] = {}
        for layer in tower.layers:
            groups.setdefault(layer.text, []).append(layer)
        return {text: self._block(layers) for text, layers in groups.items()}

    def _block(self, layers: Sequence[Span]) -> str:
        first = next(layer for layer in layers if _is_general(layer))
        varying = [i for i in range(len(first.consts)) if len({repr(layer.consts[i]) for layer in layers}) > 1]
        name = self.names.new(_class_name(first))
        slots = _slot_names(layers)
        local = Names(["h"])
        sides = {n: local.new(self.values.get(n) or assigned_name(n) or n.name) for n in self._block_sides(first)}
        self.blocks[name] = layer_block(first, name, sides, slots, _const_sites(first, varying))
        return name

    # segments

    def _segment(self, name: str, results: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> None:
        segment = self._make_segment(name, results, given)
        if segment:
            self.body.append(segment)

    def _make_segment(self, name: str, results: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> Segment | None:
        """The ops that `results` still need. `given`: nodes made here whose name is already chosen."""
        done = set(self.values) - set(given)
        nodes: set[fx.Node] = set()
        stack = [n for n in results if n not in done]
        while stack:
            node = stack.pop()
            if node not in nodes and node not in done and node.op == "call_function":
                nodes.add(node)
                stack.extend(data_inputs(node))
        if not nodes:
            return None
        ordered = sorted(nodes, key=self.order.__getitem__)
        reads = dict.fromkeys(n for node in ordered for n in data_inputs(node) if n not in nodes)
        sizes = {s for node in ordered for s in size_names_of(node, self.trace)}
        known = {s for n in reads for s in self._plain_sizes(n)}
        reads |= dict.fromkeys(self.inputs[s][0] for s in sorted(sizes - known) if s in self.inputs)
        wanted = set(results) | self.needed_at_end
        writes = [n for n in ordered if n in wanted or any(u not in nodes and is_data(u) for u in n.users)]
        params = dict.fromkeys(n.meta["param"] for node in ordered for n in node.all_input_nodes if "param" in n.meta)
        builder = BodyBuilder(self.trace, [(n, self.values[n]) for n in reads], {p: p for p in params})
        for node in ordered:
            builder.copy(node)
        for node in writes:
            if node not in self.values:
                self.values[node] = self.names.new(assigned_name(node) or node.name)
        return Segment(
            name,
            builder.finish(writes),
            tuple(self.values[n] for n in reads),
            tuple(self.values[n] for n in writes),
            tuple(params),
        )

    # what is read where

    def _is_read_elsewhere(self, node: fx.Node, layer: Span) -> bool:
        """Whether a trunk point is read by more than the layer that it enters."""
        inside = set(layer.nodes)
        outside = any(u not in inside and (is_data(u) or u.op == "output") for u in node.users)
        return outside or node in self.needed_at_end or any(node in span.sides for span in self.layer_of.values())

    def _depends(self, node: fx.Node, own: set[fx.Node]) -> bool:
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in own:
                return True
            if current not in seen and current not in self.values:
                seen.add(current)
                stack.extend(data_inputs(current))
        return False


def _is_general(layer: Span) -> bool:
    """Whether no two inputs of a layer happen to be the same value or parameter."""
    return all(len(set(names)) == len(names) for names in ((layer.start, *layer.sides), layer.params))


def _const_sites(layer: Span, varying: Sequence[int]) -> dict[tuple[fx.Node, int], str]:
    """Where the constants that differ between layers stand: (op, how manieth of its `numbers_of`) -> slot."""
    sites, index = {}, 0
    for node in layer.walk:
        for count in range(len(numbers_of(node))):
            if index in varying:
                sites[node, count] = f"c{index}"
            index += 1
    return sites


def _rolled(ops: Sequence[Op]) -> tuple[Op, ...]:
    """Equal applications in a row are a loop: one block, one binding."""
    keys = [repr(replace(op, layer="")) if isinstance(op, Call) else f"{i}" for i, op in enumerate(ops)]
    repeat = best_repeat(keys, lambda i: 1)
    if repeat is None:
        return tuple(ops)
    loop = Loop("r", repeat.length // repeat.period, tuple(ops[repeat.start : repeat.start + repeat.period]))
    return (*_rolled(ops[: repeat.start]), loop, *_rolled(ops[repeat.stop :]))


# names for people


def _label(layer: Span) -> str:
    """The dotted path that most parameters of a layer share."""
    paths = [p.split(".") for p in layer.params]
    prefix: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix[: min((len(p) for p in paths), default=1) - 1])


def _stack_name(tower: Tower) -> str:
    first, second = (_label(layer).split(".") for layer in tower.layers[:2])
    same = [a for a, b in zip(first, second, strict=False) if a == b]
    return ".".join(same if same else first) or "layers"


def _slot_names(layers: Sequence[Span]) -> list[str]:
    """Parameter names within the layer: what follows the part in which two layers differ."""
    first, second = layers[0], layers[-1]
    slots = []
    for a, b in zip(first.params, second.params, strict=True):
        left, right = a.split("."), b.split(".")
        differ = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), None)
        start = differ + 1 if differ is not None else len(_label(first).split(".")) if _label(first) else 0
        slots.append(".".join(left[start:]) or left[-1])
    return slots if len(set(slots)) == len(slots) else list(first.params)


def _class_name(layer: Span) -> str:
    """The class of the innermost module that holds the whole layer, in snake case."""
    stacks = [list((n.meta.get("nn_module_stack") or {}).values()) for n in (layer.nodes[0], layer.end)]
    common = [a for a, b in zip(*stacks, strict=False) if a == b]
    name = str(common[-1][1]).rsplit(".", 1)[-1].strip("'>") if len(common) > 1 else "layer"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
