"""The architecture zoo: every model that the compiler is tried on, by name."""

from __future__ import annotations

from .base import Architecture
from .decoders import DECODERS
from .encoders import ENCODERS
from .handwritten import HAND_WRITTEN, META
from .heldout import HELD_OUT
from .hybrids import HYBRIDS

ZOO: dict[str, Architecture] = {entry.name: entry for entry in DECODERS + HYBRIDS + ENCODERS + HAND_WRITTEN + HELD_OUT}
CI: tuple[str, ...] = tuple(name for name, entry in ZOO.items() if entry.ci)

__all__ = ["CI", "META", "ZOO", "Architecture"]
