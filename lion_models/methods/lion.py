"""LION: two implicit layers around a frozen backbone (Wang et al., AAAI 2024, arXiv 2303.09992)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.backbones.frozen import SPACES
from lion_models.backbones.vit_s14_focus import VIT_S14_FOCUS
from lion_models.base.errors import UserError, choose
from lion_models.base.options import Need, option
from lion_models.methods.base import Recipe, TunedClassifier
from lion_models.methods.lion_ladder import (
    LADDER_RECIPE,
    LADDER_STRENGTH,
    PLACE_DROPOUT,
    LionLadder,
)
from lion_models.methods.registry import MethodConfig, register
from lion_models.prompts.implicit_prompt import ImplicitPrompt
from lion_models.prompts.pruning import Pruning, check_prunable
from lion_models.prompts.solved import Solver

__all__ = ["Lion", "LionConfig"]

SIDES = ("both", "input", "output")
OUTPUT_INPUTS = ("pooled", "embedding")
FORMS = ("ends", "ladder")
# Where the ladder was better on validation images: docs/lion_results.md, "Which form".
LADDER_ON = VIT_S14_FOCUS
STRENGTH = 1.0


class Lion(TunedClassifier):
    """One implicit layer in front of the backbone's encoder, one behind it, then a linear head.

    That two equilibrium layers enrich the input and the representation of a frozen backbone is the
    paper's [paper]; that both are bottlenecks, on the tokens or the image and on the pooled
    feature, is ours [ours].

    Args:
        backbone: frozen.
        classes: outputs of the head.
        sides: `both`, `input` or `output`.
        hidden: bottleneck width h of each layer.
        strength: initial lambda of each layer.
        solver: for both layers; None means Anderson with its defaults.
        iterations: None for equilibria, k for k explicit layers; see `ImplicitPrompt`.
        space: of the input layer: `token` (what `embed` gives), `pixel` (the image); None means
            `token` where the backbone has tokens.
        output_input: what drives the output layer's equilibrium, which is added to the pooled
            feature in either case: `pooled` (that feature) or `embedding` (the mean of the tokens
            that the backbone makes of the image, before the input layer adds to them).

    Raises:
        UserError: a backbone without tokens where they are asked for, or with tokens of another
            width than the feature's for `embedding`.
    """

    method = "lion"

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        sides: str = "both",
        hidden: int = 8,
        strength: float = STRENGTH,
        solver: Solver | None = None,
        iterations: int | None = None,
        space: str | None = None,
        output_input: str = "pooled",
    ) -> None:
        super().__init__(backbone, classes)
        choose("sides", sides, SIDES)
        choose("output_input", output_input, OUTPUT_INPUTS)
        if space is None:
            space = backbone.space
        choose("space", space, SPACES)
        if space == "token" and backbone.space != "token" and sides != "output":
            raise UserError(f"`space` token: '{backbone.name}' has no tokens; use `space` pixel")
        if output_input == "embedding" and sides != "input":
            _check_embedding(backbone)
        self.space = space
        self.output_input = output_input

        def layer(dim: int, space: str = "token") -> ImplicitPrompt:
            return ImplicitPrompt(dim, hidden, strength, solver, iterations, space)

        width = backbone.token_dim if space == "token" else backbone.channels
        self.input_prompt = layer(width, space) if sides != "output" else None
        self.output_prompt = layer(backbone.feature_dim) if sides != "input" else None

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """What the first trained layer sees: images (B, C, S, S) -> (B, ...).

        Tokens (B, T, D) or images (B, C, S, S) with an input layer. Without one, the feature
        (B, F), or feature and mean token (B, 2F) where the latter drives the output layer.
        """
        if self.input_prompt is not None:
            return self.backbone.embed(images) if self._after_embed else images
        tokens = self.backbone.embed(images)
        feature = self.backbone.encode(tokens)
        if self.output_input == "pooled":
            return feature
        return torch.cat([feature, tokens.mean(1)], dim=1)

    def tuned(self, fixed: Tensor) -> Tensor:  # output of `frozen` -> (B, classes)
        feature, source = self._features(fixed)
        if self.output_prompt is not None:
            feature = self.output_prompt(feature, source)
        return self.head(feature)

    @property
    def _after_embed(self) -> bool:
        """Whether the input layer acts on what `embed` gives, tokens or the normalised image."""
        return self.space == self.backbone.space

    @property
    def implicit_layers(self) -> dict[str, ImplicitPrompt]:
        """The layers that exist, by side."""
        layers = {"input": self.input_prompt, "output": self.output_prompt}
        return {side: layer for side, layer in layers.items() if layer is not None}

    @torch.no_grad()
    def residual_traces(self, fixed: Tensor) -> dict[str, Tensor]:
        traces = {}
        if self.input_prompt is not None:
            traces["input"] = self.input_prompt.residual_trace(fixed)
        if self.output_prompt is not None:
            feature, source = self._features(fixed)
            driver = feature if source is None else source
            traces["output"] = self.output_prompt.residual_trace(driver)
        return {side: trace for side, trace in traces.items() if trace is not None}

    def _features(self, fixed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feature (B, F) in front of the output layer, and what else drives that, (B, F)."""
        embedding = self.output_input == "embedding"
        if self.input_prompt is None:
            width = self.backbone.feature_dim
            return (fixed[:, :width], fixed[:, width:]) if embedding else (fixed, None)
        tokens = prompted = self.input_prompt(fixed)
        if self.space == "token":
            tokens = fixed
        elif not self._after_embed:
            tokens = prompted = self.backbone.embed(prompted)
        return self.backbone.encode(prompted), tokens.mean(1) if embedding else None


