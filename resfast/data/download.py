"""Downloads by torchvision that neither hang nor start where the network cannot be reached."""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

REACHABLE_TIMEOUT_S = 5.0
DOWNLOAD_STALL_S = 60.0


def unreachable(url: str) -> str:
    """Why ``url`` cannot be downloaded, or "" if it can.

    Asks in a thread, because socket timeouts do not cover DNS lookups.
    """
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=REACHABLE_TIMEOUT_S):
                answer.put("")
        except urllib.error.HTTPError as error:
            refuses_head = error.code in (405, 501)
            answer.put("" if refuses_head else f"answers {error.code} {error.reason}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.put(f"cannot be reached ({getattr(error, 'reason', error)})")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=REACHABLE_TIMEOUT_S + 1)
    except queue.Empty:
        return f"did not answer within {REACHABLE_TIMEOUT_S:.0f} s"


@contextlib.contextmanager
def stall_limit() -> Iterator[None]:
    """Sets a default socket timeout, because torchvision's download sets none."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
