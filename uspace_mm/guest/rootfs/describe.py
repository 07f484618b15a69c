"""What is in the images of the cache, read from what they were made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uspace_mm.guest import cache, stored
from uspace_mm.guest.rootfs.image import NAME

KINDS = ("root-base", "root-packages", "root-own", "root-wheels", "root-overlay")


@dataclass(frozen=True)
class Layer:
    """An image and what it was made from: ``packages`` are "NAME VERSION", ``wheels`` file names."""

    kind: str
    image: Path
    size_bytes: int
    made_s: float
    packages: tuple[str, ...]
    wheels: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same with JSON's types."""
        return {
            "kind": self.kind,
            "image": str(self.image),
            "size_bytes": self.size_bytes,
            "made_s": self.made_s,
            "packages": list(self.packages),
            "wheels": list(self.wheels),
        }

    def lines(self) -> list[str]:
        """What is in it, for people."""
        lines = []
        if self.packages:
            lines.append(_shortened(f"{len(self.packages)} packages of Debian", self.packages))
        if self.wheels:
            names = [wheel.split("-")[0] + " " + wheel.split("-")[1] for wheel in self.wheels]
            lines.append(_shortened(f"{len(names)} wheels", names))
        return lines


def describe(image: Path) -> Layer:
    """The description of one image of the cache."""
    manifest = json.loads((image.parent / cache.MANIFEST).read_text())
    return _layer(image.parent.parent.name, image, image.parent.stat().st_mtime, manifest["inputs"])


def all_layers() -> list[Layer]:
    """Every image in the cache, in the order in which they lie upon each other, the oldest first."""
    found = [
        _layer(item.kind, item.folder / NAME, item.made_s, item.inputs)
        for item in stored.entries(*KINDS)
        if (item.folder / NAME).is_file()
    ]
    return sorted(found, key=lambda layer: (KINDS.index(f"root-{layer.kind}"), layer.made_s))


def _layer(kind: str, image: Path, made_s: float, inputs: dict[str, Any]) -> Layer:
    # "NAME VERSION SHA256" and "FILE SHA256"
    packages = tuple(text.rpartition(" ")[0] for text in inputs.get("packages", ()))
    wheels = tuple(text.rpartition(" ")[0] for text in inputs.get("wheels", ()))
    return Layer(kind.removeprefix("root-"), image, image.stat().st_size, made_s, packages, wheels)


def _shortened(what: str, items: tuple[str, ...] | list[str], room: int = 100) -> str:
    text = ", ".join(items)
    if len(text) > room:
        text = text[:room].rpartition(",")[0] + ", ..."
    return f"{what}: {text}"
