"""The model of the notifiers' protocol (native/notifier/model) in spin: right as it is, wrong in known ways.

Each search is complete: spin visits every state that the processes of a scenario can reach.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "native" / "notifier" / "model"
SAFETY = ("-DSAFETY",), ()
# Something comes at last, though nothing is scheduled but fairly.
PROGRESS = (), ("-a", "-f")
DEPTH = 100_000
INCOMPLETE = ("max search depth too small", "out of memory", "reached -DMEMLIM", "hash-compact", "bitstate")
STORED = re.compile(r"^ *(\d+)(?: states, stored|.*states, stored)", re.MULTILINE)


@pytest.fixture(autouse=True)
def tools() -> None:
    for tool, package in {"spin": "spin", "cc": "gcc libc6-dev"}.items():
        if not shutil.which(tool):
            pytest.skip(f"lacks: {tool} (Debian: {package})")


def search(folder: Path, scenario: str, *defines: str, optimize: str) -> str:
    """What the search of every state of a scenario says."""
    compiled, options = PROGRESS if scenario == "progress" else SAFETY
    model = MODEL / f"{scenario}.pml"
    steps: list[list[str | Path]] = [
        ["spin", *(f"-D{name}" for name in defines), "-a", model],
        # -w: the generated C is spin's, its style is not ours to warn about.
        ["cc", "-w", optimize, *compiled, "-DMEMLIM=1024", "-o", "pan", "pan.c"],
        ["./pan", f"-m{DEPTH}", *options],
    ]
    for step in steps:
        done = subprocess.run(
            step, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"{step}:\n{done.stdout}\n{done.stderr}"
    for sign in INCOMPLETE:
        assert sign not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("scenario", "states"),
    [
        ("walk", 100_000),
        ("callback", 10_000),
        ("callback CROSS", 10_000),
        ("subscribe", 100_000),
        ("subscribe AND_GO", 10_000),
        ("progress", 10_000),
    ],
)
def test_the_protocol_is_right_in_every_state(tmp_path: Path, scenario: str, states: int) -> None:
    said = search(tmp_path, *scenario.split(), optimize="-O2")
    assert "errors: 0" in said, said
    assert "Search not completed" not in said
    # There was something to search: a scenario that ends at its first step has no errors, either.
    (stored,) = STORED.findall(said)
    assert int(stored) > states, said


NO_CALL_AFTERWARDS = "assertion violated (allocated[s]&&("
FREED = "assertion violated allocated[s]"
TWICE = "assertion violated (releases["
UNTOLD = "assertion violated (( !(changing[i])||"
STUCK = "invalid end state"
FOR_EVER = "acceptance cycle"


WRONG = [
    ("walk", "NO_GRACE_PERIOD", FREED),
    ("walk", "COUNT_AFTER_RCU", FREED),
    ("walk", "NO_COUNT", NO_CALL_AFTERWARDS),
    ("walk", "RELEASE_UNTAKEN", TWICE),
    ("callback", "ALL_FRAMES", STUCK),
    ("callback CROSS", "NO_CYCLE_CHECK", STUCK),
    ("callback CROSS", "NO_GRACE_PERIOD", FREED),
    ("subscribe", "NO_DRAIN", UNTOLD),
    ("subscribe", "CURRENT_ONLY", UNTOLD),
    ("subscribe AND_GO", "DRAIN_LOCKED", STUCK),
    ("progress", "NO_PHASES", FOR_EVER),
]


@pytest.mark.parametrize(("scenario", "wrong", "error"), WRONG)
def test_what_is_known_to_be_wrong_is_found(tmp_path: Path, scenario: str, wrong: str, error: str) -> None:
    said = search(tmp_path, *scenario.split(), wrong, optimize="-O0")
    assert "errors: 1" in said, said
    assert error in said, said


def test_every_wrong_way_that_the_model_names_is_tried() -> None:
    head = (MODEL / "protocol.pml").read_text().partition("*/")[0]
    named = set(re.findall(r"^ \*   ([A-Z_]+)  ", head, re.MULTILINE))
    assert named == {wrong for _, wrong, _ in WRONG}
