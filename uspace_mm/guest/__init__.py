"""Guests with 4K, 16K and 64K pages: kernels, root file systems, boot, and tests that run in them."""
