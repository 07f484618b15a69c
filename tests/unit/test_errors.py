"""Errors name what failed and carry the exit status of the command line."""

from __future__ import annotations

import errno

import pytest

from uspace_mm import errors
from uspace_mm.errors import InputError, KernelError, UnsupportedError, UspaceError


def test_every_error_of_the_package_has_one_base_and_a_documented_exit_status() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) >= 4
    for c in classes:
        assert issubclass(c, UspaceError), c
        assert c.exit_status in (1, 2, 3), c
        assert c.__doc__, c


def test_exit_statuses() -> None:
    assert UspaceError.exit_status == KernelError.exit_status == 1
    assert InputError.exit_status == 2
    assert UnsupportedError.exit_status == 3


def test_a_kernel_error_names_call_address_length_and_errno() -> None:
    error = KernelError("UFFDIO_COPY", errno.EEXIST, address=0x7F0000001000, length=8192, hint="do this")
    assert str(error) == "UFFDIO_COPY at 0x7f0000001000, 8192 bytes: File exists [EEXIST]; do this"
    assert (error.call, error.address, error.length) == ("UFFDIO_COPY", 0x7F0000001000, 8192)
    assert error.errno == errno.EEXIST
    assert isinstance(error, OSError)


def test_a_kernel_error_takes_the_negative_errno_of_the_c_side() -> None:
    error = KernelError("mmap", -errno.ENOMEM)
    assert error.errno == errno.ENOMEM
    assert str(error) == "mmap: Cannot allocate memory [ENOMEM]"


def test_an_errno_without_a_name_is_still_told() -> None:
    assert "[4094]" in str(KernelError("ioctl", 4094))


def test_input_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="no such size"):
        raise InputError("no such size")
