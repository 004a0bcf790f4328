"""Methods that LION is compared with, written from their papers."""

from lion_models.methods.adapter import ADAPTER_PLACES, Adapters
from lion_models.methods.finetune import FineTune
from lion_models.methods.linear import LinearProbe
from lion_models.methods.lora import LoRA
from lion_models.methods.vpt import VPTDeep, VPTPad, VPTShallow

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
