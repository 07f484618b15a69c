"""Runs a command under a seccomp profile in the form that docker and podman take, loaded through libseccomp.

As a program: ``python confinement.py [--strict] [--without CALL]... PROFILE COMMAND...``. With ``--strict``
a call that the profile does not name kills the process (SIGSYS) instead of failing, so that none goes unseen;
``--without`` takes calls out of the profile. It ends with the exit status of the command, or 125 when the
filter cannot be loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# seccomp.h of libseccomp
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
UNKNOWN = -1
COMPARE = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
PR_SET_NO_NEW_PRIVS = 38


class _Compare(ctypes.Structure):
    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


def library() -> Any:
    """libseccomp; raises OSError where there is none."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_load.argtypes = [ctypes.c_void_p]
    lib.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compare),
    ]
    return lib


def errno_action(number: int) -> int:
    return 0x00050000 | number


def rules(profile: dict[str, Any]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """System call, action and conditions of each rule that holds here without capabilities."""
    arch = ARCHES[platform.machine()]
    for rule in profile["syscalls"]:
        needs, not_with = rule.get("includes", {}), rule.get("excludes", {})
        if needs.get("caps") or arch not in needs.get("arches", [arch]) or arch in not_with.get("arches", []):
            continue
        allow = rule["action"] == "SCMP_ACT_ALLOW"
        action = ALLOW if allow else errno_action(rule.get("errnoRet", profile["defaultErrnoRet"]))
        for name in rule["names"]:
            yield name, action, rule.get("args", [])


def confine(profile: dict[str, Any], *, strict: bool = False) -> None:
    """Load the filter into this process, for good; raises OSError when libseccomp or the kernel refuses."""
    lib = library()
    default = KILL_PROCESS if strict else errno_action(profile["defaultErrnoRet"])
    context = lib.seccomp_init(default)
    if not context:
        raise OSError("seccomp_init failed")
    for name, action, conditions in rules(profile):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        # Newer than this library, and so than the programs here; or what happens anyway. The engines skip
        # both, too.
        if number == UNKNOWN or action == default:
            continue
        array = (_Compare * len(conditions))()
        for compare, condition in zip(array, conditions, strict=True):
            compare.arg, compare.op = condition["index"], COMPARE[condition["op"]]
            compare.datum_a, compare.datum_b = condition["value"], condition.get("valueTwo", 0)
        _check(lib.seccomp_rule_add_array(context, action, number, len(conditions), array), name)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    _check(lib.seccomp_load(context), "seccomp_load")


def without(profile: dict[str, Any], *calls: str) -> dict[str, Any]:
    """The profile less these system calls."""
    left = [{**rule, "names": [n for n in rule["names"] if n not in calls]} for rule in profile["syscalls"]]
    return {**profile, "syscalls": [rule for rule in left if rule["names"]]}


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("profile", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    try:
        confine(without(json.loads(args.profile.read_text()), *args.without), strict=args.strict)
    except OSError as error:
        print(f"confinement: {error}", file=sys.stderr)
        sys.exit(125)
    os.execvp(args.command[0], args.command)


if __name__ == "__main__":
    main()
