"""From the options of a pytest on the host to guests, and to the job that they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uspace_mm.errors import InputError
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing.job import Job, Limits, limits_for
from uspace_mm.guest.testing.options import arguments_of, options_of
from uspace_mm.guest.testing.project import PLACE, Project, find_root, load, source_paths
from uspace_mm.guest.testing.times import parse_time
from uspace_mm.sizes import parse_size

if TYPE_CHECKING:
    from uspace_mm.guest.testing.guests import Settings
    from uspace_mm.guest.testing.machine import Boot
    from uspace_mm.guest.testing.remote import Ready, Wanted


def for_session(config: pytest.Config, sizes: Sequence[PageSize]) -> Ready:
    """Guests for the marked tests of a session; what is missing is built, with progress on a terminal."""
    from uspace_mm.guest.progress import on_terminal
    from uspace_mm.guest.testing.guests import Guests

    project = project_of(config)
    capture = config.pluginmanager.getplugin("capturemanager")
    uncaptured: AbstractContextManager[None] = (
        nullcontext() if capture is None else capture.global_and_fixture_disabled()
    )
    with uncaptured, on_terminal() as progress:
        guests = Guests(settings_of(config), project, sizes, progress)
    return ready_with(config, project, guests, guests.parallel(len(sizes)), PLACE.project, guests.close)


def ready_with(
    config: pytest.Config,
    project: Project,
    boot: Boot,
    parallel: int,
    folder: str,
    close: Callable[[], None],
) -> Ready:
    """What a session needs of its guests, which `boot` boots and which have the project in `folder`."""
    from uspace_mm.guest.testing.remote import Ready

    def job(wanted: Sequence[Wanted]) -> Job:
        return session_job(config, project, wanted)

    def on_host(path: str) -> str:
        inside = path.removeprefix(f"{folder}/")
        return str(project.root / inside) if inside != path else path

    return Ready(boot, job, parallel, on_host, close)


def project_of(config: pytest.Config) -> Project:
    """The folder that travels: the one named, or the project around the root directory."""
    named = _values(config, "project")
    return load(Path(config.rootpath, named[-1]) if named else find_root(config.rootpath))


def session_job(config: pytest.Config, project: Project, wanted: Sequence[Wanted]) -> Job:
    """One pytest run with `wanted`; raises :class:`InputError` for a file outside the project."""
    files = []
    for want in wanted:
        inside = project.inside(want.item.path)
        if inside is None:
            raise InputError(
                f"{want.item.path} lies outside the project {project.root}: "
                "name the folder that holds both with --guest-project"
            )
        files.append(inside)
    timeout = [str(Limits.test_s), *_values(config, "test-timeout")]
    return Job(
        args=arguments_of(config, project, dict.fromkeys(files)),
        cwd=project.inside(config.invocation_params.dir) or ".",
        paths=source_paths(project),
        options=options_of(config, project),
        only=tuple(dict.fromkeys(want.guest_id for want in wanted)),
        # As in a session without guests, only single tests have a limit.
        limits=limits_for(parse_time("--guest-test-timeout", timeout[-1]), total_s=24 * 3600.0),
    )


def settings_of(config: pytest.Config) -> Settings:
    """The guests that options and ini file ask for; raises :class:`InputError` for senseless values."""
    from uspace_mm.guest.testing.guests import Settings

    def last(name: str, default: str) -> str:
        return [default, *_values(config, name)][-1]

    cpus = last("cpus", "2")
    if not cpus.isdigit() or not int(cpus):
        raise InputError(f"--guest-cpus {cpus}: expected a number")
    return Settings(
        memory_bytes=parse_size(last("memory", "1G")),
        cpus=int(cpus),
        kernels=tuple(_values(config, "kernel")),
        wheels=_paths(config, "wheel"),
        pips=tuple(_values(config, "pip")),
        overlays=_paths(config, "overlay"),
    )


def _values(config: pytest.Config, name: str) -> list[str]:
    """Those of the ini file, then those of the command line: lists add up, else the last one holds."""
    key = f"guest_{name.replace('-', '_')}"
    return [*config.getini(key), *(config.getoption(key, None) or ())]


def _paths(config: pytest.Config, name: str) -> tuple[Path, ...]:
    return tuple(Path(config.rootpath, value) for value in _values(config, name))
