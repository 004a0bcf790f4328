"""Defects that are planted in the kernels' sources, to prove that each would be noticed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One change to the kernels' sources, and what must notice it."""

    file: str
    before: str  # occurs once
    after: str
    case: str
    flavour: str  # with no sanitizer, the emulator itself must see it
    message: str  # part of the report
