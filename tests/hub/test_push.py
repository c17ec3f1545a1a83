"""What the trainer calls: claim a repository before training, push one commit after it, survive the Hub's bad days."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from diffusers_srepa.publishing import hub as publishing
from diffusers_srepa.publishing.hub import HubError, create_repository, push_folder
from tests.hub.server import OTHER_TOKEN, READ_TOKEN, TOKEN, HubServer


CARD = "---\nlicense: mit\ntags:\n- sit\n---\n\n# our card\n"
WEIGHTS = os.urandom(4096)
PIPELINE_FILES: dict[str, bytes] = {
    "README.md": CARD.encode(),
    "config.yaml": b"seed: 0\n",
    "model_index.json": b'{"_class_name": "SiTPipeline", "transformer": ["a", "B"], "vae": [null, null], "k": 1}',
    "projectors/default/config.json": b"{}",
    "projectors/default/diffusion_pytorch_model.safetensors": WEIGHTS,
    "sample_grid.png": b"\x89PNG\0",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS[::-1],
}
OTHER_FILES = (
    ".hidden",
    "checkpoint-100/transformer/diffusion_pytorch_model.safetensors",
    "checkpoint-100/trainer_state.json",
    "logs/tb/events.out.tfevents.1",
    "wandb/run-1/output.log",
    "validation/step-10/grid.png",
    "metrics.jsonl",
    "train.log",
    "transformer/.cache/x",
    ".checkpoint-200.tmp/model.safetensors",
    "abandoned-checkpoint-300/config.yaml",
    "abandoned-checkpoint-300/optimizer.safetensors",
    "id_rsa",
    "notes.json",
    "samples/0000.png",
    "transformer/id_rsa",
    "vae/model.safetensors",
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, content in {**PIPELINE_FILES, **dict.fromkeys(OTHER_FILES, b"x")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeping takes no time; the list says how long it would have been."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and TOKEN not in text


def test_claiming_a_repository(hub: HubServer) -> None:
    assert create_repository("run") == "tester/run", "a bare name goes to the token's owner"
    assert create_repository("tester/run") == "tester/run", "it may exist already"
    assert create_repository("test-org/run", private=True, license="cc-by-nc-4.0") == "test-org/run"
    assert not hub.model("tester/run").private and hub.model("test-org/run").private


def test_push_is_one_commit_of_the_finished_pipeline(hub: HubServer, run_folder: Path) -> None:
    before = contents(run_folder)
    repo_id = create_repository("tester/run")
    url = push_folder(run_folder, repo_id, commit_message="End of training")
    head = hub.model(repo_id).resolve("main")
    assert url == f"{hub.url}/tester/run/commit/{head.oid}"
    assert [commit.title for commit in hub.model(repo_id).history("main")] == ["End of training", "initial commit"]
    assert len(hub.requests("POST", "/commit/")) == 1
    pushed = {path: blob.content for path, blob in head.files.items() if path != ".gitattributes"}
    assert pushed == PIPELINE_FILES
    assert contents(run_folder) == before
    assert {entry.token for entry in hub.requests(origin="cdn")} == {None}


def test_pushing_again_sends_what_changed_only(hub: HubServer, run_folder: Path) -> None:
    repo_id = create_repository("tester/run")
    first = push_folder(run_folder, repo_id)
    assert push_folder(run_folder, repo_id) == first, "nothing changed, no commit"
    (run_folder / "README.md").write_text(CARD + "more\n")
    hub.log.clear()
    assert push_folder(run_folder, repo_id) != first
    assert hub.requests("PUT") == []
    assert len(hub.requests("POST", "/commit/")[0].body.splitlines()) == 2, "header and README"
    # A commit never takes away what others have added.
    hub.model(repo_id).add_files({"notes.md": "mine"})
    (run_folder / "config.yaml").write_text("seed: 1\n")
    push_folder(run_folder, repo_id)
    assert "notes.md" in hub.model(repo_id).resolve("main").files


def test_push_to_a_branch_and_other_parts(hub: HubServer, run_folder: Path) -> None:
    repo_id = create_repository("tester/run")
    push_folder(run_folder, repo_id, revision="step-400000", parts=["projectors/none", "vae"])
    repository = hub.model(repo_id)
    assert sorted(repository.resolve("main").files) == [".gitattributes"]
    files = repository.resolve("step-400000").files
    assert "vae/model.safetensors" in files and not any(path.startswith("projectors/") for path in files)
    push_folder(run_folder, repo_id, revision="step-400000")
    assert "projectors/default/config.json" in repository.resolve("step-400000").files
    for outside in ("../run", str(run_folder), "."):
        with pytest.raises(HubError, match="not a part of the folder") as caught:
            push_folder(run_folder, repo_id, parts=[outside])
        assert is_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["README.md", "transformer", "transformer/config.json", "projectors", "projectors/x"])
def test_no_link_is_followed(hub: HubServer, run_folder: Path, tmp_path: Path, name: str) -> None:
    create_repository("tester/run")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    place = run_folder / name
    if place.exists():
        place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "secret")
    with pytest.raises(HubError, match=f"{place} is a link") as caught:
        push_folder(run_folder, "tester/run", parts=["projectors/default", "projectors"])
    assert is_one_sentence(caught.value)
    assert sorted(hub.model("tester/run").resolve("main").files) == [".gitattributes"]


def test_links_beside_the_pipeline_do_not_matter(hub: HubServer, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run_folder)
    (run_folder / "latest").symlink_to(run_folder / "checkpoint-100")
    repo_id = create_repository("tester/run")
    push_folder(tmp_path / "link", repo_id)
    assert set(hub.model(repo_id).resolve("main").files) == {".gitattributes", *PIPELINE_FILES}


def test_half_a_pipeline_is_not_pushed(hub: HubServer, run_folder: Path) -> None:
    (run_folder / "model_index.json").write_text('{"transformer": ["a", "B"], "scheduler": ["a", "C"]}')
    with pytest.raises(HubError, match="lacks scheduler") as caught:
        push_folder(run_folder, "tester/run")
    assert is_one_sentence(caught.value) and hub.log == []


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that accepts connections and never answers; patience is a fraction of a second."""
    monkeypatch.setattr(publishing, "_SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield address


def test_a_hub_that_never_answers_is_given_up(
    hub: HubServer, run_folder: Path, waits: list[float], silent: str, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with pytest.raises(HubError, match=f"3 attempts: the Hub at {silent} cannot be reached") as caught:
        create_repository("tester/run")
    assert is_one_sentence(caught.value)
    with pytest.raises(HubError, match="2 attempts.*push them again later") as caught:
        push_folder(run_folder, "tester/run", attempts=2)
    assert is_one_sentence(caught.value)
    assert time.monotonic() - started < 10 and caplog.text.count("not pushed") == 1, caplog.text


def test_no_call_takes_longer_than_its_limit(
    hub: HubServer, run_folder: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the Hub keeps the connection alive, or the client itself waits and repeats."""
    monkeypatch.setattr(publishing, "_SILENCE", 3.0)
    for limit in ("_SHORT_CALLS", "_PUSH"):
        monkeypatch.setattr(publishing, limit, 0.3)
    started = time.monotonic()
    with pytest.raises(HubError, match=f"the Hub at {silent} has not answered in") as caught:
        create_repository("tester/run")
    assert is_one_sentence(caught.value)
    with pytest.raises(HubError, match="has not answered in .*push them again later") as caught:
        push_folder(run_folder, "tester/run")
    assert is_one_sentence(caught.value) and time.monotonic() - started < 2.5
    for thread in threading.enumerate():
        if thread.name == "hub":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            thread.join(20)


@pytest.mark.parametrize("status", [503, 429, 500, None])
def test_a_failed_commit_is_repeated(
    hub: HubServer, run_folder: Path, waits: list[float], status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    repo_id = create_repository("tester/run")
    hub.fail("POST", "/commit/", status=status, times=2)
    with caplog.at_level(logging.DEBUG):
        push_folder(run_folder, repo_id, first_wait=1.0)
    assert waits == [1.0, 2.0]
    assert len(hub.requests("POST", "/commit/")) == 3
    assert len(hub.model(repo_id).history("main")) == 2
    assert len(hub.requests("PUT")) == 3, "the files were sent once"
    assert "attempt 2 of 5" in caplog.text and TOKEN not in caplog.text


def test_a_commit_whose_answer_was_lost_is_not_repeated(hub: HubServer, run_folder: Path, waits: list[float]) -> None:
    repo_id = create_repository("tester/run")
    hub.fail("POST", "/commit/", status=None, after=True)
    url = push_folder(run_folder, repo_id)
    assert url.endswith(hub.model(repo_id).resolve("main").oid)
    assert len(hub.model(repo_id).history("main")) == 2 and len(waits) == 1


def test_a_file_upload_is_repeated_by_the_client(hub: HubServer, run_folder: Path, waits: list[float]) -> None:
    repo_id = create_repository("tester/run")
    hub.fail("PUT", "/upload/", status=503, times=1)
    push_folder(run_folder, repo_id)
    assert sorted(entry.status for entry in hub.requests("PUT")) == [200, 200, 200, 503]
    assert len(hub.requests("POST", "/commit/")) == 1


def test_giving_up_keeps_every_local_file(hub: HubServer, run_folder: Path, waits: list[float]) -> None:
    before = contents(run_folder)
    repo_id = create_repository("tester/run")
    hub.fail("POST", "/commit/", status=503, times=100)
    with pytest.raises(HubError) as caught:
        push_folder(run_folder, repo_id, attempts=3)
    assert is_one_sentence(caught.value)
    assert "503" in str(caught.value) and "3 attempts" in str(caught.value) and str(run_folder) in str(caught.value)
    assert waits == [1.0, 2.0] and contents(run_folder) == before
    # A file that cannot be uploaded, however often the client tries.
    hub.reset()
    create_repository("tester/run")
    hub.fail("PUT", "/upload/", status=500, times=1000)
    with pytest.raises(HubError, match="status 500") as caught:
        push_folder(run_folder, repo_id, attempts=2)
    assert is_one_sentence(caught.value) and contents(run_folder) == before


def test_errors_that_no_repetition_mends_come_at_once(hub: HubServer, run_folder: Path, waits: list[float]) -> None:
    hub.add_repository("somebody/run")
    with pytest.raises(HubError, match="`repo_id`") as caught:
        push_folder(run_folder, "somebody/run")
    assert is_one_sentence(caught.value)
    with pytest.raises(HubError, match="404"):
        push_folder(run_folder, "tester/none")
    create_repository("tester/run")
    (run_folder / "README.md").write_text("---\nlicense: free-as-in-beer\n---\n")
    with pytest.raises(HubError, match=r"README\.md.*license") as caught:
        push_folder(run_folder, "tester/run")
    assert is_one_sentence(caught.value)
    assert waits == []


def test_nothing_to_push(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "empty" / "checkpoint-1" / "x").touch()
    for folder in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(HubError, match=folder.name):
            push_folder(folder, "tester/run")
    assert hub.log == []


def test_a_file_that_holds_the_token_is_not_pushed(hub: HubServer, run_folder: Path) -> None:
    create_repository("tester/run")
    (run_folder / "config.yaml").write_text(f"hub_token: {TOKEN}\n")
    with pytest.raises(HubError, match=r"config\.yaml") as caught:
        push_folder(run_folder, "tester/run")
    assert is_one_sentence(caught.value)
    assert hub.requests("POST", "preupload") == []


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("tester/run", "hf_wrong", "401.*HF_TOKEN"),
        ("tester/run", READ_TOKEN, "403.*`repo_id`"),
        ("tester/taken", OTHER_TOKEN, "403.*`repo_id`"),
        ("somebody/run", None, "403.*`repo_id`"),
        ("a/b/c", None, "not a valid repository id.*`repo_id`"),
        ("tester/r n", None, "not a valid repository id"),
        ("tester/run", f"{TOKEN}\n", "special character"),
    ],
)
def test_refusals_come_before_training(
    hub: HubServer, waits: list[float], repo_id: str, token: str | None, words: str
) -> None:
    hub.add_repository("tester/taken")
    with pytest.raises(HubError, match=words) as caught:
        create_repository(repo_id, token=token)
    assert is_one_sentence(caught.value) and waits == []
    assert caught.value.__cause__ is None, "the token is not in a chained error either"
    assert ("models", "tester/run") not in hub.repositories


def test_unknown_licence(hub: HubServer) -> None:
    with pytest.raises(HubError, match="free-as-in-beer.*'other'") as caught:
        create_repository("tester/run", license="free-as-in-beer")
    assert is_one_sentence(caught.value)


def test_no_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login") as caught:
        create_repository("tester/run")
    assert is_one_sentence(caught.value) and hub.log == []


def test_unreachable_hub(
    hub: HubServer, run_folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT") as caught:
        create_repository("tester/run")
    assert is_one_sentence(caught.value)
    assert waits == [1.0, 2.0]
    with pytest.raises(HubError, match=f"cannot be reached.*{run_folder}") as caught:
        push_folder(run_folder, "tester/run", attempts=2)
    assert is_one_sentence(caught.value)


def test_offline_mode(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.constants.is_offline_mode()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE.*do not push") as caught:
        create_repository("tester/run")
    assert is_one_sentence(caught.value) and hub.log == []


def test_a_passing_fault_at_the_start_is_survived(hub: HubServer, waits: list[float]) -> None:
    hub.fail("POST", "/api/repos/create", status=503, times=2)
    assert create_repository("tester/run") == "tester/run"
    assert waits == [1.0, 2.0]
    assert HfApi().repo_exists("tester/run")
