"""Makes ``.deb`` files of any content, well-formed or not, without dpkg."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a tar file; `fields` are attributes of :class:`tarfile.TarInfo`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    """A symbolic or hard link."""
    return member(name, type=kind, linkname=target)


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], compression: str = "xz") -> bytes:
    """The bytes of a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def ar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """The bytes of an ar archive, ar(5)."""
    parts = [b"!<arch>\n"]
    for name, content in members:
        parts.append(f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def write_deb(
    path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], data_name: str = "data.tar.xz"
) -> Path:
    """A package with `members`, and the least control file that dpkg-deb takes."""
    control = b"Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    compression = {"data.tar": "", "data.tar.gz": "gz", "data.tar.xz": "xz"}[data_name]
    path.write_bytes(
        ar(
            [
                ("debian-binary", b"2.0\n"),
                ("control.tar.xz", tar([member("./control", control)])),
                (data_name, tar(members, compression)),
            ]
        )
    )
    return path
