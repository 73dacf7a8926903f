"""Studies: arms, seeds and a search over runs or any function that returns metrics, with tables, intervals and plots."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.study.plots import Curves, Finals, Tradeoff
    from effscale.study.search import Point, Search
    from effscale.study.study import Arm, Results, Study
    from effscale.study.table import interval
    from effscale.study.trial import Trial

__all__ = [
    "Arm",
    "Curves",
    "Finals",
    "Point",
    "Results",
    "Search",
    "Study",
    "Tradeoff",
    "Trial",
    "interval",
]

lazy_package(__name__)
