"""A compiler for the depth of transformers.

`capture` turns any `nn.Module` into a depth program, `compile` rewrites its depth by a recipe and lowers it to a module
again, `save` and `load` keep such modules, `generate` and `Decoder` continue sequences, and `parse` reads the text that
`print(program)` wrote.
"""

from depthc.bisect import Bisection, bisect
from depthc.checkpoint import load, save
from depthc.compiler import compile
from depthc.dumps import dump
from depthc.explain import Explanation, explain
from depthc.ir.capture import capture
from depthc.ir.errors import (
    CaptureError,
    CheckpointError,
    DepthError,
    DumpError,
    IncrementalError,
    InputError,
    MlirError,
    OutlineError,
    ParseError,
    RecipeError,
    RoutingError,
    StateDictError,
    SubsetError,
    TargetError,
    VerifyError,
)
from depthc.ir.program import Program
from depthc.ir.text.parser import parse
from depthc.passes.recipe import Recipe
from depthc.runtime.decode import Decoder
from depthc.runtime.generate import generate

__version__ = "0.1.0"

__all__ = [
    "Bisection",
    "CaptureError",
    "CheckpointError",
    "Decoder",
    "DepthError",
    "DumpError",
    "Explanation",
    "IncrementalError",
    "InputError",
    "MlirError",
    "OutlineError",
    "ParseError",
    "Program",
    "Recipe",
    "RecipeError",
    "RoutingError",
    "StateDictError",
    "SubsetError",
    "TargetError",
    "VerifyError",
    "bisect",
    "capture",
    "compile",
    "dump",
    "explain",
    "generate",
    "load",
    "parse",
    "save",
]
