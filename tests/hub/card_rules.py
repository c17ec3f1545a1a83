"""What the Hub's `/api/validate-yaml` checks in the front matter of a README.

The metadata specification is https://huggingface.co/docs/hub/model-cards#model-card-metadata, the licence identifiers
are those of https://huggingface.co/docs/hub/repositories-licenses.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


FRONT_MATTER = re.compile(r"\A\ufeff?(?:\s*\n)?---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
RELATIONS = {"adapter", "finetune", "merge", "quantized"}

LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()
)
PIPELINE_TAGS = set(
    """
    text-classification token-classification question-answering feature-extraction text-generation fill-mask
    text-to-image image-to-image image-to-text text-to-video image-to-video unconditional-image-generation
    image-classification image-segmentation image-feature-extraction object-detection depth-estimation
    zero-shot-image-classification mask-generation other
    """.split()
)


def validate_card(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Warnings and errors for a README, as the Hub words them roughly."""
    match = FRONT_MATTER.match(content)
    if match is None or not match.group(1).strip():
        return ["empty or missing yaml metadata in repo card"], []
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [], [f"Failed to parse YAML metadata: {error}"]
    if not isinstance(data, dict):
        return [], ["The YAML metadata must be a mapping."]
    errors = _license_errors(data) + _text_errors(data) + _id_errors(data)
    errors += _model_errors(data) if repo_type == "model" else []
    warnings = []
    if data.get("license") == "other" and not data.get("license_name"):
        warnings.append('"license: other" should come with "license_name" and "license_link".')
    return warnings, errors


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _license_errors(data: dict[str, Any]) -> list[str]:
    if "license" not in data:
        return []
    wrong = [name for name in _as_list(data["license"]) if name not in LICENSES]
    return [f'"license" must be one of the Hub\'s identifiers, not {name!r}' for name in wrong]


def _text_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("library_name", "license_name", "license_link", "pipeline_tag", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        errors.append('"tags" must be an array of strings')
    for language in _as_list(data["language"]) if "language" in data else []:
        if not (isinstance(language, str) and re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", language)):
            errors.append(f'"language" must be an ISO 639 code, not {language!r}')
    return errors


def _id_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("datasets", "base_model"):
        for position, name in enumerate(_as_list(data[key]) if key in data else []):
            if not (isinstance(name, str) and REPO_ID.fullmatch(name)) or "--" in name or ".." in name:
                errors.append(f'"{key}[{position}]" with value {name!r} is not valid: use an id of the Hub')
    return errors


def _model_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    if data.get("pipeline_tag", "other") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of the Hub\'s tasks, not {data["pipeline_tag"]!r}')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    index = data.get("model-index", [])
    if not isinstance(index, list) or not all(
        isinstance(model, dict) and {"name", "results"} <= set(model) for model in index
    ):
        errors.append('"model-index" must be an array of {name, results}')
    return errors
