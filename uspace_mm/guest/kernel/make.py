"""Run the kernel's make: at low priority, with nothing of the caller's environment, ended whole when we
end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from uspace_mm.errors import UspaceError
from uspace_mm.guest.cache import CacheError
from uspace_mm.guest.kernel.toolchain import Toolchain

# Variables such as ARCH, KCFLAGS or MAKEFLAGS would change what is built, and the cache would not know.
_PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "CCACHE_DIR")
_STEP = re.compile(r"  ([A-Z][A-Z0-9 ]*?)\s+(\S+)$")
_TERMINATE_S = 5.0
_NICENESS = 10


class BuildError(UspaceError):
    """make failed; the message has the first error it printed."""


class Make:
    """make for arm64 with the source in `tree`, all output in `build`."""

    def __init__(self, tree: Path, build: Path, toolchain: Toolchain, jobs: int) -> None:
        self._command = [
            *("nice", "-n", str(_NICENESS), "make", f"-j{jobs}", "-C", str(tree), f"O={build}"),
            *("ARCH=arm64", f"CROSS_COMPILE={toolchain.prefix}", "HOSTCC=gcc"),
        ]
        self._environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            "LC_ALL": "C",
            "TMPDIR": str(build),
            # The same input gives the same image, byte for byte.
            "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
            "KBUILD_BUILD_USER": "uspace_mm",
            "KBUILD_BUILD_HOST": "guest",
            "KBUILD_BUILD_VERSION": "1",
            "LOCALVERSION": "",
        }

    def run(self, *arguments: str, step: Callable[[str], None] | None = None, **environment: str) -> int:
        """Make `arguments`; `step` is told of each ("CC mm/memory.o"). Returns the number of steps.

        Raises :class:`BuildError` with the reason when make fails. When anything is raised, Ctrl-C included,
        make and all its children are ended before it is passed on.
        """
        steps = 0
        said: deque[str] = deque(maxlen=400)
        command = [*self._command, *arguments]
        with _group(command, {**self._environment, **environment}) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if match := _STEP.match(line.rstrip("\n")):
                    steps += 1
                    if step:
                        step(f"{match[1]} {match[2]}")
                else:
                    said.append(line.rstrip("\n"))
            status = child.wait()
        if status:
            raise _failure(list(said), status, arguments)
        return steps


@contextmanager
def _group(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    # A session of its own: a signal for the group reaches every compiler, and Ctrl-C reaches only us.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    with child:
        try:
            _be_nice(child.pid)
            yield child
        except BaseException:
            # make is not reaped yet, so the number of its group cannot be anybody else's.
            os.killpg(child.pid, signal.SIGTERM)
            try:
                # It ends only after its compilers, which want to write to the pipe.
                child.communicate(timeout=_TERMINATE_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            raise


def _be_nice(pid: int) -> None:
    """Towards other sessions, too: with autogroups (sched(7)) nice(1) counts within a session only."""
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICENESS))
    except OSError:
        pass  # no autogroups here, or too many requests at once


def _failure(said: list[str], status: int, arguments: tuple[str, ...]) -> UspaceError:
    if any("No space left on device" in line for line in said):
        return CacheError(
            "no space left while the kernel was built (it takes 400 MB and the source): free some, or set "
            "UMM_GUEST_CACHE to a folder that has it"
        )
    errors = [line for line in said if re.search(r"\b(error|Error|fatal error)\b|\*\*\*|not found", line)]
    reason = (errors or [line for line in said if line.strip()] or ["it said nothing"])[0].strip()
    return BuildError(f"make {' '.join(arguments)} failed (exit status {status}): {reason}")
