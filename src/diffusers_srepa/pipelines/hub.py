"""`SiTPipeline` with the Hub: which files are downloaded, the cached folder, pushing, the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import HfApi, create_repo, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from diffusers_srepa.errors import one_line
from diffusers_srepa.pipelines import pipeline_sit
from diffusers_srepa.pipelines.checkpoint import AUTOENCODER_FILE, check_format, load_autoencoder


logger = logging.get_logger(__name__)

WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?P<kind>safetensors|bin)"
)


class HubMixin(DiffusionPipeline):
    """Loading from the Hub or a training checkpoint, and pushing, of a pipeline with components of this package."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        r"""
        Loads a pipeline; see [`DiffusionPipeline.from_pretrained`].

        Args:
            pretrained_model_name_or_path (`str`):
                The folder of a pipeline, the `checkpoint-N` of a training run, or a repository id. The autoencoder
                that a checkpoint names, but does not hold, is loaded too unless `vae` is passed.
            kwargs: as the base class takes them, for example `dtype`, `revision`, `variant`, or a component by name.

        Raises:
            ConfigurationError: the checkpoint is of an older format, or its autoencoder is not found or has changed.
            OSError, ValueError: there is no pipeline, or it cannot be loaded.
        """
        folder = Path(pretrained_model_name_or_path)
        check_format(folder)
        if "vae" not in kwargs and (folder / AUTOENCODER_FILE).is_file():
            kwargs["vae"] = load_autoencoder(folder, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        r"""
        Downloads a pipeline from the Hub and returns its folder in the cache.

        The base class refuses repositories whose components belong to a library that diffusers does not know. This one
        takes the files of the components in `model_index.json`, and of their weights only those of `variant` (for a
        component that has none of it, the default ones). Components that are passed as keyword arguments are left out.
        Without a connection the cached folder is used.

        Args:
            pretrained_model_name (`str`): the repository id.
            cache_dir, force_download, token, local_files_only, revision: as in `huggingface_hub.snapshot_download`.
            variant (`str`, *optional*): which weights, for example `"ema"`.
            use_safetensors (`bool`, *optional*): by default safetensors where there are any.

        Raises:
            ValueError: the repository has no weights of `variant`.
            OSError: the repository holds no pipeline, or cannot be reached and is not cached.
        """
        repo_id = str(pretrained_model_name)
        hub_kwargs: dict[str, Any] = {name: kwargs.get(name) for name in ("cache_dir", "token", "revision")}
        if kwargs.get("local_files_only"):
            return _cached_folder(repo_id, cls.config_name, None, **hub_kwargs)
        try:
            info = HfApi(token=kwargs.get("token")).model_info(repo_id, revision=kwargs.get("revision"))
        except RevisionNotFoundError:
            raise
        except Exception as error:  # what a lost connection raises differs between versions of huggingface_hub
            return _cached_folder(repo_id, cls.config_name, error, **hub_kwargs)

        filenames = [sibling.rfilename for sibling in info.siblings or []]
        if cls.config_name not in filenames:
            raise OSError(f"The repository {repo_id!r} holds no diffusers pipeline: it has no file {cls.config_name}.")
        force_download = bool(kwargs.get("force_download"))
        index_file = hf_hub_download(repo_id, cls.config_name, force_download=force_download, **hub_kwargs)
        index = json.loads(Path(index_file).read_text(encoding="utf-8"))
        files = select_pipeline_files(
            filenames, index, kwargs.keys(), kwargs.get("variant"), kwargs.get("use_safetensors")
        )
        return snapshot_download(
            repo_id,
            allow_patterns=files,
            force_download=force_download,
            user_agent={"pipeline_class": cls.__name__},
            **hub_kwargs,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Saves the pipeline; see [`DiffusionPipeline.save_pretrained`]. With `push_to_hub` a `README.md` in
        `save_directory` is uploaded as it is, and without one a card that the repository has is left alone.
        """
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        push_kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            repo_id = push_kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
            self._push_folder(save_directory, repo_id, **push_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        r"""
        Uploads the pipeline; see [`PushToHubMixin.push_to_hub`]. A card that the repository has is left alone; else
        the `README.md` of the local folder from which the pipeline was loaded becomes its card.
        """
        source = self.config.get("_name_or_path")
        card = Path(source) / "README.md" if source else None
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._push_folder(
                folder, repo_id, card, private, token, subfolder, commit_message=commit_message, create_pr=create_pr
            )

    def _push_folder(
        self,
        folder: str | os.PathLike,
        repo_id: str,
        first_card: Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        **commit_kwargs: Any,
    ) -> str:
        """Uploads a saved pipeline, with `first_card` if neither folder nor repository has a card."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = Path(folder) / "README.md"
        if not subfolder and not card.is_file() and not HfApi(token=token).file_exists(repo_id, card.name):
            if first_card is not None and first_card.is_file():
                shutil.copyfile(first_card, card)
            else:
                populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True)).save(card)
        return self._upload_folder(folder, repo_id, token=token, subfolder=subfolder, **commit_kwargs)


class SiTPipeline(HubMixin, pipeline_sit.SiTPipeline):
    # The name of the class is what `model_index.json` records, with or without the mixin.
    __doc__ = pipeline_sit.SiTPipeline.__doc__


def select_pipeline_files(
    filenames: Iterable[str],
    index: Mapping[str, Any],
    passed_components: Iterable[str] = (),
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> list[str]:
    """The files of a repository that a pipeline with this `model_index.json` needs; see `HubMixin.download`.

    `use_safetensors`: `True` excludes and `False` prefers `.bin` weights, else chosen only where there are no others.
    """
    filenames, passed = set(filenames), set(passed_components)
    kinds = {None: ["safetensors", "bin"], True: ["safetensors"], False: ["bin", "safetensors"]}[use_safetensors]
    code = [f"{index['_class_name'][0]}.py"] if isinstance(index.get("_class_name"), list) else []
    selected = ["model_index.json", *(name for name in code if name in filenames)]
    found: set[str] = set()
    chosen_variants: set[str | None] = set()
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or entry[0] is None or component in passed:
            continue
        weights: dict[tuple[str | None, str], list[str]] = {}
        for filename in sorted(filenames):
            folder, _, name = filename.rpartition("/")
            if folder != component:
                continue
            if name.endswith((".json", ".py")):
                selected.append(filename)
            elif match := WEIGHT_FILE.fullmatch(name):
                weights.setdefault((match["variant"], match["kind"]), []).append(filename)
        found |= {name for name, _ in weights if name is not None}
        choices = [(name, kind) for name in dict.fromkeys([variant, None]) for kind in kinds]
        choice = next((choice for choice in choices if choice in weights), None)
        if choice is not None:
            chosen_variants.add(choice[0])
            selected += weights[choice]
    if variant is not None and chosen_variants and variant not in chosen_variants:
        raise ValueError(
            f"The repository has no weights of `variant` {variant!r}: leave it out for the default weights"
            + (f", or choose one of {', '.join(sorted(found))}." if found else ".")
        )
    return selected


def _cached_folder(repo_id: str, config_name: str, error: Exception | None, **hub_kwargs: Any) -> str:
    """The cached folder of a repository, which is not asked or, because of `error`, does not answer."""
    try:
        index_file = hf_hub_download(repo_id, config_name, local_files_only=True, **hub_kwargs)
    except FileNotFoundError:
        if isinstance(error, HfHubHTTPError):
            raise error from None  # it says itself what is wrong: not found, private, gated
        reason = "`local_files_only` is set" if error is None else f"the Hub cannot be reached ({one_line(error)})"
        raise OSError(
            f"The repository {repo_id!r} is not in the cache and {reason}: allow a connection, or pass the path of a "
            "local folder."
        ) from error
    if error is not None:
        logger.warning(f"The Hub does not answer for {repo_id!r} ({one_line(error)}): its cached files are used.")
    return str(Path(index_file).parent)
