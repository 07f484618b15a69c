"""Where the pages of a region come from: nothing, memory, a file, another region, a Python function."""

from uspace_mm.stores.base import Mode, Store
from uspace_mm.stores.file import FileStore
from uspace_mm.stores.memory import MemoryStore, ZeroStore

__all__ = ["FileStore", "MemoryStore", "Mode", "Store", "ZeroStore"]
