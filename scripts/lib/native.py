"""The stages of scripts/test that build and test the C core: plain, under the sanitizers, and for aarch64."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path

from scripts.lib.running import ROOT, Outcome, Tally, report, run

BUILD = ROOT / "build"
BIN = Path(sys.executable).parent
NEWEST_GCC_KNOWN = 12


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


def c_tests(flavour: str, tally: Tally, full: bool = False) -> None:
    """Build native/ in this flavour and run its tests; each test is one check. `full`: stress of a minute."""
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
    env = {"UMM_STRESS_S": "60"} if full else None
    outcome = run(*prefix, BIN / "meson", "test", "-C", directory, "--no-rebuild", env=env)
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


# Debian's cross compiler comes without liburcu.
CROSS = ["--cross-file", str(ROOT / "native" / "cross" / "aarch64.ini"), "-Drcu=counters"]


def aarch64(tally: Tally) -> None:
    name = "C core for aarch64"
    if not shutil.which("aarch64-linux-gnu-gcc"):
        tally.skipped.append(
            (name, "lacks: aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")
        )
        return
    _, outcome = build("c-aarch64", [*warnings_are_errors("aarch64-linux-gnu-gcc"), *CROSS])
    tally.check(name, outcome.ok)
    if not outcome.ok:
        report(name, outcome.output)
