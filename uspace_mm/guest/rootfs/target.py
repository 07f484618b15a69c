"""What the guest is: the Debian release, its architecture and its Python."""

from __future__ import annotations

SUITE = "trixie"
ARCHITECTURE = "arm64"
MACHINE = "aarch64"
TRIPLET = "aarch64-linux-gnu"
PYTHON = "3.13"
# glibc 2.41: wheels built for it and for older ones load.
GLIBC_MINOR = 41

# Python looks for modules in this order: wheels that the user asked for, Debian's packages, ours. So a
# package given by name wins over the wheel of the same thing that every guest has.
USER_SITE = f"usr/local/lib/python{PYTHON}/dist-packages"
DEBIAN_SITE = "usr/lib/python3/dist-packages"
OWN_SITE = "usr/lib/uspace_mm/site-packages"

BASE_PACKAGES = (
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "mawk",
    "mount",
    "musl",
    "procps",
    "python3",
    "sed",
    "tar",
    "util-linux",
)
# What only scripts of packages and the administration of a real system need.
NOT_NEEDED = (
    "debconf",
    "dpkg",
    "init-system-helpers",
    "install-info",
    "libaudit1",
    "libdebconfclient0",
    "libncursesw6",
    "libnewt0.52",
    "libpam-modules",
    "libpam-modules-bin",
    "libpam-runtime",
    "libpam0g",
    "login",
    "login.defs",
    "openssl-provider-legacy",
    "passwd",
    "perl-base",
    "sysvinit-utils",
)
# Headers and libraries to compile for the guest, and for its Python.
SYSROOT_PACKAGES = ("libc6", "libc6-dev", "libpython3.13-dev", "libxxhash-dev", "linux-libc-dev")
# The same Python for the host, to compile modules with.
HOST_PYTHON_PACKAGES = ("libc6", "libexpat1", "libpython3.13-minimal", "python3.13-minimal", "zlib1g")
