"""Weights of which only the kept entries exist: patterns, products, layers, pruning."""

import sys

from deqcore.sparse import layer, pattern, prune
from deqcore.sparse.functional import masked_linear
from deqcore.sparse.layer import MaskedLinear
from deqcore.sparse.pattern import SparsityPattern
from deqcore.sparse.prune import prune_layer, restore_pruned, rewind_pruned

__all__ = [
    "MaskedLinear",
    "SparsityPattern",
    "masked_linear",
    "prune_layer",
    "restore_pruned",
    "rewind_pruned",
]

# The modules' names of 0.1.0, by which pickled patterns and layers look for their classes.
for _name, _module in {"sparsity": pattern, "masked": layer, "pruning": prune}.items():
    sys.modules[f"deqcore.{_name}"] = _module
    setattr(sys.modules["deqcore"], _name, _module)
