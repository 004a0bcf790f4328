"""What a run is about to learn from, in a few lines before it starts."""

from __future__ import annotations

import torch

from lion_models.base.errors import few
from lion_models.run import Run
from lion_models.run.data_record import levels_of

__all__ = ["summary"]


def summary(run: Run) -> str:
    """Classes, images of each part, and what the backbone makes of a picture."""
    source, split, backbone = run.source, run.split, run.backbone
    parts = (("training", split.train), ("validation", split.validation), ("test", split.test))
    counts = [f"{len(rows):,} for {name}" for name, rows in parts]
    used = sum(len(rows) for _, rows in parts)
    unused = f", {len(source) - used:,} not used" if used < len(source) else ""
    each = torch.bincount(source.labels, minlength=len(source.classes))
    least, most = int(each.min()), int(each.max())
    range_of = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    side, colour = backbone.image_size, "in colour" if backbone.channels == 3 else "in grey"
    lines = [
        f"data: {run.place}, {len(source):,} images in {len(source.classes)} classes "
        f"({few(source.classes)}), {range_of} a class",
        f"images: {', '.join(counts)}{unused}",
        f"backbone: {backbone.name}, which sees {side} x {side} pixels {colour}; method: "
        f"{run.config.method.name}",
    ]
    levels = levels_of(source)
    if levels is not None:
        ranges = (f"{kind} {low:g} to {high:g}" for kind, (low, high) in levels.to_dict().items())
        lines.append(f"pictures of more than 8 bits: {', '.join(ranges)} are black to white")
    if source.skipped:
        lines.append(f"left out: {len(source.skipped)} unusable files")
    return "\n".join(lines)
