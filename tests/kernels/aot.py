"""Compile a kernel for sm_90 without a GPU, and say what it takes there.

A program of its own, since a process in which Triton interprets does not compile:
`aot.py '[{"module": ..., "kernel": ..., "types": {...}, "constants": {...}, "num_warps": 4}, ...]'` prints JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

WORDS = (
    "ld.global.v4",
    "ld.global.v2",
    "st.global.v4",
    "st.global.v2",
    "ld.local",
    "st.local",
    "atom.global",
    "atom.shared",
    "red.global",
)


def compiled(builds: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What each build takes: registers, bytes of stack and shared memory, and how often PTX has some instructions."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(builds)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, int]] = json.loads(done.stdout)
    return found


def main() -> None:
    print(json.dumps([taken(**build) for build in json.loads(sys.argv[1])]))


def taken(module: str, kernel: str, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> dict[str, int]:
    """Compile with pointers, and what is called `even`, divisible by 16, as the launcher finds them to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    names = function.arg_names
    even = {name for name, type in types.items() if type.startswith("*") or type.endswith(" even")}
    signature = {name: "constexpr" if name in constants else types[name].removesuffix(" even") for name in names}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even & set(names) - set(constants)},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    sizes["SHARED"] += built.metadata.shared
    return sizes | {word: built.asm["ptx"].count(word) for word in WORDS}


if __name__ == "__main__":
    main()
