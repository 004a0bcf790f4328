"""The options that say which images a run uses."""

from __future__ import annotations

from dataclasses import dataclass

from lion_models.base.errors import UserError
from lion_models.base.options import Need, Options, option
from lion_models.data.levels import parse_range
from lion_models.data.named.catalogue import CATALOGUE
from lion_models.data.transforms import TRANSFORMS
from lion_models.data.verify import BAD_FILES, VERIFY

__all__ = ["DataConfig"]

_A_FOLD = Need(
    lambda run: run.data.fold is not None,
    "a run tests on one of them; say which by `fold`, or let a study take each in turn",
)


@dataclass(frozen=True)
class DataConfig(Options):
    """Images, and how they are split into training, validation and test."""

    data: str = option(
        help="A name of 'lion data list', torchvision:NAME, hf:NAME, or a folder: a sub-folder of "
        "images per class, IDX files, VTAB-1k lists, or a saved Hugging Face data set; or a zip "
        "file of one, or a CSV file of paths and labels.",
        names=CATALOGUE,
    )
    shots: int | None = option(
        20, "Training images per class, or 'all' (70/10/20 split).", low=1, word="all"
    )
    validation_shots: int | None = option(
        None, "Validation images per class.", low=1, unset="as many as `shots`"
    )
    test_cap: int | None = option(
        None, "Most test images per class.", low=1, unset="all that are left"
    )
    imbalance: float | None = option(
        None,
        "Training images of the first class over those of the last, exponential between.",
        low=1,
        below=1e6,
        expected="1 or more and below 1,000,000",
        unset="balanced classes",
    )
    folds: int | None = option(
        None,
        "Cross-validation: each image is tested once, in one of so many parts of its class.",
        low=2,
        unset="one test part",
        needs=(_A_FOLD,),
        silent=True,
    )
    fold: int | None = option(
        None, "The fold to test on, alone.", low=1, unset="each in turn", silent=True
    )
    transform: str = option(
        "square", "How pictures are fitted to the backbone's square.", choices=TRANSFORMS
    )
    value_range: str | None = option(
        None,
        "Values of pictures with more than 8 bits that are black and white, as 0:4095.",
        unset="one rule for the data set",
        silent=True,
    )
    draft: bool = option(
        False,
        "Decode large JPEG files at a half, a quarter or an eighth of their size, twice what the "
        "backbone sees or more: several times faster.",
        silent=True,
    )
    bad_files: str = option("fail", "Missing and damaged image files.", choices=BAD_FILES)
    verify: str = option(
        "full",
        "Decode every image file once before the start, or read its beginning only.",
        choices=VERIFY,
    )

    @property
    def held_out(self) -> tuple[int, int] | None:
        """The fold to test on, of how many; None without folds."""
        return None if self.fold is None or self.folds is None else (self.fold, self.folds)

    def check(self) -> None:
        """The range has to be one, and a fold one of those that there are."""
        if self.fold is not None and not 1 <= self.fold <= (self.folds or 0):
            found = f"{self.fold} of {self.folds or 'none'}"
            raise UserError(f"`fold`: expected one of `folds`, from 1, got {found}")
        if self.value_range is not None:
            parse_range(self.value_range)
