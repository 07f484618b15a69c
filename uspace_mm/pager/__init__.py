"""A pager on userfaultfd: memory whose pages come from a store when they are touched."""

from uspace_mm.pager.errors import PageLost, RegionBusy
from uspace_mm.pager.guard import guard
from uspace_mm.pager.pager import Pager
from uspace_mm.pager.region import Region
from uspace_mm.pager.statistics import Counters, Histogram, Latency, Statistics

__all__ = [
    "Counters",
    "Histogram",
    "Latency",
    "PageLost",
    "Pager",
    "Region",
    "RegionBusy",
    "Statistics",
    "guard",
]
