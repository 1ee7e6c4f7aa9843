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
    """Download the weights and the record of a model.

    Parameters
    ----------
    reference
        ``"hf-hub:org/name"`` or ``"hf-hub:org/name@revision"``.

    Returns
    -------
    The folder that holds both files, of one commit.
    """
    match = re.fullmatch(rf"hf-hub:({_REPO})(?:@(\S+))?", reference)
    if match is None:
        msg = f"{reference!r} is not a model of the hub; write 'hf-hub:org/name' or 'hf-hub:org/name@revision'"
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
            f"the hub has no {reference!r}, or it is private and your account cannot read it (log in with `hf auth "
            f"login`). Without it: {_LOAD_INSTEAD}. ({_first_line(error)})"
        )
        raise FileNotFoundError(msg) from error
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        msg = (
            f"{reference!r} could not be downloaded, and is not in {settings.cache_dir}. "
            f"Without the hub: {_LOAD_INSTEAD}. ({_first_line(error)})"
        )
        raise ConnectionError(msg) from error
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        msg = f"{reference!r} holds no {WEIGHTS}: it was not written by sfm.models.push_to_hub"
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

    Log in once with ``hf auth login``, or set ``HF_TOKEN``. Then ``sfm.models.push_to_hub(model, "org/name")`` uploads
    the model, and ``sfm.models.load("hf-hub:org/name")`` loads it.

    Parameters
    ----------
    model
        The model; ``model.name`` and ``model.record`` are uploaded too.
    repo_id
        ``"org/name"``; created where it does not exist, otherwise the three files are replaced in a new commit.
    private
        Whether a new repository is private. An existing one stays as it is.
    commit_message
        Message of the commit; ``"Upload <name of the model>"`` where None.
    dtype, license
        As for :func:`save`.

    Returns
    -------
    The argument of :func:`load` for exactly this model: ``"hf-hub:org/name@commit"``.

    Raises
    ------
    ValueError
        ``repo_id`` does not have the form ``"org/name"``, or :func:`save` refuses the model.
    PermissionError
        You are not logged in, or your account cannot write there.
    ConnectionError
        The hub does not answer, or refuses the files.
    ImportError
        ``huggingface_hub`` is not installed.
    """
    if not re.fullmatch(_REPO, repo_id):
        msg = f"repo_id={repo_id!r} is not a repository; write 'org/name', where org may be your user name"
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
                "you are not logged in (`hf auth login`), or your account cannot write there"
                if denied
                else "the hub does not answer, or refused the files"
            )
            msg = (
                f"{model.name!r} was not pushed to {repo_id!r}: {reason}. "
                f"Instead: {_SAVE_INSTEAD}. ({_first_line(error)})"
            )
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
