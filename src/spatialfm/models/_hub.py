"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from spatialfm._settings import logger, settings
from spatialfm.models._registry import BUNDLED, RECORD, WEIGHTS, Model, write

_REPO = r"[\w.-]+/[\w.-]+"
_LOAD_INSTEAD = (
    f'sfm.models.load("folder") reads a model from disk, and {", ".join(map(repr, BUNDLED))} come with the package'
)
_SAVE_INSTEAD = 'sfm.models.save(model, "folder") writes the same files to disk'


def download(reference: str) -> Path:
    """Fetch a model's weights and record.

    Parameters
    ----------
    reference
        ``"hf-hub:org/name"`` or ``"hf-hub:org/name@revision"``.

    Returns
    -------
    The folder that holds them, of one commit.
    """
    match = re.fullmatch(rf"hf-hub:({_REPO})(?:@(\S+))?", reference)
    if match is None:
        msg = f"{reference!r} is no model of the hub; write 'hf-hub:org/name' or 'hf-hub:org/name@revision'"
        raise ValueError(msg)
    hub = _huggingface_hub(_LOAD_INSTEAD)
    repo_id, revision = match.groups()
    try:
        # One call for both files, so that they are of the same commit.
        folder = hub.snapshot_download(
            repo_id, revision=revision, cache_dir=settings.cache_dir / "hub", allow_patterns=[WEIGHTS, RECORD]
        )
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        msg = (
            f"the hub has no {reference!r}, or it is private and you are not logged in as one who may read it (`hf auth login`). "
            f"Without it: {_LOAD_INSTEAD}. ({_first_line(error)})"
        )
        raise FileNotFoundError(msg) from error
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        msg = f"{reference!r} could not be downloaded, and is not in {settings.cache_dir}. Without the hub: {_LOAD_INSTEAD}. ({_first_line(error)})"
        raise ConnectionError(msg) from error
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        msg = f"{reference!r} holds no {WEIGHTS}: it is no model that sfm.models.push_to_hub wrote"
        raise FileNotFoundError(msg)
    logger.info("load: %s at commit %s", reference, path.name)
    return path


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    license: str | None = None,
) -> str:
    """Upload a model to the Hugging Face hub: weights, training record and model card.

    Log in once with ``hf auth login``, or set ``HF_TOKEN``.

    Parameters
    ----------
    model
        The model; ``model.name`` and ``model.record`` go with it.
    repo_id
        ``"org/name"``. Made where it does not exist; otherwise the three files are replaced by a new commit.
    private
        Whether a new repository is private. One that exists stays as it is.
    commit_message
        Message of the commit; ``"Upload <name of the model>"`` where None.
    dtype, license
        As for :func:`save`.

    Returns
    -------
    What :func:`load` takes to get exactly this model: ``"hf-hub:org/name@commit"``.

    Raises
    ------
    ValueError
        ``repo_id`` is not of the form ``"org/name"``, or :func:`save` refuses the model.
    PermissionError
        You are not logged in, or may not write there.
    ConnectionError
        The hub does not answer, or refuses the files.
    ImportError
        ``huggingface_hub`` is not installed.
    """
    if not re.fullmatch(_REPO, repo_id):
        msg = f"repo_id={repo_id!r} is no repository; write 'org/name', where org may be your user name"
        raise ValueError(msg)
    hub = _huggingface_hub(_SAVE_INSTEAD)
    with TemporaryDirectory() as folder:
        write(model, Path(folder), dtype=dtype, license=license, source=f"hf-hub:{repo_id}")
        api = hub.HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message or f"Upload {model.name}"
            )
        except (OSError, ValueError, hub.errors.HTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            denied = status in (401, 403)
            reason = (
                "you are not logged in, or may not write there (`hf auth login`)"
                if denied
                else "the hub was not reached, or refused it"
            )
            msg = f"{model.name!r} was not pushed to {repo_id!r}: {reason}. Meanwhile: {_SAVE_INSTEAD}. ({_first_line(error)})"
            raise (PermissionError if denied else ConnectionError)(msg) from error
    logger.info("push_to_hub: %r -> %s", model.name, commit.commit_url)
    return f"hf-hub:{repo_id}@{commit.oid}"


def _huggingface_hub(alternative: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        msg = f'the hub needs the package huggingface_hub: pip install "spatialfm[hub]". Without it: {alternative}'
        raise ImportError(msg) from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
