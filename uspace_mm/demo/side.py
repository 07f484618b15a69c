"""One side of the demo as a process of its own: events as lines of JSON on stdout, one for each."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from uspace_mm.demo.options import Emit, Options
from uspace_mm.errors import UspaceError

#: Set when the parent says that the other side's process has ended.
peer_gone = threading.Event()


def _heed_parent() -> None:
    """The parent holds our stdin open and writes when the peer is gone; when it ends, so do we at once."""
    while os.read(0, 512):
        peer_gone.set()
    os._exit(1)


def main(name: str, run: Callable[[Options, Emit], dict[str, Any]], options_json: str) -> int:
    """Run a side; the last event is ``result`` or ``error``. Returns the exit status."""
    threading.Thread(target=_heed_parent, name="parent", daemon=True).start()
    lock = threading.Lock()

    def emit(kind: str, **fields: Any) -> None:
        line = json.dumps({"event": kind, "side": name, **fields})
        with lock:
            try:
                print(line, flush=True)
            except BrokenPipeError:
                os._exit(1)

    try:
        result = run(Options.from_json(options_json), emit)
    except UspaceError as error:
        emit("error", message=str(error), status=error.exit_status)
        return error.exit_status
    except MemoryError:
        emit("error", message="out of memory; give a smaller --size", status=1)
        return 1
    except KeyboardInterrupt:
        return 130
    emit("result", result=result)
    sys.stdout.flush()
    return 0 if result["ok"] else 1
