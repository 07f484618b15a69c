"""Typed access to the kernel interfaces that memory managers in user space need; no policy.

One module per interface: :mod:`userfaultfd`, :mod:`mapping`, :mod:`memfd`, :mod:`madvise`, :mod:`process`,
:mod:`pagemap`, :mod:`transparent_hugepage`, :mod:`prctl`, :mod:`proc`, :mod:`io_uring`, and :mod:`features`,
which finds out what this kernel has. Addresses are ``int``, sizes bytes. Bad arguments raise
:class:`~uspace_mm.errors.InputError`, failed calls :class:`~uspace_mm.errors.KernelError` with call, address,
length and errno.
"""
