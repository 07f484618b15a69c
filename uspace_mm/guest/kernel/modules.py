"""Kernel modules: which of a package are needed, and in which order they load, by what they say of
themselves.

Debian's packages carry no modules.dep (depmod makes it on the machine they are installed on), so the order
comes from the ``.modinfo`` section of each module: ``depends`` and ``softdep`` (modprobe.d(5)).
"""

from __future__ import annotations

import io
import lzma
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from uspace_mm.errors import InputError, UnsupportedError, UspaceError

# The largest module of Debian's kernels (amdgpu) has 20 MB.
_MODULE_LIMIT = 128 << 20
_NAME = re.compile(r"([\w-]+)\.ko(?:\.(?:xz|zst|gz))?")
# Where modules lie that others name by an alias ("crypto-crc32c").
_ALIASED = re.compile(r"/kernel/(?:crypto|lib|arch/[^/]+/(?:crypto|lib))/")


class Modules:
    """The modules under `folder` (``lib/modules/VERSION`` of a package), and those built into the kernel."""

    def __init__(self, folder: Path) -> None:
        self._paths = {
            match[1].replace("-", "_"): path
            for path in sorted(folder.rglob("*.ko*"))
            if (match := _NAME.fullmatch(path.name))
        }
        self._builtin = {Path(line).stem.replace("-", "_") for line in _lines(folder / "modules.builtin")}
        self._builtin |= {
            value.replace("-", "_")
            for record in _read(folder / "modules.builtin.modinfo").split("\0")
            for key, _, value in [record.partition("=")]
            if key.endswith(".alias")
        }
        self._info: dict[str, Mapping[str, Sequence[str]]] = {}
        self._aliases: dict[str, str] | None = None

    def order(self, wanted: Iterable[str]) -> list[tuple[str, Path]]:
        """Name and file of `wanted` and all they need, each after what it depends on; built-in ones are
        left out.

        Raises :class:`InputError` for a module that is neither there nor built in.
        """
        ordered: dict[str, Path] = {}
        for name in wanted:
            self._add(name.replace("-", "_"), ordered, ())
        return list(ordered.items())

    def _add(self, name: str, ordered: dict[str, Path], needed_by: tuple[str, ...]) -> None:
        if name in ordered or name in needed_by or name in self._builtin:
            return  # a circle of soft dependencies is no error to modprobe either
        if name not in self._paths:
            what = f"module {name}" + (f", which {needed_by[-1]} needs," if needed_by else "")
            raise InputError(f"{what} is neither in the package nor built into its kernel")
        info = self._read_info(name)
        before, after = _soft(info.get("softdep", ()))
        chain = (*needed_by, name)
        for other in before:
            self._add_soft(other, ordered, chain)
        for other in ",".join(info.get("depends", ())).split(","):
            if other:
                self._add(other.replace("-", "_"), ordered, chain)
        ordered[name] = self._paths[name]
        for other in after:
            self._add_soft(other, ordered, chain)

    def _add_soft(self, name: str, ordered: dict[str, Path], chain: tuple[str, ...]) -> None:
        name = name.replace("-", "_")
        if name not in self._paths and name not in self._builtin:
            name = self._by_alias().get(name, name)
        if name in self._paths:
            self._add(name, ordered, chain)

    def _by_alias(self) -> dict[str, str]:
        if self._aliases is None:
            self._aliases = {}
            for name, path in self._paths.items():
                if _ALIASED.search(str(path)):
                    for alias in self._read_info(name).get("alias", ()):
                        self._aliases.setdefault(alias.replace("-", "_"), name)
        return self._aliases

    def _read_info(self, name: str) -> Mapping[str, Sequence[str]]:
        if name not in self._info:
            self._info[name] = read_modinfo(unpack(self._paths[name]), self._paths[name])
        return self._info[name]


def unpack(path: Path) -> bytes:
    """The module in the file, which may be packed with xz, gzip or zstd: the kernel's loader takes plain
    ones."""
    data = path.read_bytes()
    try:
        if data.startswith(b"\xfd7zXZ\0"):
            engine = lzma.LZMADecompressor(memlimit=256 << 20)
            plain = engine.decompress(data, _MODULE_LIMIT + 1)
            if len(plain) > _MODULE_LIMIT or not engine.eof:
                raise InputError(f"{path}: truncated, or larger than any module")
            return plain
    except lzma.LZMAError as error:
        raise InputError(f"{path}: damaged: {error}") from error
    for magic, tool in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b", "gzip")):
        if data.startswith(magic):
            if not shutil.which(tool):
                raise UnsupportedError(
                    f"lacks: {tool} (Debian: apt install {tool}); {path.name} is packed with it"
                )
            done = subprocess.run([tool, "-dc"], input=data, capture_output=True, check=False)
            if done.returncode:
                raise InputError(f"{path}: damaged: {tool} cannot unpack it")
            return done.stdout
    return data


def read_modinfo(module: bytes, name: object) -> dict[str, list[str]]:
    """The values in the ``.modinfo`` section of `module`, by their keys; raises :class:`InputError` without
    one."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
        if section is None:
            raise InputError(f"{name}: no kernel module (it has no .modinfo)")
        records = bytes(section.data()).split(b"\0")
    except (ELFError, ValueError, AssertionError, AttributeError) as error:
        if isinstance(error, UspaceError):
            raise
        raise InputError(f"{name}: no kernel module: {error}") from error
    info: dict[str, list[str]] = {}
    for record in records:
        key, equals, value = record.decode("utf-8", "replace").partition("=")
        if equals:
            info.setdefault(key, []).append(value)
    return info


def _soft(values: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules before and after, of ``pre: a b post: c``."""
    lists: dict[str, list[str]] = {"pre:": [], "post:": []}
    for value in values:
        current: list[str] = []
        for word in value.split():
            if word in lists:
                current = lists[word]
            else:
                current.append(word)
    return lists["pre:"], lists["post:"]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _lines(path: Path) -> list[str]:
    return _read(path).splitlines()
