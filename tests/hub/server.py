"""A loopback server that speaks the Hub's HTTP, for tests with the real clients.

    server = HubServer()
    server.start()              # server.url, server.cdn_url (a second origin, for large files)
    os.environ |= server.environment(hf_home)
    ...
    server.log                  # every request, in order
    server.fail("PUT", "/upload/", status=503, times=2)
    server.reset()

Standard library and PyYAML only. Everything is held in memory; Xet is not spoken (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The route modules register their handlers when they are imported.
from tests.hub import file_routes, repo_routes
from tests.hub.protocol import HttpError, Request, Response, User, dispatch
from tests.hub.store import Repository


__all__ = [
    "ENVIRONMENT_TO_UNSET",
    "OTHER_TOKEN",
    "READ_TOKEN",
    "TOKEN",
    "HubServer",
    "Logged",
    "file_routes",
    "repo_routes",
]

TOKEN = "hf_WriteTokenOfTester0123456789"
READ_TOKEN = "hf_ReadTokenOfTester0123456789"
OTHER_TOKEN = "hf_TokenOfSomebody0123456789"
USERS = {
    TOKEN: User("tester", orgs=("test-org",)),
    READ_TOKEN: User("tester", role="read"),
    OTHER_TOKEN: User("somebody"),
}
ENVIRONMENT_TO_UNSET = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class Logged:
    """One request as it arrived; `origin` is "hub" or "cdn", the names of `headers` are in lower case."""

    origin: str
    method: str
    path: str
    query: str
    token: str | None
    status: int
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(repr=False, compare=False)


@dataclass
class _Fault:
    method: str
    pattern: re.Pattern[str]
    status: int | None
    times: int
    after: bool
    headers: dict[str, str]

    def response(self) -> Response | None:
        if self.status is None:
            return None
        return HttpError(self.status, "injected fault", headers=self.headers).response()


class HubServer:
    """The server, its repositories, its request log and its faults."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hub = _listen(self, "hub")
        self._cdn = _listen(self, "cdn")
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_address[1]}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.users: dict[str, User] = {}
        self.log: list[Logged] = []
        self._faults: list[_Fault] = []
        self.reset()

    def start(self) -> None:
        for listener in (self._hub, self._cdn):
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        for listener in (self._hub, self._cdn):
            listener.shutdown()
            listener.server_close()

    def reset(self) -> None:
        """Forget all repositories, files, requests and faults."""
        with self._lock:
            self.repositories.clear()
            self.lfs_objects.clear()
            self.log.clear()
            self._faults.clear()
            self.users = dict(USERS)

    def environment(self, hf_home: str) -> dict[str, str]:
        """The variables that point Hub clients here; the names in ENVIRONMENT_TO_UNSET must be unset besides."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": hf_home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_repository(
        self, repo_id: str, files: dict[str, bytes | str] | None = None, kind: str = "models", private: bool = False
    ) -> Repository:
        """A repository made without HTTP; `files` become its second commit."""
        repository = self.repositories[(kind, repo_id)] = Repository(kind, repo_id, private)
        if files:
            repository.add_files(files)
        return repository

    def model(self, repo_id: str) -> Repository:
        return self.repositories[("models", repo_id)]

    def dataset(self, repo_id: str) -> Repository:
        return self.repositories[("datasets", repo_id)]

    def requests(self, method: str | None = None, path: str = "", origin: str | None = None) -> list[Logged]:
        """The logged requests of a method whose path matches a regular expression."""
        return [
            entry
            for entry in list(self.log)
            if method in (None, entry.method) and origin in (None, entry.origin) and re.search(path, entry.path)
        ]

    def fail(
        self,
        method: str,
        path: str,
        status: int | None = 503,
        times: int = 1,
        after: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next `times` requests that match with `status`, or drop the connection if it is None.

        `after=True` carries the request out first: the client only misses the answer.
        """
        with self._lock:
            self._faults.append(_Fault(method, re.compile(path), status, times, after, headers or {}))

    def handle(self, origin: str, request: Request) -> Response | None:
        """The answer to a request, or None to drop the connection."""
        with self._lock:
            fault = self._next_fault(request)
            response: Response | None = self._answer(request) if fault is None or fault.after else None
            if fault is not None:
                response = fault.response()
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            self.log.append(
                Logged(
                    origin=origin,
                    method=request.method,
                    path=request.path,
                    query=request.query_string,
                    token=token if scheme == "Bearer" else None,
                    status=response.status if response is not None else 0,
                    body=request.body,
                    headers={name.lower(): value for name, value in request.headers.items()},
                )
            )
            return response

    def _next_fault(self, request: Request) -> _Fault | None:
        for fault in self._faults:
            if fault.times > 0 and fault.method == request.method and fault.pattern.search(request.path):
                fault.times -= 1
                return fault
        return None

    def _answer(self, request: Request) -> Response:
        try:
            authorization = request.headers.get("Authorization")
            if authorization is not None:
                request.user = self.users.get(authorization.removeprefix("Bearer "))
                if request.user is None:
                    raise HttpError(401, "Invalid credentials in Authorization header")
            return dispatch(request)
        except HttpError as error:
            return error.response()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer
    origin: str


def _listen(hub: HubServer, origin: str) -> _Listener:
    listener = _Listener(("127.0.0.1", 0), _Connection)
    listener.hub, listener.origin = hub, origin
    return listener


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body leave in one packet: two small ones would wait for the delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Listener

    def _respond(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(self.server.hub, self.command, path, query, self.headers, self._read_body())  # type: ignore[arg-type]
        response = self.server.hub.handle(self.server.origin, request)
        if response is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _respond

    def log_message(self, format: str, *args: Any) -> None:
        """The log is kept in memory."""
