"""The implicit layer, how it is trained robustly, and how it is pruned."""
