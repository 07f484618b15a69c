"""Where the pages of a region come from: nothing, memory, a file, another region, a Python function."""

from uspace_mm.stores.base import Mode, Store
from uspace_mm.stores.file import FileStore
from uspace_mm.stores.function import FunctionStore
from uspace_mm.stores.memory import MemoryStore, ZeroStore
from uspace_mm.stores.region import RegionStore

__all__ = ["FileStore", "FunctionStore", "MemoryStore", "Mode", "RegionStore", "Store", "ZeroStore"]
