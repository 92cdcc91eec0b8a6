"""Activation checkpointing: keep no activations inside blocks in training, but compute them again backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from depthc.ir.errors import InputError


class Checkpointing:
    """What a module does where activations are checkpointed; under the names by which transformers' Trainer asks."""

    _checkpoint: Callable[..., Any] | None = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep no activations inside blocks in training but compute them again backward; choices of tokens are kept.

        Args:
            activation_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint.
            every_n_layers, offload: the Trainer passes them; only their defaults are known here.

        Raises:
            InputError: an option that is not known here, such as reentrant checkpoints.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        given = {"use_reentrant": options["use_reentrant"], "every_n_layers": every_n_layers, "offload": offload}
        for name, expected in {"use_reentrant": False, "every_n_layers": 1, "offload": False}.items():
            found = given[name]
            if found != expected:
                raise InputError(
                    f"checkpoints of activations have no {name}={found!r} here",
                    expected=f"{name}={expected!r}",
                    found=repr(found),
                    remedy="leave it out: every block is computed again, without reentrance",
                )
        self._checkpoint = partial(checkpoint, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpoint = None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()
