"""The progress bars of training."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from lion_models.training import FitState, RunConfig


class ProgressBars:
    """One progress bar per run, with loss, validation accuracy and solver steps."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._config: RunConfig | None = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, config: RunConfig, state: FitState) -> None:
        row = state.history[-1]
        if config != self._config or self._bar is None:
            self.__exit__()
            self._config = config
            self._bar = tqdm(
                total=config.epochs,
                initial=row["epoch"] - 1,
                unit="epoch",
                desc=f"{config.method} seed {config.seed}",
            )
        steps = "/".join(f"{figures['steps']:.0f}" for figures in row["solver"].values())
        shown = {"loss": f"{row['loss']:.3f}", "val": f"{100 * row['validation_accuracy']:.1f}%"}
        self._bar.set_postfix(shown | ({"steps": steps} if steps else {}), refresh=False)
        self._bar.update()
