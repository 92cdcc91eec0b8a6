"""Argument and output structures as syntax: pytree specs to nested tuples, lists, dicts and calls of classes, and back.

A class is named by a text and found among those that torch.utils._pytree knows in this process. Nothing is imported
and nothing that a text names is run.
"""

from __future__ import annotations

import ast
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils import _pytree as pytree

from depthc.ir.errors import DepthError
from depthc.ir.text.syntax import call, fail, is_identifier, literal, literal_syntax, name

Path = tuple[Any, ...]
_BUILTIN = {t.__name__: t for t in (list, int, float, str, dict, set, tuple, bool)}


def qualified(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def known_classes() -> dict[str, type]:
    """Every class that may be a node of a tree, by full name: the registered ones and the named tuples."""
    found = {qualified(cls): cls for cls in pytree.SUPPORTED_NODES if isinstance(cls, type)}
    return {qualified(cls): cls for cls in _subclasses(tuple) if pytree.is_namedtuple_class(cls)} | found


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(cls)
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)


def leaf_name(path: Path) -> str:
    """The usual name of an argument leaf: ("past", 0, "k") is "past.0.k"."""
    return ".".join(re.sub(r"\W+", "", str(key)) or "_" for key in path)


class TreeWriter:
    """Writes specs as syntax and collects the classes that they name.

    Attributes:
        classes: short name -> class.
    """

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def write(self, spec: pytree.TreeSpec, leaf: Callable[[Path], ast.expr], path: Path = ()) -> ast.expr:
        """A spec as syntax, its leaves written by `leaf` in order."""
        if spec.is_leaf():
            return leaf(path)
        keys = _keys(spec)
        children = [self.write(spec.child(i), leaf, (*path, key)) for i, key in enumerate(keys)]
        if spec.type is tuple:
            return ast.Tuple(children)
        if spec.type is list:
            return ast.List(children)
        if spec.type is dict:
            return ast.Dict([_context_syntax(k) for k in spec.context], children)
        named_tuple = spec.type is namedtuple
        alias = name(self._alias(spec.context if named_tuple else spec.type))
        if named_tuple or _has_named_children(spec):
            return call(alias, [], dict(zip(keys, children, strict=True)))
        return call("tree", [alias, ast.List(children), _context_syntax(spec.context)])

    def _alias(self, cls: type) -> str:
        base = cls.__name__ if is_identifier(cls.__name__) else "Class"
        alias, count = base, 1
        while alias in ("tree", "leaf") or self.classes.get(alias, cls) is not cls:
            alias, count = f"{base}_{count}", count + 1
        self.classes[alias] = cls
        return alias


def _has_named_children(spec: pytree.TreeSpec) -> bool:
    context = spec.context
    if not isinstance(context, list) or len(context) != spec.num_children or not context:
        return False
    return all(isinstance(k, str) and is_identifier(k) for k in context) and len(set(context)) == len(context)


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    if spec.type is namedtuple:
        return list(spec.context._fields)
    if spec.type is dict or _has_named_children(spec):
        return list(spec.context)
    return list(range(spec.num_children))


def _context_syntax(context: Any) -> ast.expr:
    """What a class keeps beside its children; types only where they are builtin (the factory of a defaultdict)."""
    short = getattr(context, "__name__", "")
    if isinstance(context, type) and _BUILTIN.get(short) is context:
        return name(short)
    if type(context) in (list, tuple):
        items = [_context_syntax(item) for item in context]
        return ast.List(items) if isinstance(context, list) else ast.Tuple(items)
    try:
        return literal_syntax(context)
    except ValueError:
        raise DepthError(
            "the structure of the arguments or outputs cannot be written as text",
            expected="classes whose pytree context is made of numbers, strings, lists and dicts",
            found=f"a context of type {type(context).__name__}",
            remedy="register the class with a flatten function whose context is such data",
        ) from None


def _read_context(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=text) if text in _BUILTIN:
            return _BUILTIN[text]
        case ast.List(elts=items):
            return [_read_context(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_read_context(item) for item in items)
    return literal(node)


class TreeReader:
    """Reads specs; `classes` are those that the text declared."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.classes = classes

    def read(self, node: ast.expr, leaf: Callable[[ast.expr, Path], None], path: Path = ()) -> pytree.TreeSpec:
        """The spec of a piece of syntax; `leaf` is called with every leaf in order."""

        def children(nodes: list[ast.expr], keys: list[Any]) -> list[pytree.TreeSpec]:
            return [self.read(n, leaf, (*path, k)) for n, k in zip(nodes, keys, strict=True)]

        match node:
            case ast.Tuple(elts=items):
                return pytree.TreeSpec(tuple, None, children(items, list(range(len(items)))))
            case ast.List(elts=items):
                return pytree.TreeSpec(list, None, children(items, list(range(len(items)))))
            case ast.Dict(keys=keys, values=values) if None not in keys:
                names = [_read_context(k) for k in keys if k is not None]
                return pytree.TreeSpec(dict, names, children(values, names))
            case ast.Call(func=ast.Name(id="tree"), args=[ast.Name() as alias, ast.List(elts=items), context]):
                specs = children(items, list(range(len(items))))
                return pytree.TreeSpec(self._class(alias), _read_context(context), specs)
            case ast.Call(func=ast.Name(id=alias), args=[], keywords=words) if alias != "leaf":
                names = [word.arg for word in words]
                specs = children([word.value for word in words], names)
                return self._named(self._class(node.func), names, specs, node)
        leaf(node, path)
        return pytree.treespec_leaf()

    def _class(self, alias: Any) -> type:
        if alias.id not in self.classes:
            fail(alias, f"the class {alias.id!r} is not declared", expected=f'{alias.id} = registered("module.class")')
        return self.classes[alias.id]

    def _named(self, cls: type, names: list[Any], specs: list[pytree.TreeSpec], node: ast.expr) -> pytree.TreeSpec:
        if not pytree.is_namedtuple_class(cls):
            return pytree.TreeSpec(cls, names, specs)
        if names != list(cls._fields):  # type: ignore[attr-defined]
            fail(node, f"the fields of {cls.__name__} differ", expected=", ".join(cls._fields))  # type: ignore[attr-defined]
        return pytree.TreeSpec(namedtuple, cls, specs)


def find_class(text: str, node: ast.AST) -> type:
    """The class of this full name, if a library that registers it has been imported.

    Raises:
        ParseError: no such class is registered.
    """
    classes = known_classes()
    if text not in classes:
        fail(
            node,
            f"the class {text!r} is not registered with torch.utils._pytree",
            expected="a class that this process knows",
            found=text,
            remedy=f"import {text.rpartition('.')[0]} before parsing",
        )
    return classes[text]
