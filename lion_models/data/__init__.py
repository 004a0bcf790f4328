"""Sources of images, seeded splits, and the sealed test set."""

from lion_models.data.base import ArraySource, FolderSource, Source, check_fit
from lion_models.data.folder import find_images
from lion_models.data.images import decode_image
from lion_models.data.named.catalogue import CATALOGUE
from lion_models.data.sources import open_source
from lion_models.data.splits import (
    SealedTest,
    Split,
    Task,
    class_counts,
    make_task,
    split_rows,
    split_source,
)
from lion_models.data.transforms import Geometry, training_view
from lion_models.data.verify import BadFilesWarning, CopiesWarning

__all__ = [
    "CATALOGUE",
    "ArraySource",
    "BadFilesWarning",
    "CopiesWarning",
    "FolderSource",
    "Geometry",
    "SealedTest",
    "Source",
    "Split",
    "Task",
    "check_fit",
    "class_counts",
    "decode_image",
    "find_images",
    "make_task",
    "open_source",
    "split_rows",
    "split_source",
    "training_view",
]
