"""Processes that share a device: they get ready beside each other, and are timed alone."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """Turns at a device, by locks on two files, held until `close`.

    Whoever wants to be alone shuts the door behind itself, so that it waits for those inside and not for those to come.

    Args:
        path: of the files, without an ending; by default there is nobody to share the device with.

    Attributes:
        waited: seconds, for others.

    Example:
        >>> with Turns().alone():
        ...     pass
    """

    def __init__(self, path: Path | None = None) -> None:
        self.waited = 0.0
        self._files = [] if path is None else [path.with_suffix(end).open("w") for end in (".door", ".room")]

    def beside(self) -> None:
        """Use the device beside others, once those who want to be alone have been; anew if it is used already."""
        self._take(fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the device while nobody else does, and then beside others."""
        self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.beside()

    def close(self) -> None:
        """Leave the device to others."""
        for file in self._files:
            file.close()

    def _take(self, how: int) -> None:
        if not self._files:
            return
        began, (door, room) = time.perf_counter(), self._files
        fcntl.flock(room, fcntl.LOCK_UN)
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, how)
        fcntl.flock(door, fcntl.LOCK_UN)
        self.waited += time.perf_counter() - began
