"""The gate as a URL, for languages in which a descriptor is awkward: ``GET $BOTLEASE_GATE_URL`` is answered when the
term begins, with ``{"term": 12}``. Asking means: ready. On loopback, behind a path nobody can guess.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

from botlease import http


class GateServer:
    def __init__(self) -> None:
        self.arrived: Callable[[], None] = lambda: None
        self._path = ""
        self._term: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None
        self._port = 0

    async def listen(self) -> None:
        """Raises OSError if no port of 127.0.0.1 is to be had."""
        self._server = await http.serve(self._answer, 0, limit=4096)
        self._port = self._server.sockets[0].getsockname()[1]

    def shut(self) -> str:
        """For a new process: a gate that nobody has passed. Returns its address."""
        self._term.cancel()
        self._term = asyncio.get_running_loop().create_future()
        self._path = f"/gate/{secrets.token_urlsafe(16)}"
        return f"http://127.0.0.1:{self._port}{self._path}"

    def open(self, term: int) -> None:
        if not self._term.done():
            self._term.set_result(term)

    def close(self) -> None:
        self._term.cancel()
        if self._server is not None:
            self._server.close()

    async def _answer(self, request: http.Request) -> http.Response:
        if request.method != "GET" or request.target != self._path:
            return http.Response(404, b'{"error": "not the gate"}\n')
        term = self._term
        self.arrived()
        gone = asyncio.ensure_future(request.gone.wait())
        try:
            both: set[asyncio.Future[Any]] = {term, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if term.cancelled() or not term.done():
            return http.Response(503, b'{"error": "this gate stays shut"}\n')
        return http.Response(200, json.dumps({"term": term.result()}).encode() + b"\n")
