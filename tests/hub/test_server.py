"""The loopback server, seen by the real Hub client: it behaves as the Hub does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.hub.server import OTHER_TOKEN, READ_TOKEN, TOKEN, HubServer


README = "---\nlicense: mit\n---\n# hello\n"
WEIGHTS = os.urandom(5000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "transformer").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "transformer" / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_upload_and_download_round_trip(hub: HubServer, folder: Path, repo_type: str) -> None:
    api = HfApi()
    api.create_repo("tester/thing", repo_type=repo_type)
    first = api.upload_folder(repo_id="tester/thing", folder_path=folder, repo_type=repo_type)
    again = api.upload_folder(repo_id="tester/thing", folder_path=folder, repo_type=repo_type)
    assert first.oid == again.oid, "an unchanged folder makes no commit"
    assert len(hub.requests("POST", "/commit/main")) == 1

    local = Path(snapshot_download("tester/thing", repo_type=repo_type))
    assert (local / "transformer" / "model.safetensors").read_bytes() == WEIGHTS
    assert (local / "README.md").read_text() == README
    assert local.name == first.oid
    hub.log.clear()
    snapshot_download("tester/thing", repo_type=repo_type)
    assert len(hub.log) == 1, "a warm cache costs one request"


def test_large_files_live_at_a_second_origin_that_gets_no_token(hub: HubServer, folder: Path) -> None:
    HfApi().create_repo("tester/thing")
    HfApi().upload_folder(repo_id="tester/thing", folder_path=folder)
    snapshot_download("tester/thing")
    cdn = hub.requests(origin="cdn")
    assert [entry.method for entry in cdn] == ["PUT", "GET"]
    assert all(entry.token is None for entry in cdn)
    assert all(entry.token == TOKEN for entry in hub.requests(origin="hub"))


def test_etags_and_ranges(hub: HubServer) -> None:
    repository = hub.add_repository("tester/thing", {"a.txt": "hello", "b.bin": WEIGHTS})
    session, page = get_session(), f"{hub.url}/tester/thing/resolve/main"
    text = session.head(f"{page}/a.txt")
    # `printf hello | git hash-object --stdin`
    assert text.headers["ETag"] == '"b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"'
    assert text.headers["X-Repo-Commit"] == repository.refs["refs/heads/main"]
    assert (text.headers["Content-Length"], text.content) == ("5", b"")
    large = session.head(f"{page}/b.bin", follow_redirects=False)
    assert large.status_code == 302 and large.headers["Location"].startswith(hub.cdn_url)
    assert large.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert large.headers["X-Linked-Size"] == "5000"
    for wanted, expected in (
        ("bytes=10-19", WEIGHTS[10:20]),
        ("bytes=4990-", WEIGHTS[4990:]),
        ("bytes=-3", WEIGHTS[-3:]),
    ):
        part = session.get(large.headers["Location"], headers={"Range": wanted})
        assert (part.status_code, part.content) == (206, expected)
    assert session.get(large.headers["Location"], headers={"Range": "bytes=5000-"}).status_code == 416


def test_what_is_missing_raises_the_client_s_own_errors(hub: HubServer) -> None:
    hub.add_repository("tester/thing", {"a.txt": "hello"})
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("tester/nothing")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("tester/thing", "a.txt", revision="v9")
    for _ in range(2):
        with pytest.raises(EntryNotFoundError):
            hf_hub_download("tester/thing", "b.txt")
    hf_hub_download("tester/thing", "a.txt")
    # The 404 carried X-Repo-Commit, so that the client remembers the absence.
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("tester/thing", "b.txt", local_files_only=True)
    absent = Path(os.environ["HF_HOME"], "hub", "models--tester--thing", ".no_exist")
    assert [path.name for path in absent.rglob("b.txt")] == ["b.txt"]


def test_branches_tags_and_pull_requests(hub: HubServer) -> None:
    api = HfApi()
    hub.add_repository("tester/thing", {"a.txt": "one"})
    api.create_tag("tester/thing", tag="v1")
    api.create_branch("tester/thing", branch="feature/x")
    api.create_commit("tester/thing", [CommitOperationAdd("a.txt", b"two")], commit_message="two")
    request = api.create_commit(
        "tester/thing", [CommitOperationAdd("a.txt", b"three")], commit_message="three", create_pr=True
    )
    assert request.pr_url is not None and request.pr_num == 1 and request.pr_revision == "refs/pr/1"
    for revision, content in (("v1", "one"), ("feature/x", "one"), ("main", "two"), ("refs/pr/1", "three")):
        assert Path(hf_hub_download("tester/thing", "a.txt", revision=revision)).read_text() == content
    assert [commit.title for commit in api.list_repo_commits("tester/thing")] == ["two", "add files", "initial commit"]
    refs = api.list_repo_refs("tester/thing", include_pull_requests=True)
    assert [branch.name for branch in refs.branches] == ["main", "feature/x"]
    assert [tag.ref for tag in refs.tags] == ["refs/tags/v1"]
    api.delete_tag("tester/thing", tag="v1")
    api.delete_branch("tester/thing", branch="feature/x")
    with pytest.raises(HfHubHTTPError):
        api.create_branch("tester/thing", branch="main")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("tester/thing", "a.txt", revision="v1")


def test_merging_a_pull_request(hub: HubServer) -> None:
    hub.add_repository("tester/thing", {"a.txt": "one"})
    request = HfApi().create_commit(
        "tester/thing", [CommitOperationAdd("a.txt", b"two")], commit_message="two", create_pr=True
    )
    assert Path(hf_hub_download("tester/thing", "a.txt")).read_text() == "one"
    HfApi().merge_pull_request("tester/thing", request.pr_num)
    assert Path(hf_hub_download("tester/thing", "a.txt")).read_text() == "two"


def test_listings(hub: HubServer) -> None:
    files = {"README.md": README, "data/x/a.txt": "a", "data/b.bin": WEIGHTS}
    hub.add_repository("tester/thing", files, kind="datasets")
    api = HfApi()
    top = api.list_repo_tree("tester/thing", repo_type="dataset")
    assert [entry.path for entry in top] == [".gitattributes", "README.md", "data"]
    below = api.list_repo_tree("tester/thing", "data", recursive=True, repo_type="dataset")
    assert [entry.path for entry in below] == ["data/b.bin", "data/x/a.txt", "data/x"]
    found = api.get_paths_info("tester/thing", ["data", "data/b.bin", "nothing"], repo_type="dataset")
    assert [entry.path for entry in found] == ["data", "data/b.bin"]
    assert found[1].lfs is not None and found[1].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    info = api.dataset_info("tester/thing", files_metadata=True)
    assert info.card_data is not None and info.card_data.license == "mit"
    assert {sibling.rfilename: sibling.size for sibling in info.siblings or []}["data/b.bin"] == 5000
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/thing", "nothing", repo_type="dataset"))


def test_permissions(hub: HubServer) -> None:
    hub.add_repository("tester/secret", {"a.txt": "hello"}, private=True)
    hub.add_repository("tester/open", {"a.txt": "hello"})
    assert hf_hub_download("tester/secret", "a.txt")
    for token in (False, OTHER_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("tester/secret")
    assert HfApi(token=False).model_info("tester/open").private is False
    for token, status in ((READ_TOKEN, 403), (OTHER_TOKEN, 403), ("hf_wrong", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(token=token).auth_check("tester/open", write=True)
        assert caught.value.response.status_code == status
        with pytest.raises(HfHubHTTPError):
            HfApi(token=token).create_commit("tester/open", [CommitOperationAdd("b", b"")], commit_message="x")
    # Whoever may read may propose.
    proposal = HfApi(token=OTHER_TOKEN).create_commit(
        "tester/open", [CommitOperationAdd("b.txt", b"b")], commit_message="x", create_pr=True
    )
    assert proposal.pr_num == 1
    assert HfApi().whoami()["name"] == "tester"


def test_commits_are_checked(hub: HubServer) -> None:
    api = HfApi()
    repository = hub.add_repository("tester/thing", {"a.txt": "one", "old/b.txt": "b", "old/c.txt": "c"})
    parent = repository.resolve("main").oid
    operations = [CommitOperationAdd("a.txt", b"two"), CommitOperationDelete("old/")]
    new = api.create_commit("tester/thing", operations, commit_message="two", parent_commit=parent)
    assert sorted(repository.resolve(new.oid).files) == [".gitattributes", "a.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            "tester/thing", [CommitOperationAdd("a.txt", b"x")], commit_message="x", parent_commit=parent
        )
    with pytest.raises(EntryNotFoundError):
        api.create_commit("tester/thing", [CommitOperationDelete("gone.txt")], commit_message="x")
    with pytest.raises(ValueError, match="license"):
        card = b"---\nlicense: free-as-in-beer\n---\n"
        api.create_commit("tester/thing", [CommitOperationAdd("README.md", card)], commit_message="x")
    assert len(repository.commits) == 3


@pytest.mark.parametrize(
    ("front_matter", "problem"),
    [
        ("license: [mit", "parse"),
        ("- a list", "mapping"),
        ("tags: sit", "tags"),
        ("pipeline_tag: class-to-image", "pipeline_tag"),
        ("datasets: [/home/me/data]", "datasets"),
        ("base_model: ./run", "base_model"),
        ("base_model: a/b\nbase_model_relation: teacher", "base_model_relation"),
        ("language: English", "language"),
        ("model-index: 3", "model-index"),
    ],
)
def test_front_matter_is_checked(hub: HubServer, front_matter: str, problem: str) -> None:
    hub.add_repository("tester/thing")
    card = f"---\n{front_matter}\n---\ntext\n".encode()
    with pytest.raises(ValueError, match=problem):
        HfApi().create_commit("tester/thing", [CommitOperationAdd("README.md", card)], commit_message="x")


def test_faults(hub: HubServer, folder: Path) -> None:
    api = HfApi()
    hub.add_repository("tester/thing", {"a.txt": "hello"})
    hub.fail("PUT", "/upload/", status=503)
    api.upload_folder(repo_id="tester/thing", folder_path=folder)
    assert [entry.status for entry in hub.requests("PUT")] == [503, 200], "the client repeats the upload of a file"

    hub.fail("POST", "/commit/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.create_commit("tester/thing", [CommitOperationAdd("b.txt", b"b")], commit_message="x")
    assert len(hub.requests("POST", "/commit/")) == 2, "but not a commit"

    hub.fail("GET", "/api/models/tester/thing$", status=None)
    with pytest.raises(Exception, match="(?i)disconnected|closed|reset"):
        api.model_info("tester/thing")
    assert hub.requests("GET", "/api/models/tester/thing$")[0].status == 0
    assert api.model_info("tester/thing").sha