def _check_embedding(backbone: FrozenBackbone) -> None:
    tokens = backbone.space == "token"
    if not tokens or backbone.token_dim != backbone.feature_dim:
        width = f"tokens of width {backbone.token_dim}" if tokens else "no tokens"
        raise UserError(
            f"`output_input` embedding: needs tokens as wide as the feature "
            f"({backbone.feature_dim}), '{backbone.name}' has {width}; use `output_input` pooled"
        )


_SOLVERS: dict[str, Callable[..., Solver]] = {
    "anderson": deqcore.Anderson,
    "broyden": deqcore.Broyden,
    "picard": deqcore.Picard,
}
_SOLVES = Need(
    lambda run: run.method.iterations is None,
    "is about solving for the equilibrium, and `iterations` applies explicit layers instead; "
    "leave one out",
)
_ENDS = Need(
    lambda run: run.method.form == "ends",
    "is about the layers of `form` ends, and `form` ladder has none of them; leave one out",
)
_LADDER = Need(
    lambda run: run.method.form == "ladder",
    "is about `form` ladder, which is not there; add it, or leave `{name}` out",
)
_INPUT = Need(
    lambda run: run.method.sides != "output",
    "is about the input layer, which `sides` output leaves out; leave one out",
)
_OUTPUT = Need(
    lambda run: run.method.sides != "input",
    "is about the output layer, which `sides` input leaves out; leave one out",
)


