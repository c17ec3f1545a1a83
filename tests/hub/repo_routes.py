"""The Hub's API around repositories: accounts, creation, information, branches, tags, pull requests."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.hub.card_rules import FRONT_MATTER, REPO_ID, validate_card
from tests.hub.protocol import HttpError, Request, Response, json_response, resolve, route
from tests.hub.store import MAIN, Commit, Repository


REPO = "/api/{kind}/{namespace}/{name}"


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Response:
    user = request.user
    if user is None:
        raise HttpError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": user.role}
    orgs = [{"type": "org", "name": name} for name in user.orgs]
    answer = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs}
    return json_response({**answer, "auth": {"type": "access_token", "accessToken": token}})


@route("POST", "/api/repos/create")
def create(request: Request) -> Response:
    payload = request.json()
    if request.user is None:
        raise HttpError(401, "Invalid username or password.")
    namespace = payload.get("organization") or request.user.name
    repo_id = f"{namespace}/{payload.get('name', '')}"
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or repo_id.endswith((".git", "-", ".")):
        raise HttpError(400, f"Invalid repository name: {repo_id}")
    request.require_write(namespace)
    kind = f"{payload.get('type', 'model')}s"
    key = (kind, repo_id)
    existing = request.server.repositories.get(key)
    if existing is not None:
        url = f"{request.server.url}/{existing.url_path}"
        return json_response({"error": "You already created this repo", "url": url}, 409)
    private = payload.get("visibility") == "private" or bool(payload.get("private"))
    repository = request.server.repositories[key] = Repository(kind, repo_id, private)
    return json_response({"url": f"{request.server.url}/{repository.url_path}", "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(request: Request) -> Response:
    payload = request.json()
    namespace = payload.get("organization") or (request.user.name if request.user else "")
    kind = f"{payload.get('type', 'model')}s"
    repository = request.writable(kind, namespace, payload.get("name", ""))
    del request.server.repositories[(kind, repository.repo_id)]
    return json_response({"success": True})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Response:
    payload = request.json()
    warnings, errors = validate_card(payload.get("content", ""), payload.get("repoType", "model"))
    answer = {"warnings": [{"message": text} for text in warnings], "errors": [{"message": text} for text in errors]}
    return json_response(answer, 400 if errors else 200)


@route("GET", f"{REPO}/auth-check")
def auth_check(request: Request, kind: str, namespace: str, name: str) -> Response:
    request.repository(kind, namespace, name)
    return json_response({})


@route("GET", f"{REPO}/auth-check/write")
def auth_check_write(request: Request, kind: str, namespace: str, name: str) -> Response:
    request.writable(kind, namespace, name)
    return json_response({})


@route("GET", REPO)
def info(request: Request, kind: str, namespace: str, name: str) -> Response:
    return revision_info(request, kind, namespace, name, "main")


@route("GET", f"{REPO}/revision/{{revision}}")
def revision_info(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    repository = request.repository(kind, namespace, name)
    commit = resolve(repository, revision)
    return json_response(_describe(repository, commit, with_blobs=request.flag("blobs")))


def _describe(repository: Repository, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            row = blob.entry(path)
            sibling |= {"size": row["size"], "blobId": row["oid"]}
            if blob.lfs:
                sibling["lfs"] = {"sha256": blob.sha256, "size": row["size"], "pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    card = _card_data(commit)
    answer = {
        "_id": commit.oid[:24],
        "id": repository.repo_id,
        "author": repository.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": "2025-01-01T00:00:00.000Z",
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "cardData": card,
        "siblings": siblings,
    }
    if repository.kind == "models":
        answer |= {"modelId": repository.repo_id, "spaces": []}
        answer |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    return answer


def _card_data(commit: Commit) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    match = FRONT_MATTER.match(readme.content.decode()) if readme is not None else None
    data = yaml.safe_load(match.group(1)) if match is not None else None
    return data if isinstance(data, dict) else {}


@route("GET", f"{REPO}/refs")
def refs(request: Request, kind: str, namespace: str, name: str) -> Response:
    repository = request.repository(kind, namespace, name)
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    if request.flag("include_prs"):
        kinds["pullRequests"] = "refs/pr/"
    answer = {}
    for group, prefix in kinds.items():
        answer[group] = [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repository.refs.items()
            if ref.startswith(prefix)
        ]
    return json_response(answer)


@route("GET", f"{REPO}/commits/{{revision}}")
def commits(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    repository = request.repository(kind, namespace, name)
    resolve(repository, revision)
    rows = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repository.history(revision)
    ]
    return json_response(rows)


@route("POST", f"{REPO}/branch/{{branch}}")
def create_branch(request: Request, kind: str, namespace: str, name: str, branch: str) -> Response:
    repository = request.writable(kind, namespace, name)
    if branch.startswith("refs/") or not re.fullmatch(r"[\w./-]+", branch):
        raise HttpError(400, f"Invalid branch name: {branch}")
    return _new_ref(request, repository, f"refs/heads/{branch}", request.json().get("startingPoint", "main"))


@route("DELETE", f"{REPO}/branch/{{branch}}")
def delete_branch(request: Request, kind: str, namespace: str, name: str, branch: str) -> Response:
    return _delete_ref(request.writable(kind, namespace, name), f"refs/heads/{branch}")


@route("POST", f"{REPO}/tag/{{revision}}")
def create_tag(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    repository = request.writable(kind, namespace, name)
    return _new_ref(request, repository, f"refs/tags/{request.json()['tag']}", revision)


@route("DELETE", f"{REPO}/tag/{{tag}}")
def delete_tag(request: Request, kind: str, namespace: str, name: str, tag: str) -> Response:
    return _delete_ref(request.writable(kind, namespace, name), f"refs/tags/{tag}")


def _new_ref(request: Request, repository: Repository, ref: str, start: str) -> Response:
    commit = resolve(repository, start)
    if ref in repository.refs:
        raise HttpError(409, f"Reference {ref} already exists")
    repository.refs[ref] = commit.oid
    return json_response({"ref": ref, "targetCommit": commit.oid}, 201)


def _delete_ref(repository: Repository, ref: str) -> Response:
    if ref == MAIN:
        raise HttpError(403, "The branch main cannot be deleted")
    if repository.refs.pop(ref, None) is None:
        raise HttpError(404, f"Reference {ref} not found", "RevisionNotFound")
    return json_response({"success": True})


@route("POST", f"{REPO}/discussions/{{number}}/merge")
def merge_pull_request(request: Request, kind: str, namespace: str, name: str, number: str) -> Response:
    repository = request.writable(kind, namespace, name)
    head = resolve(repository, f"refs/pr/{number}")
    if head.parent != repository.refs[MAIN]:
        raise HttpError(409, "The pull request is not based on the head of main")
    repository.refs[MAIN] = head.oid
    return json_response({"success": True})
