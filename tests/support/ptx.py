"""Inline PTX of a kernel, run for one lane: what the emulation's host paths cannot show."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

_ASM = re.compile(r"asm volatile\((.*?)\s:\s", re.DOTALL)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ADDRESS = re.compile(r"(?P<base>%?\w+)(?:\+(?P<offset>\d+))?$")


def blocks_of(source: Path, compiler: str) -> list[list[str]]:
    """The statements of each asm volatile of a file, in order, its macros expanded."""
    text = re.sub(r"^#include.*$", "", source.read_text(), flags=re.MULTILINE)
    command = [compiler, "-x", "c++", "-E", "-P", "-D__CUDA_ARCH__=900", "-D__CUDACC__", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return [_statements("".join(_STRING.findall(b))) for b in _ASM.findall(done.stdout)]


def _statements(text: str) -> list[str]:
    found = []
    for part in re.split(r";|\\n", text):
        label = re.match(r"\s*(\w+%=):", part)
        if label:
            found.append(label.group(1) + ":")
            part = part[label.end() :]
        if part.strip(" {}") and not part.lstrip(" {").startswith(".reg"):
            found.append(part.strip())
    return found


def _float(bits: int) -> np.float32:
    return np.float32(struct.unpack("f", struct.pack("I", bits))[0])


def float_bits(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]


def _half(bits: int) -> int:
    return float_bits(struct.unpack("e", struct.pack("H", bits))[0])


def _fma(a: int, b: int, c: int) -> int:
    exact = float(_float(a)) * float(_float(b)) + float(_float(c))  # as good as, for small cases
    return float_bits(np.float32(exact))


_COMPUTE: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "bfe.u32": lambda a, at, length: a >> at & ((1 << length) - 1),
    "setp.ne.u32": lambda a, b: int(a != b),
    "cvt.f32.f16": _half,
    "fma.rn.f32": _fma,
    "mul.rn.f32": lambda a, b: float_bits(_float(a) * _float(b)),
    "add.rn.f32": lambda a, b: float_bits(_float(a) + _float(b)),
}


class Machine:
    """Registers and operands hold 32 bits each; memory is by word."""

    def __init__(self, statements: list[str], operands: list[int], memory: dict[int, int]) -> None:
        self._statements = statements
        self._labels = {s[:-1]: i for i, s in enumerate(statements) if s.endswith("%=:")}
        self._registers: dict[str, int] = {}
        self.operands = operands
        self.memory = memory

    def run(self) -> None:
        at: int | None = 0
        while at is not None and at < len(self._statements):
            jump = self._step(self._statements[at])
            at = at + 1 if jump is None else self._labels[jump]

    def _step(self, statement: str) -> str | None:
        if statement.endswith("%=:"):
            return None
        name, rest = statement.split(None, 1)
        if name.startswith("@"):
            return self._step(rest) if self._get(name[1:]) else None
        words = [word.strip(" {}[]") for word in rest.split(",")]
        if name == "bra.uni":
            return words[0]
        if name.startswith("ld.shared"):
            self._load(name, words)
        elif name == "st.shared.f32":
            self.memory[self._get(words[0])] = self._get(words[1])
        elif name == "mov.b32" and len(words) == 3:  # a pair of halves
            bits = self._get(words[2])
            self._put(words[0], bits & 0xFFFF)
            self._put(words[1], bits >> 16)
        else:
            self._put(words[0], _COMPUTE[name](*map(self._get, words[1:])))
        return None

    def _load(self, name: str, words: list[str]) -> None:
        address = _ADDRESS.match(words[-1])
        assert address is not None, words
        first = self._get(address["base"]) + int(address["offset"] or 0)
        count = len(words) - 1
        assert {1: "b32", 2: "v2", 4: "v4"}[count] in name
        assert first % (4 * count) == 0, "not aligned"
        for i, word in enumerate(words[:-1]):
            self._put(word, self.memory[first + 4 * i])

    def _get(self, word: str) -> int:
        if word.startswith("%"):
            return self.operands[int(word[1:])]
        return int(word, 0) if word[0].isdigit() else self._registers[word]

    def _put(self, word: str, value: int) -> None:
        if word.startswith("%"):
            self.operands[int(word[1:])] = value
        else:
            self._registers[word] = value
