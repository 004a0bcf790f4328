"""LION: two implicit layers around a frozen backbone (Wang et al., AAAI 2024, arXiv 2303.09992)."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_models.backbones import FrozenBackbone
from lion_models.classifier import TunedClassifier
from lion_models.errors import choose
from lion_models.implicit_prompt import ImplicitPrompt, Solver

__all__ = ["SIDES", "Lion"]

SIDES = ("both", "input", "output")


class Lion(TunedClassifier):
    """One implicit layer in front of the backbone's encoder, one behind it, then a linear head.

    That two equilibrium layers enrich the input and the representation of a frozen backbone is the
    paper's [paper]; that both are bottlenecks, on the tokens and on the pooled feature, is
    ours [ours].

    Args:
        backbone: frozen.
        classes: outputs of the head.
        sides: `both`, `input` or `output`.
        hidden: bottleneck width h of each layer.
        strength: initial lambda of each layer.
        solver: for both layers; None means Anderson with its defaults.
        iterations: None for equilibria, k for k explicit layers; see `ImplicitPrompt`.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        sides: str = "both",
        hidden: int = 8,
        strength: float = 1.0,
        solver: Solver | None = None,
        iterations: int | None = None,
    ) -> None:
        super().__init__(backbone, classes)
        choose("--sides", sides, SIDES)

        def layer(dim: int) -> ImplicitPrompt:
            return ImplicitPrompt(dim, hidden, strength, solver, iterations)

        self.input_prompt = layer(backbone.token_dim) if sides != "output" else None
        self.output_prompt = layer(backbone.feature_dim) if sides != "input" else None

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Tokens (B, T, D), or features (B, F) when no layer sits in front of the encoder."""
        return self.backbone.embed(images) if self.input_prompt else self.backbone(images)

    def tuned(self, fixed: Tensor) -> Tensor:  # output of `frozen` -> (B, classes)
        feature = self.backbone.encode(self.input_prompt(fixed)) if self.input_prompt else fixed
        if self.output_prompt:
            feature = self.output_prompt(feature)
        return self.head(feature)

    @property
    def prompts(self) -> dict[str, ImplicitPrompt]:
        """The layers that exist, by side."""
        layers = {"input": self.input_prompt, "output": self.output_prompt}
        return {side: layer for side, layer in layers.items() if layer is not None}

    @torch.no_grad()
    def residual_traces(self, fixed: Tensor, solver: Solver) -> dict[str, Tensor]:
        """Residual per step, (B, n), of each implicit layer for one batch.

        Args:
            fixed: output of `frozen`.
            solver: one with `record_trace=True`.
        """
        traces = {}
        if self.input_prompt:
            traces["input"] = self.input_prompt.residual_trace(fixed, solver)
            fixed = self.backbone.encode(self.input_prompt(fixed))
        if self.output_prompt:
            traces["output"] = self.output_prompt.residual_trace(fixed, solver)
        return {side: trace for side, trace in traces.items() if trace is not None}
