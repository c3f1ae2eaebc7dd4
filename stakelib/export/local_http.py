"""Requests to programs of this computer: Ollama, and the course's own endpoint."""

from __future__ import annotations

import http.client
import json
import urllib.request
from typing import Any

# A proxy, set for the internet, would send these requests away from this computer
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call_json(url: str, body: Any = None, method: str | None = None, timeout: float = 660) -> Any:
    """The JSON reply of a local program; `body` goes as JSON, with POST unless `method` says otherwise.

    An empty reply is {}. Raises OSError where nobody answers within `timeout` (seconds), urllib's HTTPError (an OSError
    too) for a status of 400 and more, ValueError for a reply that is no JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            return json.loads(reply.read() or b"{}")
    except http.client.HTTPException as problem:  # the connection broke in the middle of a reply
        raise OSError(f"{type(problem).__name__}: {problem}") from problem
