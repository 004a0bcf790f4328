"""What a training step keeps for its backward pass, in bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lion_models.methods.base import TunedClassifier

__all__ = ["kept_bytes"]


class _Births(TorchDispatchMode):
    """Remembers every storage that an operator makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # An address is used again once its storage is gone: the newest one counts.
                self._born[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def living(self, besides: set[int]) -> int:
        return sum(
            size
            for address, (storage, size) in self._born.items()
            if address not in besides and not storage.expired()
        )


def kept_bytes(model: TunedClassifier, images: Tensor) -> int:
    """Bytes of the tensors that are alive between the forward and the backward pass of a step.

    These are the activations that autograd keeps, and whatever else the forward pass leaves
    behind; weights, gradients, the optimizer's state and the inputs of the trained part are not
    counted, nor is what lives only during the forward pass (a solver's history, which is of one
    size for any number of steps). Counted are all tensors that operators made, not only those that
    autograd says it saved, so that nothing can be kept elsewhere unseen.

    Args:
        model: put into train mode; its weights are not changed.
        images: float (B, C, S, S) in [0, 1].
    """
    model.train()
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    fixed = model.frozen(images)
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held |= {fixed.untyped_storage().data_ptr()}
    with torch.enable_grad(), _Births() as births:
        loss = F.cross_entropy(model.tuned(fixed), labels)
        kept = births.living(held)
    loss.backward()  # a step that cannot go backward would have no memory worth telling
    model.zero_grad(set_to_none=True)
    return kept
