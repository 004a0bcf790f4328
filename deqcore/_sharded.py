"""Cells whose parameters lie on several processes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def refuse_sharded(cell: object) -> None:
    """Raise if FSDP gathers parameters in each call of ``cell``.

    Processes evaluate their cells as often as their rows need, and would wait for each other for
    ever.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import
    if fsdp is None or not isinstance(cell, nn.Module):
        return
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for name, module in cell.named_modules():
        if isinstance(module, kinds):
            where = f"cell.{name}" if name else "cell"
            raise RuntimeError(
                f"deqcore.ImplicitLayer: {where} is sharded by FSDP, which gathers its parameters "
                "in each evaluation; a solve makes as many as its rows need, not the same on all "
                "processes, which would wait for each other for ever. Call fully_shard on the "
                "ImplicitLayer, or on a module around it: parameters are then gathered once a solve"
            )
