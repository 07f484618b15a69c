"""Memory management in user space, on Linux system calls: a pager on userfaultfd, and what stands on it."""

__version__ = "0.1.0"
