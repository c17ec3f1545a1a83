"""Why something could not be loaded from a folder or the Hub, for teachers, transformers and autoencoders alike."""

from __future__ import annotations

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from diffusers_srepa.errors import causes, one_line


# What loading from a folder or the Hub raises; a connection that breaks is no OSError.
FETCH_ERRORS = (OSError, ValueError, httpx.TransportError)


def is_caused_by(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Whether an exception, or one that it was raised from or during, is of one of the kinds."""
    return any(isinstance(cause, kinds) for cause in causes(error))


def is_missing_file(error: BaseException) -> bool:
    """Whether the Hub has answered that the repository is there and does not have the file."""
    return is_caused_by(error, RemoteEntryNotFoundError)


def explain_failure(error: BaseException, argument: str = "name_or_path", revision: str | None = None) -> str:
    """What the clients of the Hub raise, as the rest of a sentence about what was to be loaded, without a full stop.

    Args:
        error (`BaseException`): what `huggingface_hub`, `transformers` or `diffusers` has raised.
        argument (`str`): name of the argument that says what to load.
        revision (`str`, *optional*): the revision that was asked for.
    """
    if is_caused_by(error, GatedRepoError):
        return "is gated: accept its conditions on its Hub page and pass a token that may read it (HF_TOKEN)"
    if is_caused_by(error, RepositoryNotFoundError, HFValidationError):
        return (
            f"is neither a local folder or file nor a Hub repository that you can see: check `{argument}` or your "
            "token (HF_TOKEN)"
        )
    if is_caused_by(error, RevisionNotFoundError):
        return f"has no revision {revision!r}: choose a branch, tag or commit of it as `revision`"
    if is_missing_file(error):
        return f"lacks a file ({one_line(error)}): change `{argument}`"
    response = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if response is not None:
        return f"cannot be fetched from the Hub now ({one_line(response)}): try again later"
    if is_caused_by(error, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError):
        return (
            "is neither a local folder nor in the cache, and the Hub was not asked (HF_HUB_OFFLINE, local_files_only) "
            f"or cannot be reached: check `{argument}` and the network"
        )
    return f"cannot be loaded ({one_line(error)}): change `{argument}`"
