"""Sources of images, seeded splits, and the sealed test set."""

from lion_models.data.images import decode_image
from lion_models.data.sources import Source, find_images, open_source
from lion_models.data.splits import SealedTest, Split, Task, make_task, split_rows

__all__ = [
    "SealedTest",
    "Source",
    "Split",
    "Task",
    "decode_image",
    "find_images",
    "make_task",
    "open_source",
    "split_rows",
]
