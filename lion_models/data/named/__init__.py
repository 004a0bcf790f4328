"""Data sets by name: what there is, where it comes from, and how it is opened."""
