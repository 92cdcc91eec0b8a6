"""What the op computes, in plain torch."""

from torch import Tensor


def score_reference(stream: Tensor, weight: Tensor) -> Tensor:
    """[B, S]: the product of every token with the weight; see `depthc.codegen.kernels.score.score_rows`.

    Example:
        >>> import torch
        >>> score_reference(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1.0, 10.0]))
        tensor([[21., 43.]])
    """
    return (stream.to(weight.dtype) * weight).sum(-1)
