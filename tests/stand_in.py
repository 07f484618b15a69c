"""A stand-in for a guest: the same commands as processes of this machine, so that the harness is tested in
moments.

It claims the page size that it is asked for, and its copy of the reporter claims it as well.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from uspace_mm.guest.outcome import ChannelLost, Exited, Killed, Outcome
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing.machine import BootFailed, OnBytes, Place
from uspace_mm.guest.testing.prepare import project_of, ready_with
from uspace_mm.guest.testing.remote import Ready
from uspace_mm.guest.testing.size_run import SOURCES


class StandIn:
    """A :class:`Machine` whose processes run here, in a copy of the project."""

    def __init__(self, size: PageSize, project: Path, answering: bool = True) -> None:
        self.page_size_bytes = size.bytes
        self._folder = Path(tempfile.mkdtemp(prefix="umm-stand-in-"))
        self._answering = answering
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        shutil.copytree(project, self._folder / "project", ignore=shutil.ignore_patterns("__pycache__"))
        (self._folder / "harness").mkdir()
        for name, path in SOURCES.items():
            text = path.read_text().replace('os.sysconf("SC_PAGE_SIZE")', str(size.bytes))
            (self._folder / "harness" / name).write_text(text)

    @property
    def place(self) -> Place:
        return Place(str(self._folder / "project"), str(self._folder / "harness"), sys.executable)

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdin: bytes,
        on_stdout: OnBytes,
        on_stderr: OnBytes,
        on_report: OnBytes,
    ) -> Outcome:
        reading, writing = os.pipe()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
        environment |= {**env, "UMM_REPORT_FD": str(writing), "TMPDIR": str(self._folder)}
        process = self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(stdin)
        process.stdin.close()
        with (
            selectors.DefaultSelector() as selector,
            process.stdout,
            process.stderr,
            open(reading, "rb") as reports,
        ):
            for file, callback in (
                (process.stdout, on_stdout),
                (process.stderr, on_stderr),
                (reports, on_report),
            ):
                selector.register(file, selectors.EVENT_READ, callback)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        key.data(data)
                    else:
                        selector.unregister(key.fileobj)
        status = process.wait()
        if self._closed:
            return ChannelLost("the machine was closed")
        return Killed(-status) if status < 0 else Exited(status)

    def answers(self, timeout_s: float) -> bool:
        return self._answering

    def close(self) -> None:
        self._closed = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


class Booter:
    """A :class:`Boot`; remembers how often it was used, and fails for the sizes it is told to fail for."""

    def __init__(self, project: Path, *, failing: Sequence[str] = (), answering: bool = True) -> None:
        self.booted: list[str] = []
        self._project = project
        self._failing = failing
        self._answering = answering

    def __call__(self, size: PageSize) -> StandIn:
        self.booted.append(size.name)
        if size.name in self._failing:
            raise BootFailed(f"no console output from {size}")
        return StandIn(size, self._project, self._answering)

    def on_host(self, path: str) -> str:
        """Paths of any of the machines as those of the project."""
        return re.sub(r"^.*/umm-stand-in-[^/]*/project/", f"{self._project}/", path)


def for_session(config: pytest.Config, sizes: Sequence[PageSize]) -> Ready:
    """In place of prepare's function of this name; UMM_STAND_IN_FAILING are sizes with commas between."""
    project = project_of(config)
    booter = Booter(project.root, failing=os.environ.get("UMM_STAND_IN_FAILING", "").split(","))

    def close() -> None:
        if "UMM_STAND_IN_BOOTED" in os.environ:
            with open(os.environ["UMM_STAND_IN_BOOTED"], "a") as file:
                file.write("".join(f"{name}\n" for name in booter.booted))

    return replace(ready_with(config, project, booter, 3, "", close), on_host=booter.on_host)
