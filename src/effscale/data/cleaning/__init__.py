"""Filter out documents that are short, repetitive, duplicated or in the wrong language, and write datasheets of corpora."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.data.cleaning.cleaned import Cleaned
    from effscale.data.cleaning.datasheet import DatasheetEntry, write_datasheet
    from effscale.data.cleaning.duplicates import NearDuplicates
    from effscale.data.cleaning.quality import Quality
    from effscale.data.cleaning.ray import ray_runner

__all__ = [
    "Cleaned",
    "DatasheetEntry",
    "NearDuplicates",
    "Quality",
    "ray_runner",
    "write_datasheet",
]

lazy_package(__name__)
