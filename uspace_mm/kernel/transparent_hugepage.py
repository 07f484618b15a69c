"""/sys/kernel/mm/transparent_hugepage: every file, typed, and settings that are put back.

>>> thp = TransparentHugepage()                                              # doctest: +SKIP
>>> with thp.changed({"enabled": "always", "khugepaged/pages_to_scan": 8192}):    # doctest: +SKIP
...     measure()

The settings are the machine's: others see the change, and a process that is killed (SIGKILL, or SIGTERM
without a handler) does not put them back. Changing ``enabled`` lets the kernel recompute
vm.min_free_kbytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel._check import PAGE_SIZE
from uspace_mm.kernel.thp_settings import (
    UINT_MAX,
    AnySetting,
    Choice,
    Counter,
    Number,
    Setting,
    Switch,
    Text,
    Value,
    setting_of,
)

__all__ = [
    "ROOT",
    "AnySetting",
    "Choice",
    "Counter",
    "Khugepaged",
    "Number",
    "Setting",
    "SizeSettings",
    "Switch",
    "Text",
    "TransparentHugepage",
    "Value",
]

ROOT = Path("/sys/kernel/mm/transparent_hugepage")
_SIZE = re.compile(r"hugepages-(\d+)kB")


@dataclass(frozen=True, slots=True)
class SizeSettings:
    """One folder hugepages-<N>kB. Either setting is None where this kernel has no such file (8 KiB has no
    anonymous pages, kernels before 6.11 no ``shmem_enabled``)."""

    size: int
    enabled: Choice | None
    shmem_enabled: Choice | None
    statistics: Mapping[str, Counter]

    def read_statistics(self) -> dict[str, int]:
        """The counters under stats/, by file name."""
        return {name: counter.read() for name, counter in self.statistics.items()}


@dataclass(frozen=True, slots=True)
class Khugepaged:
    """The folder khugepaged/."""

    defrag: Switch
    pages_to_scan: Number
    scan_sleep_millisecs: Number
    alloc_sleep_millisecs: Number
    max_ptes_none: Number
    max_ptes_swap: Number
    max_ptes_shared: Number
    pages_collapsed: Counter
    full_scans: Counter


class TransparentHugepage:
    """The settings below `root`. Raises UnsupportedError where the kernel has no transparent huge pages."""

    def __init__(self, root: Path = ROOT) -> None:
        if not (root / "enabled").exists():
            raise UnsupportedError(
                f"{root}: this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)"
            )
        self.root = root
        self.enabled = Choice(root, "enabled")
        self.defrag = Choice(root, "defrag")
        self.shmem_enabled = Choice(root, "shmem_enabled")
        self.use_zero_page = Switch(root, "use_zero_page")
        self.shrink_underused = Switch(root, "shrink_underused")
        self.hpage_pmd_size = Counter(root, "hpage_pmd_size")
        self.pages_per_pmd = max(self.hpage_pmd_size.read() // PAGE_SIZE, 1)
        limit = self.pages_per_pmd - 1
        self.khugepaged = Khugepaged(
            defrag=Switch(root, "khugepaged/defrag"),
            pages_to_scan=Number(root, "khugepaged/pages_to_scan", 1, UINT_MAX),
            scan_sleep_millisecs=Number(root, "khugepaged/scan_sleep_millisecs", 0, UINT_MAX),
            alloc_sleep_millisecs=Number(root, "khugepaged/alloc_sleep_millisecs", 0, UINT_MAX),
            max_ptes_none=Number(root, "khugepaged/max_ptes_none", 0, limit),
            max_ptes_swap=Number(root, "khugepaged/max_ptes_swap", 0, limit),
            max_ptes_shared=Number(root, "khugepaged/max_ptes_shared", 0, limit),
            pages_collapsed=Counter(root, "khugepaged/pages_collapsed"),
            full_scans=Counter(root, "khugepaged/full_scans"),
        )

    def names(self) -> list[str]:
        """Every file, as the path below the root."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def setting(self, name: str) -> AnySetting:
        """The setting of one file; raises InputError for a name that this kernel does not have."""
        path = self.root / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise InputError(f"{name!r} is not a file below {self.root}")
        return setting_of(self.root, str(Path(name)), self.pages_per_pmd)

    def sizes(self) -> list[int]:
        """Sizes in bytes that have a folder of their own, ascending; empty before Linux 6.8."""
        matches = (_SIZE.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) * 1024 for match in matches if match)

    def size(self, size: int) -> SizeSettings:
        """The folder of one size; raises InputError for a size that is not among :meth:`sizes`."""
        if size not in self.sizes():
            have = ", ".join(f"{each // 1024}k" for each in self.sizes()) or "none"
            raise InputError(f"no transparent huge pages of {size} bytes; this kernel has {have}")
        folder = f"hugepages-{size // 1024}kB"

        def choice(name: str) -> Choice | None:
            return Choice(self.root, f"{folder}/{name}") if (self.root / folder / name).exists() else None

        statistics = self.root / folder / "stats"
        names = sorted(path.name for path in statistics.iterdir()) if statistics.is_dir() else []
        return SizeSettings(
            size,
            choice("enabled"),
            choice("shmem_enabled"),
            {name: Counter(self.root, f"{folder}/stats/{name}") for name in names},
        )

    def read_all(self) -> dict[str, Value]:
        """Every file's value by name."""
        return {name: self.setting(name).read() for name in self.names()}

    def write(self, values: Mapping[str, Value]) -> None:
        """Write several settings; all are checked before the first is written. Not undone on failure."""
        for setting, value in self._checked(values):
            _write(setting, value)

    def settings(self) -> dict[str, Value]:
        """The values of all files that can be written: what :meth:`preserve` puts back."""
        found = ((name, self.setting(name)) for name in self.names())
        return {name: setting.read() for name, setting in found if setting.writable}

    @contextmanager
    def preserve(self) -> Iterator[TransparentHugepage]:
        """Whatever is written within the ``with`` block, all settings are as before after it."""
        before = self.settings()
        with self._put_back(before):
            yield self

    @contextmanager
    def changed(self, values: Mapping[str, Value]) -> Iterator[TransparentHugepage]:
        """`values` within the ``with`` block, the former ones after it, also when it raises."""
        wanted = self._checked(values)
        before: dict[str, Value] = {setting.name: setting.read() for setting, _ in wanted}
        with self._put_back(before):
            for setting, value in wanted:
                _write(setting, value)
            yield self

    def _checked(self, values: Mapping[str, Value]) -> list[tuple[AnySetting, Value]]:
        wanted = [(self.setting(name), value) for name, value in values.items()]
        for setting, value in wanted:
            setting.format(value)  # type: ignore[arg-type]  # refuses a value of the wrong type itself
        return wanted

    @contextmanager
    def _put_back(self, before: Mapping[str, Value]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            try:
                self._restore(before)
            except KernelError as second:
                error.add_note(f"and {second}")
            raise
        self._restore(before)

    def _restore(self, before: Mapping[str, Value]) -> None:
        # Some settings exclude each other (shmem_enabled=force and a size that inherits it): what is
        # refused is tried again as long as others go through.
        left = dict(before)
        while left:
            failed: dict[str, KernelError] = {}
            for name, value in left.items():
                setting = self.setting(name)
                try:
                    if setting.read() != value:
                        _write(setting, value)
                except KernelError as error:
                    failed[name] = error
            if len(failed) == len(left):
                raise next(iter(failed.values()))
            left = {name: left[name] for name in failed}


def _write(setting: AnySetting, value: Value) -> None:
    setting.write(value)  # type: ignore[arg-type]  # the setting refuses a value of the wrong type itself
