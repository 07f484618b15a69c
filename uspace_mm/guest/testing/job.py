"""What to run, and for how long at most."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from uspace_mm.guest.testing.machine import Place


@dataclass(frozen=True)
class Limits:
    """Seconds and numbers after which a run goes no further; scaled for an emulated guest.

    ``test_s`` is for one test with its fixtures, ``collect_s`` for the import of one test file; past it the
    interpreter ends itself with its stacks shown. ``grace_s`` later the host ends the guest. ``boots`` and
    ``processes`` bound how often the rest of the tests is tried again after one that took the guest or the
    interpreter with it.
    """

    total_s: float = 1800.0
    test_s: float = 120.0
    collect_s: float = 240.0
    grace_s: float = 20.0
    answer_s: float = 10.0
    boots: int = 4
    processes: int = 25


def limits_for(test_s: float, total_s: float) -> Limits:
    """Limits for tests that may take `test_s` each: the host's grace is a part of it, within bounds."""
    return Limits(total_s=total_s, test_s=test_s, grace_s=min(20.0, max(5.0, test_s / 4)))


@dataclass(frozen=True)
class Job:
    """One pytest run: ``cwd`` is relative to the project, ``paths`` are more of its folders for sys.path.

    ``options`` are those of a pytest on the host that replace the guest's, None when `args` say all. ``only``
    are the node ids to run in their order, None for those the arguments select. ``ignore`` are files by their
    node ids.
    """

    args: tuple[str, ...] = ()
    cwd: str = "."
    paths: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] | None = None
    only: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    limits: Limits = Limits()

    def rest(self, only: tuple[str, ...] | None, ignore: tuple[str, ...]) -> Job:
        """The same for a new process that goes on where one ended."""
        return replace(self, only=only, ignore=ignore)

    def text(self, place: Place) -> bytes:
        """As the driver reads it."""
        project = place.project
        return json.dumps(
            {
                "reporter": place.harness,
                "paths": [join(project, path) for path in self.paths],
                "args": [arg.replace(PROJECT, project) for arg in self.args],
                "options": _in_place(self.options, project),
                "only": self.only,
                "ignore": self.ignore,
                "test_timeout_s": self.limits.test_s,
                "collect_timeout_s": self.limits.collect_s,
            }
        ).encode()


# Stands in arguments for the project's folder, which only the machine knows.
PROJECT = "\x01PROJECT\x01"


def join(project: str, relative: str) -> str:
    """A path inside the project, as the machine sees it."""
    return project if relative in ("", ".") else f"{project}/{relative}"


def translated(value: Any, root: Path) -> Any:
    """`value` with the project's folder on the host, `root`, replaced by its stand-in, in lists as well."""
    if isinstance(value, str):
        return PROJECT if value == str(root) else value.replace(f"{root}/", f"{PROJECT}/")
    if isinstance(value, (list, tuple)):
        return [translated(part, root) for part in value]
    return value


def _in_place(value: Any, project: str) -> Any:
    if isinstance(value, str):
        return value.replace(PROJECT, project)
    if isinstance(value, (list, tuple)):
        return [_in_place(part, project) for part in value]
    if isinstance(value, dict):
        return {key: _in_place(part, project) for key, part in value.items()}
    return value
