"""The CUDA bindings on a CPU: ``torch.ops.deqcore_emulated``, by tools/emulation.py.

csrc/cuda/X.cpp is compiled as it is; what it asks of torch about a GPU,
csrc/emulation/torch_device.h answers. A tensor on the CPU counts as one on the only GPU, unless it
is put elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import deqcore  # noqa: F401  (defines the ops)
from tools import emulation

NAMESPACE = "deqcore_emulated"


class EmulatedOps:
    """The ops of the CUDA bindings; those of one process share the order of threads and places."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(emulation.build("bindings")))
        # Kept: the definitions last as long as it does.
        self._definitions = torch.library.Library(NAMESPACE, "DEF")
        known = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
        for name in (name for namespace, name in known if namespace == "deqcore"):
            op = getattr(torch.ops.deqcore, name).default
            self._definitions.define(str(op._schema).split("::", 1)[1])
            torch.library.register_fake(f"{NAMESPACE}::{name}", op, lib=self._definitions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.deqcore_emulated, name)

    def launches(self) -> int:
        """How many there were so far in ``emulating``."""
        return int(self._library.emulate_launch_count())

    @contextmanager
    def emulating(
        self,
        *,
        seed: int = 0,
        places: Sequence[tuple[Tensor, int]] = (),
        refusal: str | None = None,
        trial: bool = False,
    ) -> Iterator[None]:
        """For a time: threads in that random order; tensors on these GPUs, -1 for the CPU.

        With ``refusal`` every launch fails, with these words; with ``trial`` paths on trial are
        taken.
        """
        self._library.emulate_as_usual()
        self._library.emulate_seed(ctypes.c_uint64(seed))
        for tensor, gpu in places:
            self._library.emulate_place(ctypes.c_void_p(tensor.data_ptr()), gpu)
        if refusal is not None:
            self._library.emulate_refusal(refusal.encode())
        if trial:
            self._library.emulate_trial()
        try:
            yield
        finally:
            self._library.emulate_as_usual()


@functools.cache
def load() -> EmulatedOps:
    """Build and register them, once.

    Raises:
        CompilerMissingError: no C++ compiler.
    """
    return EmulatedOps()
