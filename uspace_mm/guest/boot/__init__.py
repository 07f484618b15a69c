"""Boots a guest under QEMU, runs commands in it, and says how they ended."""
