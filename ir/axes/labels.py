"""Labels: what every dimension of a value is, as an ordered product of atoms.

`[B, S, H*D]` split into heads is `(batch)(token)(64)`, then `(batch)(token)(4)(16)`: the free atom of size 64 became
the product of two. A merged dimension (`batch*token` in a mixture of experts) is a longer product. A dimension of
size 1 is the empty product, so it is compatible with everything, as in broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

AtomKind = Literal["batch", "token", "key", "sorted", "free"]


@dataclass(eq=False, slots=True)
class Atom:
    """One axis that cannot be divided, unless it is free.

    Kinds: the `batch`; the `token` axis; the same tokens as `key`s of an attention; tokens in the order in which a
    mixture of experts `sorted` them; and `free` axes (features, heads, foreign sequences), which may be divided or
    turn out to be one of the others. `before` and `after` are dimensions concatenated to a token or key axis (attention
    sinks, memory keys). `base` is the dimension that a sorted axis permutes; without one it holds some of the tokens,
    and the data decide how many.
    """

    kind: AtomKind
    size: int
    before: tuple[Dim, ...] = ()
    after: tuple[Dim, ...] = ()
    base: Dim = ()
    binding: Dim | None = field(default=None, repr=False)

    @property
    def extended(self) -> bool:
        """Whether something is concatenated to the axis."""
        return bool(self.before or self.after)


Dim = tuple[Atom, ...]
Label = tuple[Dim, ...]


class Conflict(Exception):
    """Two axes that meet in one dimension and cannot be the same."""

    def __init__(self, left: Dim, right: Dim) -> None:
        self.left, self.right = left, right
        super().__init__(f"{dim_text(left)} meets {dim_text(right)}")


class SplitAxis(Exception):
    """A reshape that divides an axis which is not free."""

    def __init__(self, atom: Atom) -> None:
        self.atom = atom
        super().__init__(f"splits the {atom.kind} axis")


def resolve(dim: Dim) -> Dim:
    """A dimension with every bound variable replaced by what it is bound to."""
    if all(atom.binding is None for atom in dim):
        return dim
    parts: list[Atom] = []
    for atom in dim:
        parts.extend((atom,) if atom.binding is None else resolve(atom.binding))
    return tuple(parts)


def size_of(dim: Dim) -> int:
    """The captured size of a dimension."""
    return prod(atom.size for atom in dim)


def kinds_in(dims: Iterable[Dim]) -> set[AtomKind]:
    """The kinds of all atoms in some dimensions."""
    return {atom.kind for dim in dims for atom in dim}


def dim_text(dim: Dim) -> str:
    """A dimension for people: `batch*token`, `4*16`, `1`."""
    return "*".join(str(a.size) if a.kind == "free" else a.kind for a in dim) or "1"


def label_text(label: Label) -> str:
    """A label for people: `[batch, token, 4, 16]`."""
    return f"[{', '.join(map(dim_text, label))}]"


class Unifier:
    """Makes dimensions equal by binding free atoms; counts what it bound."""

    def __init__(self) -> None:
        self.bound = 0

    def bind(self, atom: Atom, dim: Dim) -> None:
        """Let a free atom be a product of others."""
        if atom in dim:
            raise Conflict((atom,), dim)
        atom.binding = dim
        self.bound += 1

    def split(self, atom: Atom, left: int) -> tuple[Atom, Atom]:
        """Divide a free atom into two, the outer one of size `left`."""
        parts = Atom("free", left), Atom("free", atom.size // left)
        self.bind(atom, parts)
        return parts

    def unify(self, left: Dim, right: Dim) -> Dim:
        """The dimension that both are; an empty one broadcasts.

        Raises:
            Conflict: they hold different axes that are not free.
        """
        left, right = resolve(left), resolve(right)
        if left == right or not right:
            return left
        if not left:
            return right
        if size_of(left) != size_of(right):
            raise Conflict(left, right)
        for one, other in ((left, right), (right, left)):
            if len(one) == 1 and one[0].kind == "free":
                self.bind(one[0], other)
                return other
        return self._piecewise(left, right)

    def _piecewise(self, left: Dim, right: Dim) -> Dim:
        """Align two products from the left, dividing the larger free atom where boundaries differ."""
        a, b = list(left), list(right)
        done: list[Atom] = []
        while a and b:
            first, other = (a, b) if a[0].size >= b[0].size else (b, a)
            large, small = first[0], other[0]
            if large is small:
                done.append(large)
                del a[0], b[0]
            elif large.size == small.size and "free" in (large.kind, small.kind):
                done.extend(self.unify((large,), (small,)))
                del a[0], b[0]
            elif large.kind == "free" and large.size % small.size == 0:
                first[:1] = self.split(large, small.size)
            else:
                raise Conflict(left, right)
        return tuple(done)

    def redistribute(self, label: Label, shape: Sequence[int]) -> list[Dim | int]:
        """The dimensions of a reshape: atoms in row-major order over new sizes.

        A free dimension that lines up with nothing comes back as its size.

        Raises:
            SplitAxis: an axis that is not free would be divided.
        """
        atoms = [atom for dim in label for atom in resolve(dim)]
        result: list[Dim | int] = []
        for group, sizes in _aligned(atoms, shape):
            result.extend(self._group(group, sizes))
        return result

    def _group(self, atoms: list[Atom], sizes: list[int]) -> list[Dim | int]:
        if size_of(tuple(atoms)) != prod(sizes):
            _keep_whole(atoms)
            return list(sizes)
        if len(sizes) == 1:
            return [tuple(atoms)]
        result: list[Dim | int] = []
        left = list(atoms)
        for size in sizes:
            dim: list[Atom] = []
            while size > 1 and left:
                atom = left.pop(0)
                if atom.kind == "free" and atom.size > size and atom.size % size == 0:
                    atom, rest = self.split(atom, size)
                    left.insert(0, rest)
                if size % atom.size:
                    _keep_whole(atoms)
                    return list(sizes)
                dim.append(atom)
                size //= atom.size
            result.append(tuple(dim))
        return result


def _keep_whole(atoms: Iterable[Atom]) -> None:
    fixed = next((a for a in atoms if a.kind != "free"), None)
    if fixed is not None:
        raise SplitAxis(fixed)


def _aligned(atoms: list[Atom], shape: Sequence[int]) -> Iterable[tuple[list[Atom], list[int]]]:
    """Smallest runs of atoms and of sizes that have the same product."""
    queue = list(atoms)
    group: list[Atom] = []
    sizes: list[int] = []
    have, want = 1, 1
    for size in shape:
        if size == 1 and not sizes:
            yield [], [1]
            continue
        sizes.append(size)
        want *= size
        while have < want and queue:
            group.append(queue.pop(0))
            have *= group[-1].size
        if have == want:
            yield group, sizes
            group, sizes, have, want = [], [], 1, 1
    if sizes:
        yield group, sizes
