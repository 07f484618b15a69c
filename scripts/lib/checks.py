"""Run every check of the repository and count it: the work behind ``scripts/test``.

Each stage adds its checks to one tally and goes on after a failure. It uses the standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib.guests import guests, kernels_and_root  # noqa: E402
from scripts.lib.native import BIN, C_FLAVOURS, aarch64, c_tests  # noqa: E402
from scripts.lib.running import ROOT, STAGE_LIMIT_S, Tally, report, run, say, stage  # noqa: E402

BUILD = ROOT / "build"

# After this many crashes of the interpreter the rest of the tests is given up.
CRASHES_MAX = 5


def lint(tally: Tally) -> None:
    c_files = sorted(path for path in (ROOT / "native").rglob("*.[ch]"))
    checks: dict[str, list[str | Path]] = {
        "ruff check": [sys.executable, "-m", "ruff", "check", "--quiet", "."],
        "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
        "mypy --strict": [sys.executable, "-m", "mypy"],
        "clang-format": [BIN / "clang-format", "--dry-run", "-Werror", *c_files],
    }
    for name, command in checks.items():
        outcome = run(*command)
        tally.check(name, outcome.ok)
        if not outcome.ok:
            report(name, outcome.output)


def python_tests(tally: Tally, quick: bool, arguments: list[str]) -> None:
    """Run pytest; a crash is counted for the test it happened in, and a new process runs the rest."""
    record = BUILD / "pytest-record.jsonl"
    record.unlink(missing_ok=True)
    options = ["-q", "-r", "fE", "--continue-on-collection-errors"]
    options += [*(["-m", "not slow"] if quick else []), *arguments]
    launcher = ROOT / "scripts" / "lib" / "run_pytest.py"
    deadline = time.monotonic() + STAGE_LIMIT_S
    for _ in range(CRASHES_MAX):
        limit_s = max(deadline - time.monotonic(), 1)
        outcome = run(sys.executable, launcher, record, *options, capture=False, limit_s=limit_s)
        crashed = unfinished(record)
        if crashed is None:
            break
        how = "out of time or killed" if outcome.status in (None, 1) else f"ended by status {outcome.status}"
        with record.open("a") as lines:
            for outcome_name in ("failed", "finished"):
                lines.write(json.dumps({"id": crashed, "outcome": outcome_name}) + "\n")
        say(f"-- FAILED: {crashed}: pytest {how} in it; going on with the rest")
    results = read_record(record)
    for name, (result, reason) in results.items():
        if result == "skipped":
            tally.skipped.append((name, reason))
        else:
            tally.check(name, result == "passed")
    if not outcome.ok and not any(result == "failed" for result, _ in results.values()):
        tally.check(f"pytest (exit status {outcome.status})", False)
    elif not results:
        tally.check("pytest (selected no test)", False)


def record_lines(record: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []


def unfinished(record: Path) -> str | None:
    """The test that was running when pytest ended; None when all that were begun came to an end."""
    running: str | None = None
    for line in record_lines(record):
        if line["outcome"] in ("started", "finished"):
            running = line["id"] if line["outcome"] == "started" else None
    return running


def read_record(record: Path) -> dict[str, tuple[str, str]]:
    """Outcome and reason per test. A test that failed in one phase failed."""
    results: dict[str, tuple[str, str]] = {}
    for line in record_lines(record):
        if line["outcome"] in ("started", "finished"):
            continue
        if results.get(line["id"], ("",))[0] != "failed":
            results[line["id"]] = line["outcome"], line.get("reason", "")
    return results


def conclude(tally: Tally, quick: bool) -> int:
    """Print the skips with their reasons, the failures, and the line of counts; returns the exit status."""
    if tally.skipped:
        say("skipped:")
        for name, reason in tally.skipped:
            say(f"   {name}: {reason}")
    if quick:
        say("left out by --quick: pytest tests marked slow, and the tests in guests")
    if tally.failed:
        say("failed:")
        for name in tally.failed:
            say(f"   {name}")
    say(f"{len(tally.passed)} passed, {len(tally.failed)} failed, {len(tally.skipped)} skipped")
    return 0 if tally.passed and not tally.failed else 1


@contextmanager
def alone() -> Iterator[None]:
    """One run at a time in this tree: they share build directories."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / ".test.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another scripts/test of this tree")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def end(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/test", description="Run every check of this repository and count it."
    )
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    parser.add_argument("--full", action="store_true", help="with the tests that take minutes")
    parser.add_argument("pytest", nargs="*", metavar="-- ARG", help="arguments passed on to pytest")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, end)
    tally = Tally()
    stages: dict[str, Callable[[], None]] = {"lint": partial(lint, tally)}
    for flavour in C_FLAVOURS:
        stages[f"C tests, {flavour}"] = partial(c_tests, flavour, tally, args.full)
    stages["C core for aarch64"] = partial(aarch64, tally)
    if not args.quick:
        stages["guest kernels and root file system"] = partial(kernels_and_root, tally)
    stages["pytest"] = partial(python_tests, tally, args.quick, args.pytest)
    if not args.quick:
        stages["tests in guests"] = partial(guests, tally, args.full)
    with alone():
        try:
            for name, work in stages.items():
                with stage(name, tally):
                    work()
        except KeyboardInterrupt:
            say("interrupted")
            conclude(tally, args.quick)
            return 130
    return conclude(tally, args.quick)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
