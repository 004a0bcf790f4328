"""Sources of images, seeded splits, and the sealed test set."""

from typing import TYPE_CHECKING

from lion_models.base.lazy import exports

if TYPE_CHECKING:
    from lion_models.data.base import ArraySource as ArraySource
    from lion_models.data.base import FolderSource as FolderSource
    from lion_models.data.base import Source as Source
    from lion_models.data.base import check_fit as check_fit
    from lion_models.data.folder import find_images as find_images
    from lion_models.data.images import decode_image as decode_image
    from lion_models.data.named.catalogue import CATALOGUE as CATALOGUE
    from lion_models.data.sources import open_source as open_source
    from lion_models.data.splits import SealedTest as SealedTest
    from lion_models.data.splits import Split as Split
    from lion_models.data.splits import Task as Task
    from lion_models.data.splits import class_counts as class_counts
    from lion_models.data.splits import make_task as make_task
    from lion_models.data.splits import split_rows as split_rows
    from lion_models.data.splits import split_source as split_source
    from lion_models.data.splits import take_task as take_task
    from lion_models.data.transforms import Geometry as Geometry
    from lion_models.data.transforms import training_view as training_view
    from lion_models.data.verify import BadFilesWarning as BadFilesWarning
    from lion_models.data.verify import CopiesWarning as CopiesWarning
else:  # type checkers would take any name for one that is there
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
