"""Upload of models to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from spatialfm._settings import logger
from spatialfm.models._hub import REPO, first_line, huggingface_hub
from spatialfm.models._registry import write

if TYPE_CHECKING:
    from spatialfm.models._registry import Model

_SAVE_INSTEAD = 'sfm.models.save(model, "folder") writes the same files to disk'


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
        ``"org/name"``; created if it does not exist, otherwise the three files are replaced in a new commit.
    private
        Whether a new repository is private. An existing one stays as it is.
    commit_message
        Message of the commit; None is ``"Upload <name of the model>"``.
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
    if not re.fullmatch(REPO, repo_id):
        msg = f"repo_id={repo_id!r} is not a repository; write 'org/name', where org may be your user name"
        raise ValueError(msg)
    hub = huggingface_hub(_SAVE_INSTEAD)
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
                f"Instead: {_SAVE_INSTEAD}. ({first_line(error)})"
            )
            raise (PermissionError if denied else ConnectionError)(msg) from error
    logger.info("push_to_hub: %r -> %s", model.name, commit.commit_url)
    return f"hf-hub:{repo_id}@{commit.oid}"
