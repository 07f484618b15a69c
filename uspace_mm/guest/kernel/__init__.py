"""Kernels for guests: built from one source, fetched from Debian, inspected and compared."""
