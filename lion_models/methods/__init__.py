"""The methods: LION and those that it is compared with, written from their papers.

A method is one file, which registers what it brings; see `registry`.
"""

from importlib import import_module

from lion_models.methods.registry import METHODS, MethodConfig, register

__all__ = ["METHODS", "SHOWN_METHODS", "MethodConfig", "register"]

# What `lion demo` and, unless told otherwise, `lion compare` run.
SHOWN_METHODS = ("linear", "vpt-deep", "lion")

# In the order of tables.
for _file in ("linear", "finetune", "adapter", "lora", "vpt", "lion"):
    import_module(f"{__name__}.{_file}")
