from __future__ import annotations
def prefers_sparse(op, tokens, pattern, x):
    return True
