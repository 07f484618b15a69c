"""One file of /sys/kernel/mm/transparent_hugepage as a typed value that is checked before it is written.

Use it through :mod:`uspace_mm.kernel.transparent_hugepage`. What the kernel permits: mm/huge_memory.c,
mm/khugepaged.c and mm/shmem.c of Linux 6.18, Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from uspace_mm.errors import InputError, KernelError

T = TypeVar("T", str, int, bool)

UINT_MAX = 0xFFFFFFFF
_HINTS = {
    errno.EACCES: "needs root",
    errno.EPERM: "needs root",
    errno.EROFS: "/sys is mounted read-only here (a container): do it on the host",
    errno.ENOENT: "this kernel does not have it",
    errno.EINVAL: "the kernel does not take it, alone or together with the other settings",
    errno.ENOMEM: "not enough memory to start khugepaged",
}


class Setting(ABC, Generic[T]):
    """A file below ``root``; ``name`` is its path there, e.g. ``khugepaged/pages_to_scan``."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.name = name

    @property
    def writable(self) -> bool:
        """Whether the file is a setting at all, whoever the caller is; counters are not."""
        try:
            return bool(self.path.stat().st_mode & 0o222)
        except OSError:
            return False

    def text(self) -> str:
        """The file as it is, without the newline."""
        try:
            return self.path.read_text().rstrip("\n")
        except OSError as error:
            number = error.errno or errno.EIO
            raise KernelError(f"read({self.path})", number, hint=_HINTS.get(number, "")) from None

    def read(self) -> T:
        """The present value."""
        return self.parse(self._active(self.text()))

    def write(self, value: T) -> None:
        """Set the value. Raises InputError before anything is written when it is not permitted."""
        text = self.format(value)
        try:
            # One write(2), unbuffered: the kernel's answer belongs to it, not to a later close.
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            number = error.errno or errno.EIO
            raise KernelError(f"write({self.path}, {text!r})", number, hint=_HINTS.get(number, "")) from None

    def format(self, value: T) -> str:
        """What is written for `value`; raises InputError when it is not permitted."""
        if not self.writable:
            raise InputError(
                f"{self.name}: read only" if self.path.exists() else f"{self.name}: no such file"
            )
        return self._format(value)

    @abstractmethod
    def parse(self, text: str) -> T:
        """The value that `text` stands for, as a person would write it; raises InputError otherwise."""

    @property
    @abstractmethod
    def permitted(self) -> str:
        """What can be written, for people."""

    @abstractmethod
    def _format(self, value: T) -> str: ...

    def _active(self, text: str) -> str:
        return text

    def _refuse(self, value: object) -> InputError:
        return InputError(f"{self.name}: {value!r} is not permitted; permitted: {self.permitted}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Choice(Setting[str]):
    """One word of several; the file shows all of them, the active one in brackets."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that this kernel has."""
        return tuple(re.findall(r"[^\s\[\]]+", self.text()))

    @property
    def permitted(self) -> str:
        return ", ".join(self.choices)

    def parse(self, text: str) -> str:
        if text not in self.choices:
            raise self._refuse(text)
        return text

    def _format(self, value: str) -> str:
        return self.parse(value)

    def _active(self, text: str) -> str:
        match = re.search(r"\[([^\]]+)\]", text)
        if not match:
            raise InputError(f"{self.path}: no word in brackets in {text!r}")
        return match[1]


class Switch(Setting[bool]):
    """0 or 1."""

    @property
    def permitted(self) -> str:
        return "0, 1"

    def parse(self, text: str) -> bool:
        if text not in ("0", "1"):
            raise self._refuse(text)
        return text == "1"

    def _format(self, value: bool) -> str:
        if value not in (0, 1) or isinstance(value, (str, float)):
            raise self._refuse(value)
        return str(int(value))


class Number(Setting[int]):
    """A number from ``low`` to ``high``."""

    def __init__(self, root: Path, name: str, low: int, high: int) -> None:
        super().__init__(root, name)
        self.low = low
        self.high = high

    @property
    def permitted(self) -> str:
        return f"{self.low} to {self.high}"

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text):
            raise self._refuse(text)
        return int(text)

    def _format(self, value: int) -> str:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise self._refuse(value)
        return str(value)


class Counter(Setting[int]):
    """A number that the kernel counts or fixes; read only."""

    @property
    def writable(self) -> bool:
        return False

    @property
    def permitted(self) -> str:
        return "nothing (read only)"

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text):
            raise self._refuse(text)
        return int(text)

    def _format(self, value: int) -> str:
        raise self._refuse(value)


class Text(Setting[str]):
    """A file that this program does not know; the kernel decides what it takes."""

    @property
    def permitted(self) -> str:
        return "one line of text; the kernel decides"

    def parse(self, text: str) -> str:
        if not text or "\n" in text or "\0" in text:
            raise self._refuse(text)
        return text

    def _format(self, value: str) -> str:
        if not isinstance(value, str):
            raise self._refuse(value)
        return self.parse(value)

    def read(self) -> str:
        return self.text()


AnySetting = Choice | Switch | Number | Counter | Text
Value = str | int | bool

_CHOICES = re.compile(r"(hugepages-\d+kB/)?(enabled|shmem_enabled)|defrag")
_SWITCHES = re.compile(r"use_zero_page|shrink_underused|khugepaged/defrag")
_COUNTERS = re.compile(r"hpage_pmd_size|khugepaged/(pages_collapsed|full_scans)|hugepages-\d+kB/stats/\w+")
_TIMES = re.compile(r"khugepaged/(scan|alloc)_sleep_millisecs")
_PTES = re.compile(r"khugepaged/max_ptes_(none|swap|shared)")


def setting_of(root: Path, name: str, pages_per_pmd: int) -> AnySetting:
    """The right kind of setting for the file `name`, told from its name, else from its content."""
    if _CHOICES.fullmatch(name):
        return Choice(root, name)
    if _SWITCHES.fullmatch(name):
        return Switch(root, name)
    if _COUNTERS.fullmatch(name):
        return Counter(root, name)
    if name == "khugepaged/pages_to_scan":
        return Number(root, name, 1, UINT_MAX)
    if _TIMES.fullmatch(name):
        return Number(root, name, 0, UINT_MAX)
    if _PTES.fullmatch(name):
        return Number(root, name, 0, pages_per_pmd - 1)
    unknown = Text(root, name)
    if re.search(r"(^| )\[[^\]]+\]( |$)", unknown.text()):
        return Choice(root, name)
    return unknown
