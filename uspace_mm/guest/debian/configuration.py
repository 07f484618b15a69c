"""A private configuration of apt: one suite, one architecture, our own folders, the host's mirror."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from uspace_mm.errors import UnsupportedError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Settings of the host's apt that say how its mirror is reached, and how its dates are judged.
_REACHING = re.compile(r"Acquire::(?:https?|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date)\b")


def mirror() -> str:
    """URI of a Debian mirror: ``$UMM_DEBIAN_MIRROR``, or the one that the host's apt takes Debian from.

    Raises :class:`UnsupportedError` when there is no apt, no keyring of Debian's archive, or no such source.
    """
    if not shutil.which("apt-get"):
        raise UnsupportedError("lacks: apt-get (Debian: apt); the guest's packages come through it")
    if not KEYRING.is_file():
        raise UnsupportedError(f"lacks: {KEYRING} (Debian: debian-archive-keyring)")
    own = os.environ.get("UMM_DEBIAN_MIRROR")
    if own:
        if not re.fullmatch(r"[a-z+]+:/\S+", own):
            raise UnsupportedError(
                f"UMM_DEBIAN_MIRROR is {own!r}, which is no URI such as http://HOST/debian"
            )
        return own.rstrip("/")
    # Without downloaded lists (a container image) apt says nothing unless told that it need not know the
    # releases, and then prints the word itself for their label.
    ask = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)", "Created-By: Packages"]
    targets = _host(ask).splitlines() or _host([*ask, "--no-release-info"]).splitlines()
    wanted = ("Debian", "$(LABEL)") if _is_debian() else ("Debian",)
    for label in wanted:
        for uri, _, found in (line.partition(" ") for line in targets):
            if found == label and "security" not in uri:
                return uri.rstrip("/")
    raise UnsupportedError(
        "no Debian mirror among apt's sources: set UMM_DEBIAN_MIRROR to the URI of one (http://HOST/debian)"
    )


def write(folder: Path, uri: str, suite: str, architecture: str) -> Path:
    """Write the configuration for `suite` and `architecture` in `folder`: the file for ``APT_CONFIG``."""
    for name in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    _replace(folder / "sources.list", f"deb [signed-by={KEYRING}] {uri} {suite} main\n")
    settings = {
        "Dir": "/",
        "Dir::State": f"{folder}/",
        "Dir::State::lists": f"{folder}/lists",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "Dir::Etc": f"{folder}/etc",
        "Dir::Etc::sourcelist": f"{folder}/sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::netrc": "/etc/apt/auth.conf",
        "Dir::Etc::netrcparts": "/etc/apt/auth.conf.d",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Install-Suggests": "false",
        # As root, apt would hand downloads to the user _apt, who may not write here.
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::http::Timeout": "30",
        "Acquire::https::Timeout": "30",
        "Acquire::Retries": "2",
    }
    lines = ["#clear APT::Architectures;", *(f'{name} "{value}";' for name, value in settings.items())]
    # The host's own words come last, so that its time limits win.
    lines += [line for line in _host(["apt-config", "dump", "Acquire"]).splitlines() if _REACHING.match(line)]
    _replace(folder / "apt.conf", "\n".join(lines) + "\n")
    return folder / "apt.conf"


def _replace(path: Path, text: str) -> None:
    """Write `text` where it differs; readable by its owner only, since a proxy may have a password."""
    if path.is_file() and path.read_text() == text:
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.touch(mode=0o600)
        new.write_text(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _host(command: list[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    environment.pop("APT_CONFIG", None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise UnsupportedError(f"lacks: {command[0]} (Debian: apt): {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UnsupportedError(f"{' '.join(command[:2])} failed: {said[-1]}; mend apt's configuration")
    return done.stdout


def _is_debian() -> bool:
    try:
        return "ID=debian" in Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return False
