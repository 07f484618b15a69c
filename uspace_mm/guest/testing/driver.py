"""What the host starts in the guest: reads a job from its standard input, and runs pytest with the reporter.

The job is JSON:

    reporter           folder with umm_reporter.py
    paths              folders for the end of sys.path, in processes that tests start as well
    args               arguments of pytest
    options            options of a pytest on the host by name, which replace the guest's (as xdist does
                       with its workers); null when the arguments are all there is
    only               node ids to run, in this order; null for what the arguments select
    ignore             files not to collect (by node id), because an earlier process died of them
    test_timeout_s     a test that takes longer ends the process, with all stacks shown
    collect_timeout_s  so does a test file whose import takes longer

Everything here is standard library and pytest; it is no part of the package inside the guest.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NO_PYTEST = 72  # exit status: the guest's Python has no pytest
FIRST_DESCRIPTOR = 100


def take_descriptor() -> int:
    """The report descriptor under a number that tests do not come upon, closed in the programs they start."""
    given = int(os.environ.pop("UMM_REPORT_FD"))
    kept = fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR)
    os.close(given)
    return kept


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def without_missing_plugins(args: Sequence[str]) -> list[str]:
    """`args` but ``-pNAME`` of plugins that only the host has; short names belong to pytest itself."""
    left = []
    for arg in args:
        name = arg.removeprefix("-p")
        if arg == name or name.startswith("no:") or importable(name) or importable(f"_pytest.{name}"):
            left.append(arg)
        else:
            print(f"uspace_mm: the guest has no plugin {name}; it is left out", file=sys.stderr)
    return left


def main() -> int:
    job = json.loads(sys.stdin.buffer.read())
    descriptor = take_descriptor()
    # `python FILE` puts the file's folder first, `python -m pytest` the current one.
    sys.path[0] = str(Path.cwd())
    sys.path += [job["reporter"], *job["paths"]]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        part for part in (os.environ.get("PYTHONPATH", ""), *job["paths"]) if part
    )
    if not importable("pytest"):
        print("uspace_mm: the guest's Python has no pytest", file=sys.stderr)
        return NO_PYTEST
    import pytest
    import umm_reporter  # type: ignore[import-not-found, unused-ignore]

    umm_reporter.JOB = {**job, "descriptor": descriptor}
    args = job["args"] if job.get("options") is None else without_missing_plugins(job["args"])
    return int(pytest.main(["-p", "umm_reporter", *args]))


if __name__ == "__main__":
    sys.exit(main())
