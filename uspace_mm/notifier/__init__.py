"""Who holds an outside reference to memory is told before the memory goes away.

The kernel's mmu_notifier, for user space.
"""

from uspace_mm.notifier._subscriber import NotifierStats
from uspace_mm.notifier.age import Age, Ages, Evidence
from uspace_mm.notifier.cache import Cached, CacheStats, Follow, RegistrationCache
from uspace_mm.notifier.errors import (
    ForkedAway,
    NoProcess,
    NotifierError,
    ReadTimeout,
    Released,
    TryAgain,
    WouldDeadlock,
)
from uspace_mm.notifier.event import Event, Kind, Promise, Reason, Source
from uspace_mm.notifier.io_uring import IoUringBuffers, IoUringStats, Slot
from uspace_mm.notifier.notifier import Notifier
from uspace_mm.notifier.process import Process
from uspace_mm.notifier.registration import Registration, register
from uspace_mm.notifier.space import Space, this_process
from uspace_mm.notifier.stream import AsyncEvents, Events, aevents, events
from uspace_mm.notifier.telling import Change, changed, in_callback, invalidate_page, invalidating, young

__all__ = [
    "Age",
    "Ages",
    "AsyncEvents",
    "CacheStats",
    "Cached",
    "Change",
    "Event",
    "Events",
    "Evidence",
    "Follow",
    "ForkedAway",
    "IoUringBuffers",
    "IoUringStats",
    "Kind",
    "NoProcess",
    "Notifier",
    "NotifierError",
    "NotifierStats",
    "Process",
    "Promise",
    "ReadTimeout",
    "Reason",
    "Registration",
    "RegistrationCache",
    "Released",
    "Slot",
    "Source",
    "Space",
    "TryAgain",
    "WouldDeadlock",
    "aevents",
    "changed",
    "events",
    "in_callback",
    "invalidate_page",
    "invalidating",
    "register",
    "this_process",
    "young",
]
