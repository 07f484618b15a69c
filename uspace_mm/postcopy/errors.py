"""What can go wrong between the two sides of a migration, as one class per kind of failure."""

from __future__ import annotations

import errno

from uspace_mm.errors import KernelError, UnsupportedError, UspaceError


class PostcopyError(UspaceError):
    """A migration failed. ``errno`` is the C core's, a positive number."""

    def __init__(self, message: str, error: int = 0) -> None:
        super().__init__(message)
        self.errno = error


class ConnectionLost(PostcopyError):
    """The peer is gone: closed or reset connection."""


class PeerTimeout(PostcopyError):
    """The peer moved no byte for longer than the idle timeout (or did not finish the handshake in time)."""


class ProtocolError(PostcopyError):
    """The peer sent what the protocol in ``native/postcopy/protocol.h`` does not allow."""


class PeerFailed(PostcopyError):
    """The peer gave up and said why."""


class Stopped(PostcopyError):
    """This side was told to stop."""


_KINDS: dict[int, type[PostcopyError]] = {
    errno.ECONNRESET: ConnectionLost,
    errno.EPIPE: ConnectionLost,
    errno.ETIMEDOUT: PeerTimeout,
    errno.EPROTO: ProtocolError,
    errno.EMSGSIZE: ProtocolError,
    errno.EBADMSG: ProtocolError,
    errno.EREMOTEIO: PeerFailed,
    errno.ECANCELED: Stopped,
}


def raise_for(result: int, call: str, words: str) -> None:
    """Turn a negative errno of the C core into the exception for it; 0 passes. `words`: what C said of it."""
    if result >= 0:
        return
    error = -result
    if error == errno.EOPNOTSUPP:
        raise UnsupportedError(
            "finding written pages needs Linux 6.7 or later (UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN); "
            "`uspace-mm doctor` shows what this machine has"
        )
    kind = _KINDS.get(error)
    if kind is not None:
        raise kind(words or f"{call}: {errno.errorcode[error]}", error)
    if error in (errno.EPERM, errno.EACCES):
        raise UnsupportedError(
            f"{call}: no right to open a userfaultfd; run as root, give access to /dev/userfaultfd, "
            "or set vm.unprivileged_userfaultfd=1"
        )
    raise KernelError(call, error, hint=words)
