"""The initramfs: the agent as /init and the modules it loads, as an archive in memory.

Not compressed: it is copied into the guest's memory anyway, and unpacking is what takes time under emulation.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


def build(agent: Path, modules: Sequence[Path] = (), extra: Iterable[tuple[str, bytes, int]] = ()) -> bytes:
    """A cpio archive (newc, as Documentation/driver-api/early-userspace/buffer-format.rst has it).

    `modules` are loaded by the agent in their order; `extra` are (path, content, mode) of files to add.
    """
    entries: list[tuple[str, bytes, int]] = [
        ("dev", b"", stat.S_IFDIR | 0o755),
        ("init", agent.read_bytes(), stat.S_IFREG | 0o755),
    ]
    if modules:
        # Numbered: two folders may hold modules of one name.
        names = [f"{number:03}-{module.name}" for number, module in enumerate(modules)]
        entries.append(("modules", b"", stat.S_IFDIR | 0o755))
        entries.append(("modules/order", "".join(f"{n}\n" for n in names).encode(), stat.S_IFREG | 0o644))
        entries += [
            (f"modules/{name}", module.read_bytes(), stat.S_IFREG | 0o644)
            for name, module in zip(names, modules, strict=True)
        ]
    folders = {"", "dev", "modules"}
    for path, content, mode in extra:
        for parent in reversed(Path(path).parents):
            if (name := str(parent)) not in folders and name != ".":
                folders.add(name)
                entries.append((name, b"", stat.S_IFDIR | 0o755))
        entries.append((path, content, mode))
    parts = [_entry(number, *entry) for number, entry in enumerate(entries, 1)]
    return b"".join([*parts, _entry(0, _TRAILER, b"", 0)])


def in_memory(archive: bytes) -> int:
    """A descriptor of a file in memory that holds `archive`, so that no file has to be removed later."""
    descriptor = os.memfd_create("initramfs")
    try:
        view = memoryview(archive)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _entry(number: int, path: str, content: bytes, mode: int) -> bytes:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, dev major and minor, rdev major and minor, name size, check
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = _MAGIC + b"".join(b"%08x" % field for field in fields) + name
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
