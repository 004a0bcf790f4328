"""Weights in files: read without running any code of theirs, and loaded by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lion_models.base.errors import UserError
from lion_models.base.torch_files import DamagedError, load_torch

__all__ = ["load_weights", "not_fetched", "read_state"]


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file, of which no code is run.

    Raises:
        UserError: no such file, damaged, or it holds something else than tensors by name.
    """
    if not path.is_file():
        raise UserError(f"`backbone`: weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = load_torch(path)
    except (DamagedError, SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"`backbone`: {path} is damaged, or not a file of plain weights ({error}); "
            "fetch it again, or save its state dict as safetensors"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"`backbone`: {path} holds no state dict; expected tensors by name")
    return dict(state)


def load_weights(
    network: nn.Module, state: Mapping[str, Tensor], backbone: str, head: Sequence[str] = ()
) -> None:
    """Load a state dict that may have a head the network lacks, or lack one it has.

    Args:
        network: what to load into; it takes the tensors as they are, without copying.
        state: the weights.
        backbone: for the message.
        head: prefixes of the head's names; only these may be missing or too many.

    Raises:
        UserError: other names or shapes than the network's.
    """
    prefixes = tuple(head)
    own = network.state_dict()
    wrong = [name for name in own if name not in state and not name.startswith(prefixes)]
    wrong += [name for name in state if name not in own and not name.startswith(prefixes)]
    wrong += [
        f"{name} {tuple(value.shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape and not name.startswith(prefixes)
    ]
    if wrong:
        raise UserError(
            f"`backbone` {backbone}: the weights are another network's: "
            f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''} do not fit"
        )
    fitting = {
        name: value.to(own[name].dtype)
        for name, value in state.items()
        if name in own and value.shape == own[name].shape
    }
    network.load_state_dict(fitting, strict=False, assign=True)


def not_fetched(backbone: str, error: Exception, instead: str) -> UserError:
    """What to say when a hub did not give its weights."""
    return UserError(
        f"`backbone` {backbone}: its weights could not be fetched "
        f"({type(error).__name__}: {error}); {instead}"
    )
