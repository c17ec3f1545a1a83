"""Repositories of the test Hub: blobs, commits, branches, tags and pull requests, all in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field


MAIN = "refs/heads/main"
DEFAULT_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def git_blob_sha1(content: bytes) -> str:
    """The name that git gives to a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `lfs` files are listed by their pointer and served from the second origin."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return lines.encode()

    @property
    def git_oid(self) -> str:
        return git_blob_sha1(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        """SHA-256 of an LFS file, git's blob SHA-1 of a regular one."""
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, object]:
        """The file's row in a tree or paths-info answer."""
        row: dict[str, object] = {"type": "file", "oid": self.git_oid, "size": len(self.content), "path": path}
        if self.lfs:
            row["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return row


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


class RevisionMissing(Exception):
    """No branch, tag, pull request or commit has this name."""


@dataclass
class Repository:
    """One model or dataset repository.

    Args:
        kind: "models" or "datasets".
        repo_id: namespace/name.
        private: only the namespace's members see it.
    """

    kind: str
    repo_id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit(MAIN, {".gitattributes": Blob(DEFAULT_GITATTRIBUTES)}, "initial commit")

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def url_path(self) -> str:
        """Where browsers find it: models have no prefix."""
        return self.repo_id if self.kind == "models" else f"{self.kind}/{self.repo_id}"

    def ref(self, name: str) -> str | None:
        """The full name of a branch, tag or pull request, given by its short or full name."""
        for candidate in (name, f"refs/heads/{name}", f"refs/tags/{name}"):
            if candidate in self.refs:
                return candidate
        return None

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or (abbreviated) commit id names."""
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if len(revision) >= 7:
            matches = [oid for oid in self.commits if oid.startswith(revision)]
            if len(matches) == 1:
                return self.commits[matches[0]]
        raise RevisionMissing(revision)

    def commit(
        self, ref: str, files: Mapping[str, Blob], title: str, description: str = "", author: str = "hub"
    ) -> Commit:
        """Make `files` the content of a ref, which may be new."""
        parent = self.refs.get(ref)
        number = len(self.commits)
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([self.kind, self.repo_id, parent, title, number, tree]).encode()).hexdigest()
        date = f"2025-01-01T{number // 60 % 24:02d}:{number % 60:02d}:00.000Z"
        self.commits[oid] = Commit(oid, parent, title, description, author, date, dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits: list[Commit] = []
        oid: str | None = self.resolve(revision).oid
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits

    def open_pull_request(self, base: Commit) -> str:
        """A new ref refs/pr/N that starts at `base`."""
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
        ref = f"refs/pr/{number}"
        self.refs[ref] = base.oid
        return ref

    def add_files(self, files: Mapping[str, bytes | str], revision: str = "main", lfs: tuple[str, ...] = ()) -> Commit:
        """Commit files without HTTP, for tests that only read."""
        blobs = dict(self.resolve(revision).files)
        for path, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            blobs[path] = Blob(content, lfs=path.endswith(lfs or (".safetensors", ".parquet", ".bin")))
        ref = self.ref(revision)
        assert ref is not None, f"{revision} is a commit, which cannot grow"
        return self.commit(ref, blobs, "add files")


def directory_rows(files: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, object]]:
    """The rows of a tree answer: files below `folder` ("" is the root) and the folders that hold them."""
    prefix = f"{folder}/" if folder else ""
    rows: list[dict[str, object]] = []
    folders: set[str] = set()
    for path in sorted(files):
        if not path.startswith(prefix):
            continue
        parents = path.removeprefix(prefix).split("/")[:-1]
        folders |= {prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents) if recursive else 1)}
        if recursive or not parents:
            rows.append(files[path].entry(path))
    folders.discard(prefix)
    for name in sorted(folders):
        oid = hashlib.sha1(name.encode()).hexdigest()
        rows.append({"type": "directory", "oid": oid, "size": 0, "path": name})
    return rows
