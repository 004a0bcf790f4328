"""What a run is about to learn from, in a few lines before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from lion_models.base.errors import UserError, few
from lion_models.cli.console import out
from lion_models.run import Run
from lion_models.run.data_record import levels_of
from lion_models.run.workbench import Workbench
from lion_models.study.study import OnTrials
from lion_models.study.trial import OnEvent, Trial

__all__ = ["announced", "summary"]

SHOWN = 4  # of a study's conditions


def announced(on_trials: OnTrials, bench: Workbench) -> OnTrials:
    """What to call with the trials of a study: says what they are about to learn from, once."""
    said: set[str] = set()

    def begin(trials: Sequence[Trial]) -> OnEvent:
        for text in _summaries([trial for trial in trials if trial.result() is None], bench):
            if text not in said:
                out.print(text, highlight=False, soft_wrap=True)
                said.add(text)
        return on_trials(trials)

    return begin


def _summaries(trials: Sequence[Trial], bench: Workbench) -> list[str]:
    """A summary for each kind of data and backbone that the trials have."""
    methods = tuple(dict.fromkeys(trial.config.method.name for trial in trials))
    kinds: dict[object, Run] = {}
    for trial in trials:
        data = replace(trial.config.data, fold=None)
        kind = data, trial.config.backbone.backbone
        kinds.setdefault(kind, Run(trial.folder, trial.config, bench=bench))
    texts: list[str] = []
    for run in list(kinds.values())[:SHOWN]:
        with suppress(UserError):  # which the trial itself will say
            texts.append(summary(run, methods))
    if len(kinds) > SHOWN:
        texts.append(f"... and {len(kinds) - SHOWN} more combinations of data and backbone")
    return texts


def summary(run: Run, methods: Sequence[str] = ()) -> str:
    """Classes, images of each part, and what the backbone makes of a picture.

    Args:
        run: of which.
        methods: of all runs that share its data; empty means the run's own.
    """
    methods = methods or (run.config.method.name,)
    source, split, backbone = run.source, run.split, run.backbone
    parts = (("training", split.train), ("validation", split.validation), ("test", split.test))
    counts = [f"{len(rows):,} for {name}" for name, rows in parts]
    used = sum(len(rows) for _, rows in parts)
    unused = f", {len(source) - used:,} not used" if used < len(source) else ""
    held = run.config.data.held_out
    fold = f" (fold {held[0]} of {held[1]})" if held else ""
    each = torch.bincount(source.labels, minlength=len(source.classes))
    least, most = int(each.min()), int(each.max())
    range_of = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    side, colour = backbone.image_size, "in colour" if backbone.channels == 3 else "in grey"
    lines = [
        f"data: {run.place}, {len(source):,} images in {len(source.classes)} classes "
        f"({few(source.classes)}), {range_of} a class",
        f"images: {', '.join(counts)}{fold}{unused}",
        f"backbone: {backbone.name}, which sees {side} x {side} pixels {colour}; "
        f"method{'s' * (len(methods) > 1)}: {', '.join(methods)}",
    ]
    levels = levels_of(source)
    if levels is not None:
        ranges = (f"{kind} {low:g} to {high:g}" for kind, (low, high) in levels.to_dict().items())
        lines.append(f"pictures of more than 8 bits: {', '.join(ranges)} are black to white")
    if source.skipped:
        lines.append(f"left out: {len(source.skipped)} unusable files")
    return "\n".join(lines)
