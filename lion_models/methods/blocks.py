"""What the methods that work inside transformer blocks share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lion_models.backbones.blocks import CheckpointedBlock
from lion_models.base.errors import UserError

__all__ = ["through", "timm_linear"]


def timm_linear(block: nn.Module, path: str, method: str, backbone: str) -> nn.Linear:
    """The linear layer that timm's vision transformer has under a path of its block.

    Args:
        block: of a frozen backbone.
        path: such as `attn.qkv`.
        method, backbone: names, for the message.

    Raises:
        UserError: the block has none.
    """
    inner = block.block if isinstance(block, CheckpointedBlock) else block
    try:
        linear = inner.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        found = "nothing" if linear is None else type(linear).__name__
        raise UserError(
            f"`method` {method}: expected blocks with a linear layer '{path}' (timm's names), "
            f"found {found} in {type(inner).__name__} of '{backbone}'; use vpt-deep, lion or full"
        )
    return linear


def through(blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
    """Tokens after all blocks."""
    for block in blocks:
        tokens = block(tokens)
    return tokens
