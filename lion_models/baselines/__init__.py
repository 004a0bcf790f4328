"""Methods that LION is compared with, written from their papers."""

from lion_models.baselines.linear import LinearProbe
from lion_models.baselines.vpt import VPTDeep

__all__ = ["LinearProbe", "VPTDeep"]
