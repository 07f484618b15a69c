"""Run every check of the repository and count it: the work behind ``scripts/test``.

Each stage adds its checks to one tally and goes on after a failure. It uses the standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
BIN = Path(sys.executable).parent

# A stage that takes longer hangs; a test that hangs is ended long before by run_pytest.py or meson.
STAGE_LIMIT_S = 20 * 60
# After this many crashes of the interpreter the rest of the tests is given up.
CRASHES_MAX = 5
NEWEST_GCC_KNOWN = 12


@dataclass
class Tally:
    """What ran: names of the passed, the failed with what was seen, the skipped with their reasons."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def check(self, name: str, ok: bool) -> None:
        (self.passed if ok else self.failed).append(name)


@dataclass
class Outcome:
    """How a command ended. ``status`` is negative for a signal, None when it was out of time."""

    status: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.status == 0


def say(text: str) -> None:
    print(text, flush=True)


def run(
    *command: str | Path,
    capture: bool = True,
    limit_s: float = STAGE_LIMIT_S,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run `command` in the tree's root; whatever it leaves behind in its process group is killed."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        errors="replace",
        start_new_session=True,
        env=None if env is None else os.environ | env,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return Outcome(process.returncode, output or "")
    except subprocess.TimeoutExpired as expired:
        seen = expired.output or b""
        text = seen.decode(errors="replace") if isinstance(seen, bytes) else seen
        return Outcome(None, f"{text}\nout of time: {limit_s:.0f} s")
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody left
    process.wait()


@contextmanager
def stage(name: str, tally: Tally) -> Iterator[None]:
    """Print the stage's name, its counts and its duration."""
    started = time.monotonic()
    before = len(tally.passed), len(tally.failed), len(tally.skipped)
    say(f"== {name}")
    yield
    passed, failed, skipped = (
        after - then
        for after, then in zip(
            (len(tally.passed), len(tally.failed), len(tally.skipped)), before, strict=True
        )
    )
    counts = (
        f"{passed} passed"
        + (f", {failed} FAILED" if failed else "")
        + (f", {skipped} skipped" if skipped else "")
    )
    say(f"   {counts} ({time.monotonic() - started:.1f} s)")


def report(name: str, output: str) -> None:
    say(f"-- FAILED: {name}")
    say("\n".join("   " + line for line in output.strip().splitlines()[-60:]))


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


def configure(name: str, options: list[str]) -> tuple[Path, Outcome]:
    """Set up build/NAME for native/; anew when the tree was moved, or meson or the options changed."""
    directory = BUILD / name
    version = run(BIN / "meson", "--version").output.strip()
    wanted = hashlib.sha256("\n".join([str(ROOT), version, *options]).encode()).hexdigest()
    stamp = directory / ".umm-configured"
    if stamp.is_file() and stamp.read_text() == wanted:
        return directory, Outcome(0, "")
    shutil.rmtree(directory, ignore_errors=True)
    outcome = run(BIN / "meson", "setup", directory, ROOT / "native", *options)
    if outcome.ok:
        stamp.write_text(wanted)
    return directory, outcome


def build(name: str, options: list[str]) -> tuple[Path, Outcome]:
    directory, outcome = configure(name, options)
    if outcome.ok:
        outcome = run(BIN / "ninja", "-C", directory)
    return directory, outcome


def without_aslr() -> list[str]:
    """The prefix under which gcc 12's thread sanitizer starts on kernels with 32 bits of mmap randomness."""
    prefix = ["setarch", platform.machine(), "-R"]
    return prefix if shutil.which("setarch") and run(*prefix, "true").ok else []


C_FLAVOURS: dict[str, list[str]] = {
    "plain": [],
    "address,undefined": ["-Db_sanitize=address,undefined"],
    "thread": ["-Db_sanitize=thread"],
}


def warnings_are_errors(compiler: str) -> list[str]:
    """For compilers whose warnings the project knows: a newer one may warn of more."""
    major = run(compiler, "-dumpversion").output.partition(".")[0].strip()
    return ["-Dwerror=true"] if major.isdigit() and int(major) <= NEWEST_GCC_KNOWN else []


def c_tests(flavour: str, tally: Tally) -> None:
    """Build native/ in this flavour and run its tests; each test is one check."""
    label = f"C tests, {flavour}"
    options = [*warnings_are_errors("cc"), *C_FLAVOURS[flavour]]
    directory, outcome = build("c-" + flavour.replace(",", "-"), options)
    if not outcome.ok:
        tally.check(f"{label}: build", False)
        report(f"{label}: build", outcome.output)
        return
    prefix = without_aslr() if flavour == "thread" else []
    log = directory / "meson-logs" / "testlog.json"
    log.unlink(missing_ok=True)
    outcome = run(*prefix, BIN / "meson", "test", "-C", directory, "--no-rebuild")
    tests = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for test in tests:
        name = f"{label}: {test['name'].rpartition(':')[2].strip()}"
        output = (test.get("stdout") or "") + (test.get("stderr") or "")
        if test["result"] == "SKIP":
            tally.skipped.append(
                (name, output.strip().splitlines()[-1] if output.strip() else "no reason given")
            )
            continue
        ok = test["result"] in ("OK", "EXPECTEDFAIL")
        tally.check(name, ok)
        if not ok:
            report(f"{name} ({test['result'].lower()}, exit status {test['returncode']})", output)
    # meson exits with the number of failed tests; anything else that it has to say is a failure of its own.
    if not tests or (not outcome.ok and not any(t["result"] not in ("OK", "SKIP") for t in tests)):
        tally.check(f"{label}: meson test", False)
        report(f"{label}: meson test", outcome.output)


def aarch64(tally: Tally) -> None:
    name = "C core for aarch64"
    if not shutil.which("aarch64-linux-gnu-gcc"):
        tally.skipped.append(
            (name, "lacks: aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")
        )
        return
    cross = ["--cross-file", str(ROOT / "native" / "cross" / "aarch64.ini")]
    _, outcome = build("c-aarch64", [*warnings_are_errors("aarch64-linux-gnu-gcc"), *cross])
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
        say("left out by --quick: pytest tests marked slow")
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
    parser.add_argument("pytest", nargs="*", metavar="-- ARG", help="arguments passed on to pytest")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, end)
    tally = Tally()
    stages: dict[str, Callable[[], None]] = {"lint": partial(lint, tally)}
    for flavour in C_FLAVOURS:
        stages[f"C tests, {flavour}"] = partial(c_tests, flavour, tally)
    stages["C core for aarch64"] = partial(aarch64, tally)
    stages["pytest"] = partial(python_tests, tally, args.quick, args.pytest)
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
