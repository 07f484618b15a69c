"""Moving memory that is in use to another process: precopy, the switch, and faults over the network.

:class:`~uspace_mm.postcopy.sender.Sender` is the source's side,
:class:`~uspace_mm.postcopy.receiver.Receiver` the destination's. The protocol is on one page in
``native/postcopy/protocol.h``.
"""
