"""The C tests, cross-compiled and static, in the guest: each program is one test."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).resolve().parents[2] / "native-tests").glob("test_*"))
SKIPPED = 77


def test_the_programs_came_along() -> None:
    assert platform.machine() == "aarch64"
    assert {"test_kernel", "test_pager_faults", "test_postcopy"} <= {path.name for path in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_program(program: Path) -> None:
    # Long random runs do a part: the machine is emulated, and the host's own run does all.
    env = {**os.environ, "UMM_TEST_BRIEF": "1"}
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=600, env=env)
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
