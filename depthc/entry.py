"""What `torch.compile(..., backend="depthc")` finds: the backend, and a start on what its first compile will ask for.

Dynamo traces before it calls a backend, and a tracing Python leaves all other processors idle.
"""

import torch

from depthc.backend import backend
from depthc.codegen.early import start_early

__all__ = ["backend"]

if not torch.accelerator.is_available():
    start_early()
