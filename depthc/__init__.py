"""A compiler for the depth of transformers.

`capture` turns any `nn.Module` into a depth program, `compile` rewrites its depth and lowers it to a module again,
`parse` reads the text that `print(program)` wrote.
"""

from depthc.compiler import compile
from depthc.ir.capture import capture
from depthc.ir.errors import (
    CaptureError,
    DepthError,
    IncrementalError,
    InputError,
    OutlineError,
    ParseError,
    RecipeError,
    StateDictError,
    SubsetError,
    VerifyError,
)
from depthc.ir.program import Program
from depthc.ir.text.parser import parse

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "DepthError",
    "IncrementalError",
    "InputError",
    "OutlineError",
    "ParseError",
    "Program",
    "RecipeError",
    "StateDictError",
    "SubsetError",
    "VerifyError",
    "capture",
    "compile",
    "parse",
]
