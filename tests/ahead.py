"""Compiling kernels ahead of time for Hopper, which needs no GPU, and reading what came out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program may have on Hopper


@dataclass(frozen=True)
class Built:
    """A compiled kernel in numbers."""

    registers: int
    local: int
    shared: int
    wgmma: int
    copies: int


def build(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], warps: int, stages: int) -> Built:
    """Compile a kernel; pointers are aligned and strides are multiples of 16, as they are in practice.

    Args:
        types: of the arguments; those that are not named are i32.
        constants: compile-time arguments; an argument that is not given is None here.
    """
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = [n.endswith(("_row", "_head", "_token")) or t.startswith("*") for n, t in signature.items()]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    registers, stack, local = _resources(compiled.asm["cubin"])
    count = compiled.asm["ptx"].count
    return Built(registers, stack + local, compiled.metadata.shared, count("wgmma.mma_async"), count("cp.async.cg"))


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of local memory a thread."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3])
