"""Other ways through a frozen backbone's blocks, which share its weights and leave it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lion_models.backbones.frozen import FrozenBackbone
from lion_models.base.errors import UserError

__all__ = ["CheckpointedBlock", "checkpoint_blocks", "transformer_parts", "with_modules"]


class CheckpointedBlock(nn.Module):
    """A block whose activations are computed again in the backward pass instead of kept.

    Args:
        block: (B, T, D) to (B, T, D), the same every time: a block in eval mode is.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if not torch.is_grad_enabled():
            return self.block(tokens)
        return checkpoint(self.block, tokens, use_reentrant=False, preserve_rng_state=False)


def transformer_parts(
    backbone: FrozenBackbone, option: str, instead: str
) -> tuple[tuple[nn.Module, ...], Callable[[Tensor], Tensor]]:
    """The blocks of a backbone and the pooling behind them.

    Args:
        backbone: any.
        option: what asks for them, for the message.
        instead: what to do without them, for the message.

    Raises:
        UserError: the backbone has no blocks.
    """
    if not backbone.blocks or backbone.pool is None:
        raise UserError(
            f"{option}: needs a backbone made of transformer blocks; "
            f"'{backbone.name}' has none; {instead}"
        )
    return backbone.blocks, backbone.pool


def checkpoint_blocks(backbone: FrozenBackbone) -> FrozenBackbone:
    """The same backbone with activation checkpointing: memory for time, the same gradients.

    A training step then keeps what enters each block and, while it goes back, what one block holds.

    Args:
        backbone: with blocks; shared, not changed.

    Raises:
        UserError: no blocks.
    """
    blocks, pool = transformer_parts(backbone, "`checkpoint_backbone`", "leave the option out")
    twins = tuple(CheckpointedBlock(block) for block in blocks)

    def encode(tokens: Tensor) -> Tensor:
        for block in twins:
            tokens = block(tokens)
        return pool(tokens)

    view = copy.copy(backbone)
    view.blocks = twins
    view.encode = encode
    return view


def with_modules(block: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A block that shares everything with another one but the modules given.

    Args:
        block: not changed.
        replacements: modules by path, such as `attn.proj`.

    Returns:
        The twin. It must not be registered in a module: `train()` there would reach the frozen
        modules that it shares.
    """
    if isinstance(block, CheckpointedBlock):
        return CheckpointedBlock(with_modules(block.block, replacements))
    # Parameters, buffers and hooks stay the same objects; only the table of children is the twin's.
    twin = copy.copy(block)
    twin._modules = dict(block._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for path, module in replacements.items():
        child, _, rest = path.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = module
        else:
            twin._modules[child] = module
    for child, some in inner.items():
        twin._modules[child] = with_modules(block.get_submodule(child), some)
    return twin
