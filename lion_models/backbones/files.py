"""Where weights lie: packages that are found but never imported, the user's cache, plain files."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lion_models.base.errors import UserError

__all__ = [
    "cache_folder",
    "load_weights",
    "not_fetched",
    "package_file",
    "read_state",
    "require",
    "write_state",
]


def cache_folder() -> Path:
    """Where copies of weights are kept: `lion/weights` in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lion" / "weights"


def package_file(package: str, inside: str) -> Path | None:
    """A data file of an installed package, without running any of its code; None if not there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inside
        if path.is_file():
            return path
    return None


def require(module: str, backbone: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import.
        backbone: what needs it, for the message.
        extra: the extra of this project that brings it.

    Raises:
        UserError: it is not installed, or fails to import.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == package:
            raise UserError(
                f"--backbone {backbone}: needs the package '{package}'; "
                f"run: pip install 'deqcore[{extra}]'"
            ) from error
        broken: Exception = error
    except Exception as error:  # whatever a package raises while it is imported
        broken = error
    raise UserError(
        f"--backbone {backbone}: the package '{package}' is installed but does not import "
        f"({type(broken).__name__}: {broken}); install one that fits torch {torch.__version__}"
    ) from broken


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file, of which no code is run.

    Raises:
        UserError: no such file, damaged, or it holds something else than tensors by name.
    """
    if not path.is_file():
        raise UserError(f"--backbone: weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the damage happens to cause
        raise UserError(
            f"--backbone: {path} is damaged, or not a file of plain weights ({error}); "
            "fetch it again, or save its state dict as safetensors"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--backbone: {path} holds no state dict; expected tensors by name")
    return dict(state)


def write_state(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file: a temporary one beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number: two processes may fill the cache at once.
    partial = path.with_suffix(f".part{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)
        raise


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
            f"--backbone {backbone}: the weights are another network's: "
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
        f"--backbone {backbone}: its weights could not be fetched "
        f"({type(error).__name__}: {error}); {instead}"
    )
