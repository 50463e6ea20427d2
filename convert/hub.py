"""Fetch a model from the hub into its cache: only the files that are read, safetensors before .bin."""

import re
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
]
SMALL_FILES += ["vocab.json", "merges.txt", "chat_template*", "*.jinja", "model.safetensors.index.json"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors"]
TORCH = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def is_hub_id(model: str) -> bool:
    """Whether the text has the form of a hub id: `name` or `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model) is not None


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a model's snapshot in the hub's cache, downloaded unless HF_HUB_OFFLINE is set.

    Raises:
        ConnectionError: the hub cannot be reached and nothing is cached.
        ValueError: no such model or revision, no access, or offline by choice and nothing is cached.
    """
    folder = _snapshot(model, revision, SMALL_FILES + SAFETENSORS)
    return folder if any(folder.glob("*.safetensors")) else _snapshot(model, revision, SMALL_FILES + TORCH)


def fetch_config(model: str, revision: str | None) -> Path:
    """Like `fetch`, of config.json alone."""
    return _snapshot(model, revision, ["config.json"])


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    asked = model if revision is None else f"{model} at revision {revision!r}"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ValueError(
            f"{asked}: access is gated; accept its terms on the hub, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{asked}: the model has no such branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{asked}: neither a local path nor a model on the hub; check the spelling, or run `hf auth "
            "login` if the model is private"
        ) from error
    except LocalEntryNotFoundError as error:
        if is_offline_mode():
            raise ValueError(
                f"{asked}: not a local path, and not in the hub's cache while HF_HUB_OFFLINE is set; "
                "unset it to download the model, or give the path of a local copy"
            ) from error
        raise _unreachable(asked) from error
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(asked) from error


def _unreachable(asked: str) -> ConnectionError:
    return ConnectionError(
        f"{asked}: not a local path, not in the hub's cache, and the hub cannot be reached; check the "
        "network, or give the path of a local copy"
    )
