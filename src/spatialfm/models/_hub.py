"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spatialfm._settings import logger, settings
from spatialfm.models._files import BUNDLED, RECORD, WEIGHTS

REPO = r"[\w.-]+/[\w.-]+"
_LOAD_INSTEAD = (
    f'sfm.models.load("folder") reads a model from disk, and {", ".join(map(repr, BUNDLED))} come with the package'
)


def download(reference: str) -> Path:
    """Download the weights and the record of a model.

    Parameters
    ----------
    reference
        ``"hf-hub:org/name"`` or ``"hf-hub:org/name@revision"``.

    Returns
    -------
    The folder that holds both files, of one commit.
    """
    match = re.fullmatch(rf"hf-hub:({REPO})(?:@(\S+))?", reference)
    if match is None:
        msg = f"{reference!r} is not a model of the hub; write 'hf-hub:org/name' or 'hf-hub:org/name@revision'"
        raise ValueError(msg)
    hub = huggingface_hub(_LOAD_INSTEAD)
    repo_id, revision = match.groups()
    try:
        # One call fetches both files, so that they are of the same commit.
        folder = hub.snapshot_download(
            repo_id, revision=revision, cache_dir=settings.cache_dir / "hub", allow_patterns=[WEIGHTS, RECORD]
        )
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        msg = (
            f"the hub has no {reference!r}, or it is private and your account cannot read it (log in with `hf auth "
            f"login`). Without it: {_LOAD_INSTEAD}. ({first_line(error)})"
        )
        raise FileNotFoundError(msg) from error
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        msg = (
            f"{reference!r} could not be downloaded, and is not in {settings.cache_dir}. "
            f"Without the hub: {_LOAD_INSTEAD}. ({first_line(error)})"
        )
        raise ConnectionError(msg) from error
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        msg = f"{reference!r} holds no {WEIGHTS}: it was not written by sfm.models.push_to_hub"
        raise FileNotFoundError(msg)
    logger.info("load: %s at commit %s", reference, path.name)
    return path


def huggingface_hub(alternative: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        msg = f'the hub needs the package huggingface_hub: pip install "spatialfm[hub]". Without it: {alternative}'
        raise ImportError(msg) from error
    return huggingface_hub


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
