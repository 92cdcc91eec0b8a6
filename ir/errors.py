"""Every error a user can meet. A message says what, where, expected against found, and one remedy."""

from __future__ import annotations


class DepthError(Exception):
    """Base of all depthc errors.

    Args:
        what: one sentence that says what is wrong.
        where: the layer and the source line of the user's model, or the position in a text.
        expected: what would have been accepted.
        found: what was there instead.
        remedy: one thing to do about it.

    Example:
        >>> raise DepthError("no layers repeat", where="model.py:12", remedy="check the model")
        Traceback (most recent call last):
        ...
        depthc.ir.errors.DepthError: no layers repeat
          where: model.py:12
          remedy: check the model
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", remedy: str = "") -> None:
        self.what, self.where, self.expected, self.found, self.remedy = what, where, expected, found, remedy
        lines = [what]
        for label, text in (("where", where), ("expected", expected), ("found", found), ("remedy", remedy)):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))


class CaptureError(DepthError):
    """The model cannot be captured as one graph."""


class OutlineError(DepthError):
    """The captured graph has no repeated layers."""


class InputError(DepthError):
    """Arguments that the captured program does not accept: structure, shape, dtype or device."""


class VerifyError(DepthError):
    """A program that breaks a rule of the IR."""


class ParseError(DepthError):
    """Text that is not a depth program; `where` holds line and column."""


class SubsetError(DepthError):
    """A block that cannot run on a subset of its tokens."""


class IncrementalError(DepthError):
    """A program that cannot be evaluated token by token."""


class StateDictError(DepthError):
    """A state dict with missing, unexpected or misshapen entries."""


class RecipeError(DepthError):
    """A recipe that does not exist or does not apply."""


class RoutingError(DepthError):
    """A selection of tokens that cannot be made: scores that are not numbers."""


class CheckpointError(DepthError):
    """A saved folder that is damaged, incomplete, or of a newer version."""


class DumpError(DepthError):
    """A dump that cannot be written."""


class TargetError(DepthError):
    """A model that the command line cannot find or build."""


class MlirError(DepthError):
    """A program, or an op of one, that has no MLIR form, or no native code; or torch-mlir is not installed."""
