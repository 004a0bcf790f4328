"""Methods that LION is compared with, written from their papers."""

from lion_models.baselines.adapter import ADAPTER_PLACES, Adapters
from lion_models.baselines.finetune import FineTune
from lion_models.baselines.linear import LinearProbe
from lion_models.baselines.lora import LoRA
from lion_models.baselines.vpt import VPTDeep, VPTPad, VPTShallow

__all__ = [
    "ADAPTER_PLACES",
    "Adapters",
    "FineTune",
    "LinearProbe",
    "LoRA",
    "VPTDeep",
    "VPTPad",
    "VPTShallow",
]
