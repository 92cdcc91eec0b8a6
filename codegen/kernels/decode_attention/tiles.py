"""How the rows of a cache are shared out among programs, and what a program holds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PROGRAMS = 1056  # eight for each of 132 multiprocessors; fixed, so that sums do not depend on the device
SPLITS = 24  # for more, adding the shares up takes longer than they do
QUERIES = 16384  # bytes of a key head's queries, and
TILE = 16384  # of a tile of keys: a GPU of compute capability 8.6 has 99 KiB for a program


class Tiles(NamedTuple):
    """How rows are shared out.

    Attributes:
        keys: rows of a tile.
        share: rows of a program, a multiple of those of a tile.
        splits: programs a key head.
    """

    keys: int
    share: int
    splits: int


def tiles_of(sequences: int, key_heads: int, size: int, width: int) -> Tiles:
    """As small tiles as there may be shares, else large ones; a row has `width` bytes.

    Example:
        >>> tiles_of(1, 5, 1032, 128), tiles_of(32, 8, 1032, 256), tiles_of(1, 5, 136, 128)
        (Tiles(keys=64, share=64, splits=17), Tiles(keys=64, share=320, splits=4), Tiles(keys=16, share=16, splits=9))
    """
    wanted = max(1, min(SPLITS, PROGRAMS // (sequences * key_heads)))
    largest = max(16, min(64, TILE // width))
    keys = next((n for n in (16, 32) if n < largest and -(-size // n) <= wanted), largest)
    count = -(-size // keys)
    share = -(-count // wanted) * keys
    return Tiles(keys, share, -(-size // share))


def options_of(features: int) -> dict[str, int]:
    """How a program that takes a share is compiled."""
    return {"num_warps": 2 if features <= 64 else 4, "num_stages": 2}


def width_of(q: Tensor) -> int:
    """Features of a tile."""
    return max(16, 1 << (q.shape[3] - 1).bit_length())


def queries_of(q: Tensor, k: Tensor) -> int:
    """Queries of a tile."""
    return max(16, 1 << (q.shape[1] // k.shape[1] - 1).bit_length())
