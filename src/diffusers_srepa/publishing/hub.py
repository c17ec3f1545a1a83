"""Publishing a finished pipeline on the Hub: claim the repository before training, push one commit after it.

Every failure is a `HubError` of one sentence. Nothing local is ever changed or deleted, and the token is neither
logged nor written anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx, validate_repo_id

from diffusers_srepa.errors import ConfigurationError, causes, one_line
from diffusers_srepa.models.loading import PROJECTORS
from diffusers_srepa.publishing.model_card import CARD_FILE, SAMPLE_GRID_FILE
from diffusers_srepa.publishing.redaction import RUN_CONFIG_FILE, public_versions


logger = logging.getLogger(__name__)

INDEX_FILE = "model_index.json"

# What training and conversion write beside the folders of a pipeline, and the card shows.
_FILES = (INDEX_FILE, CARD_FILE, SAMPLE_GRID_FILE, RUN_CONFIG_FILE)
# What components, projectors and tokenizers are saved as.
_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_SCANNED_FOR_TOKEN = 1 << 20
# Seconds: without a sign of life from the Hub; for the short calls in all; for a push in all, beside its bytes.
_SILENCE = 30.0
_SHORT_CALLS = 120.0
_PUSH = 600.0
_BYTES_PER_SECOND = 50_000
_HubFailure = (HfHubHTTPError, httpx.TransportError, ConnectionError, TimeoutError, RuntimeError)
_Result = TypeVar("_Result")


class HubError(ConfigurationError):
    """The Hub cannot be reached or refuses, or there is nothing that could be pushed."""


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, license: str | None = None
) -> str:
    """Make sure, before training starts, that `repo_id` exists on the Hub and may be written to.

    Args:
        repo_id (`str`): `namespace/name`, or a name in the token owner's own namespace.
        private (`bool`, *optional*): visibility of a repository that does not exist yet; None is the namespace's rule.
        token (`str`, *optional*): by default `HF_TOKEN` or the one that `hf auth login` stored.
        license (`str`, *optional*): licence identifier that the card will carry, checked by the Hub.

    Returns:
        `str`: the full id, `namespace/name`.

    Raises:
        HubError: no token or a wrong one, an id that is not valid, a namespace that the token may not write to, a
            licence that the Hub does not know, or a Hub that cannot be reached.
    """
    token = _find_token(token)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HubError(
            f"{repo_id!r} is not a valid repository id: set `repo_id` to namespace/name, made of letters, digits, "
            "'-', '_' and '.', at most 96 characters."
        ) from None
    api = HfApi(token=token)

    def create() -> str:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # An existing repository also "succeeds" without write permission; better to learn it now than after training.
        api.auth_check(full_id, write=True)
        return full_id

    full_id = _retried(create, f"creating {repo_id}")
    if license is not None:
        _check_license(license)
    return full_id


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    commit_message: str = "Upload SiTPipeline",
    parts: Sequence[str] = (PROJECTORS,),
    token: str | None = None,
    attempts: int = 5,
    first_wait: float = 1.0,
) -> str:
    """Push a finished pipeline folder as one commit: its components, `parts`, card, picture and configuration.

    Nothing else in the folder is pushed, and no file in the repository is deleted.
    Local paths stay at home: `config.yaml` and the components' `config.json` go as `public_versions` gives them.
    An attempt that fails for a passing reason (a connection that breaks, status 408, 429 or 5xx) is repeated after
    `first_wait`, then 2, 4, ... times as long. What the Hub already has is not sent again, and a commit whose answer
    was lost is recognised, not repeated.

    Args:
        folder (`str` or `os.PathLike`): the folder; its files become the repository's, with the same relative paths.
        repo_id (`str`): `namespace/name` of an existing repository, as `create_repository` returned it.
        revision (`str`, *optional*): branch to commit to, made from main if it does not exist; by default main.
        commit_message (`str`): title of the commit.
        parts (`Sequence[str]`): folders of what was trained beside the components, relative; missing ones are ignored.
        token (`str`, *optional*): by default `HF_TOKEN` or the one that `hf auth login` stored.
        attempts (`int`): how often to try in all.
        first_wait (`float`): seconds before the second attempt.

    Returns:
        `str`: the URL of the commit.

    Raises:
        HubError: no whole pipeline, a link in place of a file, a file that holds the token, a Hub that refuses or
            stays unreachable; the local files are untouched.
    """
    folder = Path(folder)
    token = _find_token(token)
    paths = _paths_to_push(folder, parts)
    _refuse_token_in_files(folder, paths, token)
    versions = public_versions(folder, paths)
    api = HfApi(token=token)

    def commit() -> str:
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # New operations in every attempt: the Hub is asked again what it has, so a lost answer makes no second commit.
        operations = [CommitOperationAdd(path, versions.get(path, folder / path)) for path in paths]
        # upload_folder splits large folders into several commits, this call never does.
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision).commit_url

    logger.info("pushing %d files of %s to %s", len(paths), folder, repo_id)
    limit = _PUSH + sum((folder / path).stat().st_size for path in paths) / _BYTES_PER_SECOND
    try:
        return _retried(commit, f"pushing to {repo_id}", attempts=attempts, first_wait=first_wait, limit=limit)
    except HubError as error:
        raise HubError(f"{one_line(error, 1000)}; all files are kept in {folder}, push them again later.") from None


def _find_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise HubError(
            "no Hugging Face token was found: run `hf auth login`, set HF_TOKEN, or do not push to the Hub."
        )
    if not (token.isascii() and token.isprintable() and " " not in token):
        # An HTTP library would refuse it as a header value, and quote it in full.
        raise HubError("the Hugging Face token holds a blank or a special character: set HF_TOKEN to the bare token.")
    return token


def _check_license(license: str) -> None:
    card = ModelCard(f"---\nlicense: {license}\n---\n")

    def is_known() -> bool:
        try:
            card.validate()
        except HfHubHTTPError:
            raise
        except ValueError:
            return False
        return True

    if not _retried(is_known, "checking the licence"):
        raise HubError(
            f"the Hub knows no licence {license!r}: use an identifier of "
            "https://huggingface.co/docs/hub/repositories-licenses, or 'other' with a licence name."
        )


def _paths_to_push(folder: Path, parts: Sequence[str]) -> list[str]:
    """The files of the pipeline and of `parts`, relative to the folder."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        # A component is [library, class]; one that is left out is [null, null].
        components = [
            name
            for name, entry in index.items()
            if not name.startswith("_") and isinstance(entry, list) and [type(word) for word in entry] == [str, str]
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise HubError(f"the folder {folder} holds no finished pipeline to push ({one_line(error)}).") from None
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise HubError(f"the folder {folder} lacks {missing[0]}, which its {INDEX_FILE} names: push a whole pipeline.")
    paths: set[str] = set()
    for name in (*_FILES, *components, *parts):
        relative = Path(name)
        if not relative.parts or relative.is_absolute() or ".." in relative.parts:
            raise HubError(f"{name} is not a part of the folder {folder}: give names of folders in it.")
        inside = [folder / name, *(folder / parent for parent in relative.parents[:-1])]
        for file in (*inside, *sorted((folder / name).rglob("*"))):
            found = file.relative_to(folder)
            if file.is_symlink():
                raise HubError(f"{file} is a link, which is not followed: put the file itself there, then push again.")
            if not file.is_file() or any(part.startswith(".") for part in found.parts):
                continue
            if name in _FILES or file.suffix in _SUFFIXES:
                paths.add(found.as_posix())
            else:
                logger.warning("%s is not pushed: it is no file of a pipeline", file)
    return sorted(paths)


def _refuse_token_in_files(folder: Path, paths: Sequence[str], token: str) -> None:
    for path in paths:
        file = folder / path
        if file.stat().st_size <= _SCANNED_FOR_TOKEN and token.encode() in file.read_bytes():
            raise HubError(f"{file} holds your Hugging Face token: remove it there, then push again.")


def _retried(
    call: Callable[[], _Result], doing: str, *, attempts: int = 3, first_wait: float = 1.0, limit: float | None = None
) -> _Result:
    """As `_repeated`, for at most `limit` seconds."""
    limit = _SHORT_CALLS if limit is None else limit
    outcome: list[_Result | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_repeated(call, doing, attempts=attempts, first_wait=first_wait))
        except BaseException as error:
            outcome.append(error)

    # Not an executor, whose threads the end of the process would wait for.
    thread = threading.Thread(target=work, name="hub", daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise HubError(f"{doing} failed: the Hub at {HfApi().endpoint} has not answered in {limit:.0f} seconds.")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextmanager
def _bounded_silence() -> Iterator[None]:
    """Around requests: by default, the client waits for ever for a Hub that is silent."""
    session = get_session()
    before, session.timeout = session.timeout, httpx.Timeout(_SILENCE)
    try:
        yield
    finally:
        session.timeout = before


def _repeated(call: Callable[[], _Result], doing: str, *, attempts: int, first_wait: float) -> _Result:
    """The result of `call`, repeated after passing failures; a `HubError` after others or after the last attempt."""
    for attempt in range(1, attempts + 1):
        try:
            with _bounded_silence():
                return call()
        except _HubFailure as error:
            reason = _explain(error)
            if attempt == attempts or not _is_transient(error):
                tried = f" in {attempt} attempts" if attempt > 1 else ""
                # The original error is not chained: its text may quote whole requests and answers.
                raise HubError(f"{doing} failed{tried}: {reason}.") from None
            wait = first_wait * 2 ** (attempt - 1)
            logger.info("%s failed (%s): attempt %d of %d in %g s", doing, reason, attempt + 1, attempts, wait)
            time.sleep(wait)
        except ValueError as error:
            raise HubError(f"{doing} failed: {one_line(error)}.") from None
    raise HubError(f"{doing} was not tried: attempts is {attempts}, but must be at least 1.")


def _status(error: BaseException) -> int | None:
    # The client wraps a failed upload of a large file in a RuntimeError.
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return int(cause.response.status_code)
    return None


def _is_transient(error: BaseException) -> bool:
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
        return False
    status = _status(error)
    return status is None or status in _TRANSIENT_STATUS


def _explain(error: BaseException) -> str:
    """Why the Hub did not do it, and what to change."""
    endpoint = HfApi().endpoint
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
        return "HF_HUB_OFFLINE is set: unset it, or do not push at all"
    status = _status(error)
    if status is None:
        reason = one_line(list(causes(error))[-1])
        return f"the Hub at {endpoint} cannot be reached ({reason}): check the network and HF_ENDPOINT"
    if status == 401:
        return f"the Hub does not accept the token (401 from {endpoint}): run `hf auth login` or set HF_TOKEN anew"
    if status == 403:
        return "the token may not write there (403): use a token with write permission, or change `repo_id`"
    if status == 404:
        return "there is no such repository or branch (404): check `repo_id`"
    messages = [getattr(cause, "server_message", None) for cause in causes(error)]
    said = next((f": {one_line(message)}" for message in messages if message), "")
    return f"{endpoint} answered with status {status}{said}"
