"""The private apt: which mirror it takes, and what it says where there is none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from uspace_mm.errors import UnsupportedError
from uspace_mm.guest.debian import configuration

MIRROR = "http://mirror.invalid/debian"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that stands for the host's apt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("UMM_DEBIAN_MIRROR", raising=False)
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(configuration, "KEYRING", keyring)
    program(folder / "apt-config", "")
    return folder


def program(path: Path, prints: str, status: int = 0) -> None:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {status}\n")
    path.chmod(0o755)


def test_the_hosts_mirror_of_debian_is_taken(host: Path) -> None:
    program(
        host / "apt-get",
        "http://other.invalid/tool Tool\nhttp://security.invalid/debian-security Debian\n"
        + f"{MIRROR}/ Debian",
    )
    assert configuration.mirror() == MIRROR


def test_without_downloaded_lists_the_label_is_unknown(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # apt 3 then lists nothing, unless it is asked to.
    text = f"case $* in *--no-release-info*) echo '{MIRROR}/ $(LABEL)' ;; esac"
    (host / "apt-get").write_text(f"#!/bin/sh\n{text}\n")
    (host / "apt-get").chmod(0o755)
    monkeypatch.setattr(configuration, "_is_debian", lambda: True)
    assert configuration.mirror() == MIRROR
    monkeypatch.setattr(configuration, "_is_debian", lambda: False)
    with pytest.raises(UnsupportedError, match="UMM_DEBIAN_MIRROR"):
        configuration.mirror()


def test_another_distribution_is_told_what_to_set(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(host / "apt-get", "http://archive.invalid/ubuntu/ Ubuntu")
    with pytest.raises(UnsupportedError, match="set UMM_DEBIAN_MIRROR"):
        configuration.mirror()
    monkeypatch.setenv("UMM_DEBIAN_MIRROR", f"{MIRROR}/")
    assert configuration.mirror() == MIRROR
    monkeypatch.setenv("UMM_DEBIAN_MIRROR", "mirror.invalid")
    with pytest.raises(UnsupportedError, match="no URI"):
        configuration.mirror()


def test_what_is_missing_is_named(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(host / "apt-get", "E: broken", status=100)
    with pytest.raises(UnsupportedError, match="apt-get indextargets failed"):
        configuration.mirror()
    (tmp_path / "keyring.gpg").unlink()
    with pytest.raises(UnsupportedError, match="debian-archive-keyring"):
        configuration.mirror()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"lacks: apt-get \(Debian: apt\)"):
        configuration.mirror()


def test_how_the_mirror_is_reached_is_taken_over_and_kept_from_others(host: Path, tmp_path: Path) -> None:
    program(
        host / "apt-config",
        'Acquire::http::Proxy "http://user:secret@proxy.invalid:3128";\nAcquire::Languages "none";\n'
        'Acquire::IndexTargets::deb::Contents "x";\nAcquire::Check-Date "false";',
    )
    file = configuration.write(tmp_path / "apt", MIRROR, "trixie", "arm64")
    text = file.read_text()
    assert 'Acquire::http::Proxy "http://user:secret@proxy.invalid:3128";' in text
    assert 'Acquire::Check-Date "false";' in text
    assert "IndexTargets" not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    sources = (tmp_path / "apt/sources.list").read_text()
    assert sources == f"deb [signed-by={tmp_path / 'keyring.gpg'}] {MIRROR} trixie main\n"
    before = file.stat()
    configuration.write(tmp_path / "apt", MIRROR, "trixie", "arm64")
    assert os.path.samestat(file.stat(), before), "not written again when nothing changed"
