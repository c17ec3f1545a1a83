"""Requests, answers, users and the route table of the test Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hub.store import Commit, Repository, RevisionMissing


if TYPE_CHECKING:
    from tests.hub.server import HubServer


@dataclass(frozen=True)
class User:
    """The owner of a token: `role` is "write" or "read", `orgs` are namespaces besides their own."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.orgs)


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value).encode()
    return Response(body, status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class HttpError(Exception):
    """An answer with an error status; `code` goes into X-Error-Code, which selects the client's exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return json_response({"error": self.message}, self.status, headers)


@dataclass
class Request:
    """A request as a route sees it: `path` is still percent-encoded, `user` is the token's owner, if a token came."""

    server: HubServer
    method: str
    path: str
    query_string: str
    headers: Mapping[str, str]
    body: bytes
    user: User | None = None

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(self.query_string).items()}

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body or b"{}")
        except json.JSONDecodeError:
            raise HttpError(400, "the request body is not JSON") from None
        return value if isinstance(value, dict) else {}

    def repository(self, kind: str, namespace: str, name: str) -> Repository:
        """The repository, if it exists and the caller may see it."""
        repository = self.server.repositories.get((kind, f"{namespace}/{name}"))
        hidden = repository is not None and repository.private and not self.member_of(repository.namespace)
        if repository is None or hidden:
            # Like the Hub: without a token nobody learns whether a private repository exists.
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise HttpError(status, message, "RepoNotFound")
        return repository

    def writable(self, kind: str, namespace: str, name: str) -> Repository:
        """The repository, if the caller may write to it."""
        repository = self.repository(kind, namespace, name)
        self.require_write(namespace)
        return repository

    def require_write(self, namespace: str) -> None:
        if self.user is None:
            raise HttpError(401, "Invalid username or password.")
        if self.user.role != "write":
            raise HttpError(403, "Forbidden: the token has no write permission")
        if not self.member_of(namespace):
            raise HttpError(403, f"Forbidden: you don't have the rights to write to the namespace {namespace}")

    def member_of(self, namespace: str) -> bool:
        return self.user is not None and namespace in self.user.namespaces


def resolve(repository: Repository, revision: str) -> Commit:
    """The commit of a revision, or the Hub's answer for an unknown one."""
    try:
        return repository.resolve(revision)
    except RevisionMissing:
        raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None


def entry_missing(commit: Commit, path: str) -> HttpError:
    # X-Repo-Commit on a 404 lets clients remember that the file is absent.
    return HttpError(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit.oid})


Handler = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, *patterns: str) -> Callable[[Handler], Handler]:
    """Register a handler; `{name}` matches one path segment and `{name*}` the rest, both handed over decoded."""

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, _compile(pattern), handler) for pattern in patterns)
        return handler

    return register


def _compile(pattern: str) -> re.Pattern[str]:
    regexp = ""
    for part in re.split(r"(\{\w+\*?\})", pattern):
        name = part.strip("{*}")
        if not part.startswith("{"):
            regexp += re.escape(part)
        elif part.endswith("*}"):
            regexp += f"(?P<{name}>.+)"
        else:
            regexp += f"(?P<{name}>[^/]+?)"
    return re.compile(regexp)


def dispatch(request: Request) -> Response:
    """The answer of the first route that fits; HEAD is answered as GET."""
    method = "GET" if request.method == "HEAD" else request.method
    for wanted, pattern, handler in ROUTES:
        match = pattern.fullmatch(request.path) if wanted == method else None
        if match is not None:
            return handler(request, **{key: unquote(value) for key, value in match.groupdict().items()})
    raise HttpError(404, f"no route for {request.method} {request.path}")
