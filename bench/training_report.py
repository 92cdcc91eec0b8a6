"""The results of the training experiment: one JSON file, whole at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import provenance, write
from training_plan import Settings

from depthc.ir.errors import DepthError


class SettingsError(DepthError):
    """Results of one experiment that would go into the file of another one."""


class Results:
    """What is known of an experiment, and the file that holds it.

    Raises:
        SettingsError: the file holds results of other settings, or of another corpus.
    """

    def __init__(self, path: Path, settings: Settings, sha256: str, device: str) -> None:
        self.path, self.settings = path, settings
        made_by = provenance(device)
        self.device = made_by["device"]
        own = {"settings": json.loads(json.dumps(asdict(settings))), "corpus": sha256}
        self.report: dict[str, Any] = {"speed": {}, "runs": {}}
        if path.exists():
            self.report = json.loads(path.read_text())
            self._require(own)
        self.report = made_by | own | {name: self.report[name] for name in ("speed", "runs")}

    def _require(self, own: Mapping[str, Any]) -> None:
        """That the file's results are of this experiment."""
        theirs = {**self.report["settings"], "corpus": self.report["corpus"]}
        ours = {**own["settings"], "corpus": own["corpus"]}
        other = [name for name in ours if ours[name] != theirs.get(name)]
        # A budget may be settled after speeds were measured: those hold for any.
        if other and (self.report["runs"] or set(other) - {"tokens", "seeds"}):
            raise SettingsError(
                "these results are of another experiment",
                where=str(self.path),
                expected=", ".join(f"{name}={theirs.get(name)}" for name in other),
                found=", ".join(f"{name}={ours[name]}" for name in other),
                remedy="give the same options, or another --out",
            )

    @property
    def rows(self) -> dict[str, Any]:
        """Results by the name of the run."""
        return self.report["runs"]  # type: ignore[no-any-return]

    def forget_failures(self) -> None:
        """Drop runs that failed, so that they run again."""
        self.report["runs"] = {name: row for name, row in self.rows.items() if "failed" not in row}

    def keep(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a result."""
        self.rows[name] = dict(row)
        write(self.report, self.path)

    def speed(self, variant: str, door: str, found: Mapping[str, Any]) -> None:
        """Add a measurement."""
        self.report["speed"].setdefault(variant, {})[door] = dict(found)
        write(self.report, self.path)
