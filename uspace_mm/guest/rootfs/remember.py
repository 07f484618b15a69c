"""What names meant when they were last looked up, so that a call with everything cached asks nobody."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uspace_mm.guest import cache

_FOLDER = "resolved"


def remembered(
    kind: str, question: Mapping[str, object], ask: Callable[[], Any], *, afresh: bool = False
) -> Any:
    """The answer (what JSON can hold) given to `question` before, else that of ``ask()``, which is kept."""
    path = _path(kind, question)
    if not afresh:
        try:
            return json.loads(path.read_text())["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # never asked, or damaged: ask
    answer = ask()
    _write(path, {"question": dict(question), "answer": answer})
    return answer


def is_known() -> bool:
    """Whether anything is remembered at all."""
    return any((cache.cache_root() / _FOLDER).glob("*.json"))


def forget_all() -> None:
    """The next calls look everything up again."""
    for path in (cache.cache_root() / _FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)


def digest_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes; read again only when its size, times or inode changed."""
    status = path.stat()
    seen = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return str(remembered("digest", {"file": seen}, lambda: cache.digest_file(path)))


def _path(kind: str, question: Mapping[str, object]) -> Path:
    return cache.cache_root() / _FOLDER / f"{kind}-{cache.digest_of(question)[:32]}.json"


def _write(path: Path, content: Mapping[str, object]) -> None:
    # Nothing depends on it, so a folder that cannot be written is not worth an error here.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(content, indent=1))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
