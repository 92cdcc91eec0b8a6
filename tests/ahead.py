"""Compile kernels ahead of time for Hopper, which needs no GPU, and say what they take there.

It is a program of its own, since a process in which Triton interprets does not compile: `built` runs it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHARED = 227 * 1024  # bytes that a program may have on Hopper
WORDS = (
    *("ld.global.v4", "ld.global.v2", "st.global.v4", "st.global.v2", "ld.local", "st.local"),
    *("atom.global", "atom.shared", "red.global", "wgmma.mma_async", "cp.async.cg"),
)
_EVEN = ("_row", "_head", "_token")  # strides, which are multiples of 16 in practice


def built(builds: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """What each build takes: REG, STACK, LOCAL and SHARED in bytes, and how often PTX has each of `WORDS`.

    Args:
        builds: for each `module`, `kernel`, `types` of its arguments ("i32" for those that are not named; "i32 even"
            for multiples of 16, lists for tuples), `constants`, and Triton's `options`.
    """
    command, env = [sys.executable, __file__, json.dumps(builds)], {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def taken(
    module: str, kernel: str, types: Mapping[str, Any], constants: Mapping[str, Any], options: Mapping[str, int]
) -> dict[str, int]:
    """Compile one kernel; pointers are aligned, as the launcher finds them to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    names = function.arg_names
    given = {n: types.get(n, "i32 even" if n.endswith(_EVEN) else "i32") for n in names if n not in constants}
    places = {(names.index(n),): own for n, own in given.items() if isinstance(own, str)}
    places |= {
        (names.index(n), i): own for n, each in given.items() if isinstance(each, list) for i, own in enumerate(each)
    }
    even = [place for place, own in places.items() if own[0] == "*" or own.endswith(" even")]
    source = ASTSource(
        function,
        {n: "constexpr" if n in constants else _signature(given[n]) for n in names},
        constexprs=dict(constants),
        attrs={place: [["tt.divisibility", 16]] for place in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    sizes["SHARED"] += compiled.metadata.shared
    return sizes | {word: compiled.asm["ptx"].count(word) for word in WORDS}


def _signature(given: str | list[str]) -> Any:
    return tuple(map(_signature, given)) if isinstance(given, list) else given.removesuffix(" even")


if __name__ == "__main__":
    print(json.dumps([taken(**build) for build in json.loads(sys.argv[1])]))
