"""Debian packages for the guest, fetched through the mirror of the host's apt and unpacked without root."""

from uspace_mm.guest.debian.archive import Archive, ArchiveError, Package, PackageGone, check_name
from uspace_mm.guest.debian.extract import extract

__all__ = ["Archive", "ArchiveError", "Package", "PackageGone", "check_name", "extract"]
