"""Logs: what passes did, where torch's own tools look for it.

`TORCH_LOGS="+depthc"` prints every program, `TORCH_LOGS="depthc"` a line a pass; under `TORCH_TRACE` every program is
an artifact of the trace, which tlparse shows.
"""

from __future__ import annotations

import logging

from torch._logging import trace_structured

from depthc.ir.program import Program

log = logging.getLogger("depthc.passes")


def tell(name: str, program: Program, line: str = "") -> None:
    """Say that a program was made: `name` is the stage's, "01_tie"; `line` what the pass did."""
    if line:
        log.info("%s", line)
    log.debug("%s:\n%s", name, program)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"depthc_{name}", "encoding": "string"},
        payload_fn=lambda: str(program),
        expect_trace_id=False,
    )
