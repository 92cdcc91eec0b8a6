"""The tied layers of one row, recursion by recursion, and the keys that each recursion sees. recipes.md, section 4."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .attention import Key
from .rows import Row
from .tying import Tied, unique_layers


def require_tied(sharing: str, kv: str) -> None:
    """Recursions are the same layers each time; so are those whose keys they read."""
    if sharing not in ("cycle", "middle_cycle") or kv not in ("recursion", "share_first", "update"):
        raise ValueError(f"routing over {sharing} with keys of {kv}")


@dataclass(frozen=True)
class Recursions:
    row: Row
    tied: Tied
    sharing: str
    loops: int
    kv: str
    first: dict[int, dict[int, Key]] = field(default_factory=dict)  # the keys and values of recursion 0, by slot

    @property
    def ends(self) -> int:
        """Layers on either side of the recursions, which every token goes through."""
        return int(self.sharing == "middle_cycle")

    def before(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return self.row.run(self.tied.slots[0], 0, states) if self.ends else states

    def after(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return self.row.run(self.tied.slots[-1], len(self.tied.order) - 1, states) if self.ends else states

    def run(self, r: int, active: dict[int, Tensor]) -> dict[int, Tensor]:
        """Recursion `r` for its active tokens."""
        unique = unique_layers(self.sharing, len(self.tied.order), self.loops)
        for depth in range(self.ends + r * unique, self.ends + (r + 1) * unique):
            slot = self.tied.order[depth]
            active = self.row.run(self.tied.slots[slot], depth, active, self.keys(r, slot, active))
        return active

    def keys(self, r: int, slot: int, active: dict[int, Tensor]) -> dict[int, Key]:
        """Of the active tokens, of all tokens in recursion 0, or of these where a token is not active."""
        if r and self.kv == "share_first":
            return self.first[slot]
        own = self.row.keys(self.tied.slots[slot], active)
        if not r:
            self.first[slot] = own
        return dict(sorted((self.first[slot] | own).items())) if self.kv == "update" else own
