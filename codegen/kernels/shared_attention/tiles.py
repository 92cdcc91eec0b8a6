"""Tile sizes of the kernels, as data.

In half precision and for heads of up to 128 features, the fastest of those that `bench/tiles.py` tries on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        queries: queries a tile.
        keys: keys a tile.
        warps: warps a program.
        stages: depth of the software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of the three large kernels."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


# By bytes a number and features a head, rounded up to a power of two.
PLANS = {
    (2, 64): Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 1)),
    (2, 128): Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 1)),
    (2, 256): Plan(Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
    (4, 64): Plan(Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
    (4, 128): Plan(Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2)),
    (4, 256): Plan(Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(16, 16, 8, 2)),
}


def width_of(features: int) -> int:
    """Features a head in a tile: a power of two, at least 16."""
    return max(16, 1 << (features - 1).bit_length())


def plan_of(features: int, itemsize: int) -> Plan:
    """The plan for heads of so many features."""
    return PLANS[itemsize, max(64, width_of(features))]