@register("lion", Lion, Recipe(augment="affine"), colour="#D55E00")
@dataclass(frozen=True)
class LionConfig(MethodConfig):
    """Where the implicit layers are, how they are solved, and what is pruned of them."""

    implicit = True

    sides: str = option("both", "Where there is an implicit layer.", choices=SIDES, needs=(_ENDS,))
    hidden: int = option(8, "Bottleneck width; of the ladder, numbers taken of each token.", low=1)
    strength: float | None = option(
        None,
        "Initial lambda of both layers; of the ladder, what its logits are multiplied by.",
        expected="a number such as 1.0",
        unset=f"{STRENGTH}, of the ladder {LADDER_STRENGTH}",
    )
    solver: str = option("anderson", "Of the equilibrium.", choices=_SOLVERS, needs=(_SOLVES,))
    rtol: float | None = option(
        None,
        "Relative tolerance of the solver.",
        above=0,
        below=1000,
        unset="deqcore's, 1e-4",
        needs=(_SOLVES,),
    )
    max_steps: int = option(50, "Most evaluations of the cell per solve.", low=1, needs=(_SOLVES,))
    iterations: int | None = option(
        None, "This many explicit layers instead of an equilibrium.", low=1, unset="equilibrium"
    )
    space: str | None = option(
        None,
        "Where the input layer acts.",
        choices=SPACES,
        unset="token where the backbone has tokens",
        needs=(_ENDS, _INPUT),
    )
    output_input: str = option(
        "pooled", "What drives the output layer.", choices=OUTPUT_INPUTS, needs=(_ENDS, _OUTPUT)
    )
    sparsity: float = option(
        0.0,
        "Share of the implicit layers' weights that is pruned.",
        low=0,
        below=1,
        expected="a share from 0 to below 1",
    )
    prune_at: int | None = option(None, "Epoch that ends with pruning.", low=1, unset="the last")
    form: str | None = option(
        None,
        "A layer in front of the backbone and one behind it, or a ladder beside it, which reads "
        "the tokens of every block.",
        choices=FORMS,
        unset=f"ladder on {LADDER_ON}, else ends",
        silent=(None, "ends"),
    )
    patch_grid: int = option(
        4,
        "Rows and columns that the ladder averages patches to, at most.",
        low=1,
        needs=(_LADDER,),
        silent=True,
    )
    place_dropout: float = option(
        PLACE_DROPOUT,
        "Share of the tokens of all blocks that the ladder does not read in a training step.",
        low=0,
        below=1,
        expected="a share from 0 to below 1",
        needs=(_LADDER,),
        silent=True,
    )

    def check(self) -> None:
        if self.prune_at is not None and not self.sparsity:
            raise UserError("`prune_at`: says when to prune; say how much with `sparsity`, too")

    def pruning(self, epochs: int) -> Pruning | None:
        if not self.sparsity:
            return None
        epoch = epochs if self.prune_at is None else self.prune_at
        if epoch > epochs:
            raise UserError(f"`prune_at`: expected an epoch from 1 to {epochs}, got {epoch}")
        return Pruning(self.sparsity, epoch)

    def on(self, backbone: str) -> LionConfig:
        if self.form is not None:
            return self
        ends = self.sides != "both" or self.space or self.output_input != "pooled"
        ladder = backbone.partition(",")[0] == LADDER_ON and not ends
        return replace(self, form="ladder" if ladder else "ends")

    def settled(self) -> dict[str, Any]:
        if self.strength is not None:
            return {"strength": self.strength}
        return {"strength": LADDER_STRENGTH if self.form == "ladder" else STRENGTH}

    @property
    def own_recipe(self) -> Recipe:
        return LADDER_RECIPE if self.form == "ladder" else self.recipe

    @property
    def goes_back(self) -> bool:
        return self.form == "ends" and self.sides != "output"

    def __str__(self) -> str:
        if self.goes_back:
            return self.name
        return f"{self.name} with `{'form` ladder' if self.form == 'ladder' else 'sides` output'}"

    def build(self, backbone: FrozenBackbone, classes: int) -> Lion | LionLadder:
        if self.form is None:
            return self.on(backbone.name).build(backbone, classes)
        solver = _SOLVERS[self.solver](rtol=self.rtol, max_steps=self.max_steps)
        strength = self.settled()["strength"]
        model: Lion | LionLadder
        if self.form == "ladder":
            model = LionLadder(
                backbone,
                classes,
                self.hidden,
                self.patch_grid,
                solver,
                self.iterations,
                strength=strength,
                dropout=self.place_dropout,
            )
        else:
            model = Lion(
                backbone,
                classes,
                self.sides,
                self.hidden,
                strength,
                solver,
                self.iterations,
                self.space,
                self.output_input,
            )
        if self.sparsity:
            check_prunable(model)
        return model
