"""What a method brings: its options, its classifier, its recipe and its colour."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError, choose
from lion_models.base.options import Options
from lion_models.methods.base import Recipe, TunedClassifier
from lion_models.prompts.pruning import Pruning

__all__ = [
    "METHODS",
    "MethodConfig",
    "Recipe",
    "colour_of",
    "method_named",
    "recipe_of",
    "register",
]

# For methods without a colour; Tol's muted scheme, told apart with any colour vision.
_PALETTE = ("#332288", "#88CCEE", "#117733", "#999933", "#CC6677", "#882255", "#AA4499")


class MethodConfig(Options):
    """The options of one method, and how its classifier is made of them; see `register`."""

    name: ClassVar[str]
    model: ClassVar[type[TunedClassifier]]
    recipe: ClassVar[Recipe]
    colour: ClassVar[str]
    implicit: ClassVar[bool] = False  # has implicit layers
    tunes_copies: ClassVar[bool] = False  # of the backbone's weights, which are not frozen then

    def build(self, backbone: FrozenBackbone, classes: int) -> TunedClassifier:
        """A classifier, freshly initialised from torch's generator.

        Options are passed in the order of the fields, for a method that takes others to override.

        Raises:
            UserError: the backbone is not one that the method can work with.
        """
        options = (getattr(self, each.name) for each in fields(self))
        return self.model(backbone, classes, *options)

    def pruning(self, epochs: int) -> Pruning | None:
        """What is pruned in so many epochs, and when; None for nothing.

        Raises:
            UserError: at an epoch that no training reaches.
        """
        return None

    def on(self, backbone: str) -> Self:
        """The same options, with what only the name of a backbone settles."""
        return self

    def settled(self) -> dict[str, Any]:
        """Values of options that are left open, by others; config.json has them."""
        return {}

    @property
    def own_recipe(self) -> Recipe:
        """The recipe of the classifier that these options make."""
        return self.recipe

    @property
    def goes_back(self) -> bool:
        """Whether training goes back through the backbone's blocks."""
        return True

    def __str__(self) -> str:
        return self.name


_methods: dict[str, type[MethodConfig]] = {}
METHODS: Mapping[str, type[MethodConfig]] = MappingProxyType(_methods)
"""Every method by name, in the order of tables."""

_Config = TypeVar("_Config", bound=type[MethodConfig])


def register(
    name: str,
    model: type[TunedClassifier],
    recipe: Recipe | None = None,
    colour: str | None = None,
) -> Callable[[_Config], _Config]:
    """Give a method its name; decorates its configuration.

    Args:
        name: what `method` calls it.
        model: the class of its classifiers.
        recipe: chosen on validation data; None means the one that suits most.
        colour: in every picture; None takes one that no other method has.

    Raises:
        TypeError: the configuration has options and is no dataclass.
    """

    def decorate(config: _Config) -> _Config:
        own = inspect.get_annotations(config)
        if own and "__dataclass_params__" not in vars(config):
            raise TypeError(
                f"register({name!r}): expected a dataclass, got {config.__name__}, whose "
                f"{', '.join(own)} would be lost; put @dataclass(frozen=True) below @register"
            )
        config.name, config.model = name, model
        config.recipe = Recipe() if recipe is None else recipe
        taken = {each.colour for each in _methods.values()}
        config.colour = colour or next((c for c in _PALETTE if c not in taken), "#000000")
        _methods[name] = config
        return config

    return decorate


def method_named(name: str) -> type[MethodConfig]:
    """The configuration of a method.

    Raises:
        UserError: no such method.
    """
    if not isinstance(name, str):
        raise UserError(f"`method`: expected a text, got {name!r}")
    return _methods[choose("method", name, _methods)]


def colour_of(name: str) -> str:
    """A method's colour; that of none for a method that is not registered here."""
    return _methods[name].colour if name in _methods else "#000000"


def recipe_of(model: TunedClassifier) -> Recipe:
    """The recipe of a model or its method; for a class of one's own, the one that suits most."""
    if model.recipe is not None:
        return model.recipe
    return _methods[model.method].recipe if model.method in _methods else Recipe()
