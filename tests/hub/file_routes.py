"""The Hub's API around files: uploads by preupload, LFS and commit; listings; downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs

from tests.hub.card_rules import validate_card
from tests.hub.protocol import HttpError, Request, Response, entry_missing, json_response, resolve, route
from tests.hub.repo_routes import REPO
from tests.hub.store import Blob, Commit, Repository, directory_rows


# Extensions that the Hub's own .gitattributes sends to LFS, as far as this package writes them.
LFS_EXTENSIONS = (".safetensors", ".bin", ".pt", ".npz", ".npy", ".parquet", ".arrow", ".zip", ".tar", ".gz")
LFS_SIZE = 10_000_000


@route("POST", f"{REPO}/preupload/{{revision}}")
def preupload(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    repository = _uploadable(request, kind, namespace, name)
    present = resolve(repository, revision).files
    payload = request.json()
    ignored = [line.strip() for line in payload.get("gitIgnore", "").splitlines() if line.strip()]
    answers: list[dict[str, Any]] = []
    for file in payload["files"]:
        path = file["path"]
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = file["size"] > LFS_SIZE or path.endswith(LFS_EXTENSIONS) or binary
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": any(fnmatch(path, pattern) for pattern in ignored),
                "oid": present[path].etag if path in present else None,
            }
        )
    return json_response({"files": answers})


def _uploadable(request: Request, kind: str, namespace: str, name: str) -> Repository:
    """Anybody with a token may propose a pull request; a direct commit needs write permission."""
    if request.flag("create_pr") and request.user is not None:
        return request.repository(kind, namespace, name)
    return request.writable(kind, namespace, name)


@route(
    "POST",
    "/{namespace}/{name}.git/info/lfs/objects/batch",
    "/{kind}/{namespace}/{name}.git/info/lfs/objects/batch",
)
def lfs_batch(request: Request, namespace: str, name: str, kind: str = "models") -> Response:
    repository = request.repository(kind, namespace, name)
    if request.user is None:
        raise HttpError(401, "Invalid username or password.")
    objects: list[dict[str, Any]] = []
    for item in request.json()["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in request.server.lfs_objects:
            verify = f"{request.server.url}/{repository.url_path}.git/info/lfs/verify"
            answer["actions"] = {
                "upload": {"href": f"{request.server.cdn_url}/upload/{item['oid']}"},
                "verify": {"href": verify},
            }
        objects.append(answer)
    return json_response({"transfer": "basic", "objects": objects})


@route("POST", "/{namespace}/{name}.git/info/lfs/verify", "/{kind}/{namespace}/{name}.git/info/lfs/verify")
def lfs_verify(request: Request, namespace: str, name: str, kind: str = "models") -> Response:
    request.repository(kind, namespace, name)
    payload = request.json()
    content = request.server.lfs_objects.get(payload["oid"])
    if content is None or len(content) != payload["size"]:
        raise HttpError(404, f"object {payload['oid']} was not uploaded")
    return json_response({})


@route("PUT", "/upload/{oid}")
def lfs_upload(request: Request, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HttpError(400, "the content does not have the announced SHA-256")
    request.server.lfs_objects[oid] = request.body
    return Response(headers={"ETag": f'"{oid}"'})


@route("GET", "/lfs/{oid}")
def lfs_download(request: Request, oid: str) -> Response:
    content = request.server.lfs_objects.get(oid)
    if content is None:
        raise HttpError(404, "no such object")
    return _serve(request, content, {"ETag": f'"{oid}"'})


@route("POST", f"{REPO}/commit/{{revision}}")
def commit(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    repository = _uploadable(request, kind, namespace, name)
    base = resolve(repository, revision)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None or not header.get("summary"):
        raise HttpError(400, "a commit needs a header with a summary")
    parent = header.get("parentCommit")
    if parent is not None and not base.oid.startswith(parent):
        raise HttpError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for line in lines:
        if line["key"] != "header":
            _apply(request, files, line["key"], line["value"])
    _check_readme(kind, files)
    pull_request = request.flag("create_pr")
    ref = repository.open_pull_request(base) if pull_request else repository.ref(revision)
    if ref is None:
        raise HttpError(400, f"{revision} is not a branch")
    author = request.user.name if request.user else ""
    new = repository.commit(ref, files, header["summary"], header.get("description", ""), author)
    page = f"{request.server.url}/{repository.url_path}"
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{page}/commit/{new.oid}", "hookOutput": ""}
    if pull_request:
        answer["pullRequestUrl"] = f"{page}/discussions/{ref.removeprefix('refs/pr/')}"
    return json_response(answer)


def _apply(request: Request, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        encoded = value.get("encoding") == "base64"
        files[path] = Blob(base64.b64decode(value["content"]) if encoded else value["content"].encode())
    elif key == "lfsFile":
        if value["oid"] not in request.server.lfs_objects:
            raise HttpError(400, f"{path}: the LFS object {value['oid']} was not uploaded")
        files[path] = Blob(request.server.lfs_objects[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if path not in files:
            raise HttpError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise HttpError(400, f"unknown operation {key}")


def _check_readme(kind: str, files: dict[str, Blob]) -> None:
    if "README.md" in files:
        _, errors = validate_card(files["README.md"].content.decode(), kind.removesuffix("s"))
        if errors:
            raise HttpError(400, "Invalid metadata in README.md: " + "; ".join(errors).replace("\n", " "))


@route("GET", f"{REPO}/tree/{{revision}}", f"{REPO}/tree/{{revision}}/{{folder*}}")
def tree(request: Request, kind: str, namespace: str, name: str, revision: str, folder: str = "") -> Response:
    found = resolve(request.repository(kind, namespace, name), revision)
    rows = directory_rows(found.files, folder.strip("/"), request.flag("recursive"))
    if folder and not rows:
        raise entry_missing(found, folder)
    return json_response(rows, headers={"X-Repo-Commit": found.oid})


@route("POST", f"{REPO}/paths-info/{{revision}}")
def paths_info(request: Request, kind: str, namespace: str, name: str, revision: str) -> Response:
    found = resolve(request.repository(kind, namespace, name), revision)
    rows: list[dict[str, object]] = []
    for path in parse_qs(request.body.decode()).get("paths", []):
        if path in found.files:
            rows.append(found.files[path].entry(path))
        elif any(file.startswith(f"{path.rstrip('/')}/") for file in found.files):
            rows.append({"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path})
    return json_response(rows)


@route(
    "GET",
    "/datasets/{namespace}/{name}/resolve/{revision}/{path*}",
    "/{namespace}/{name}/resolve/{revision}/{path*}",
)
def download(request: Request, namespace: str, name: str, revision: str, path: str) -> Response:
    kind = "datasets" if request.path.startswith("/datasets/") else "models"
    found = resolve(request.repository(kind, namespace, name), revision)
    if path not in found.files:
        raise entry_missing(found, path)
    return _serve_file(request, found, path)


def _serve_file(request: Request, commit: Commit, path: str) -> Response:
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return _serve(request, blob.content, {**headers, "ETag": f'"{blob.etag}"'})
    # Files committed without HTTP have not passed through the upload route.
    request.server.lfs_objects.setdefault(blob.sha256, blob.content)
    location = f"{request.server.cdn_url}/lfs/{blob.sha256}"
    linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content)), "Location": location}
    return Response(f"Found. Redirecting to {location}".encode(), 302, {**headers, **linked})


def _serve(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if wanted is None or wanted.group(0) == "bytes=-":
        return Response(content, 200, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if start > end:
        return Response(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
    part = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return Response(content[start : end + 1], 206, {**headers, **part})
