"""Models on the Hugging Face hub, tested without network."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig, fingerprint, load, push_to_hub, save

LOCAL = r"sfm\.models\.load\(\"folder\"\) reads a model from disk, and 'heist.* come with the package"
DISK = r"sfm\.models\.save\(model, \"folder\"\)"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16, cross=False, gene_pe="geometric"))
    model.name, model.record = "mine", {"data": [{"name": "a", "cells": 5}]}
    return model.eval()


class Hub:
    """A hub in a folder with the functions of huggingface_hub that are used; each raises ``answer`` if it is set."""

    def __init__(self, root):
        self.root = root
        self.calls = []
        self.answer = None
        self.errors = ModuleType("huggingface_hub.errors")
        self.errors.HTTPError = type("HTTPError", (Exception,), {})  # that of httpx, which is not an OSError
        self.errors.HfHubHTTPError = type("HfHubHTTPError", (self.errors.HTTPError, OSError), {})
        for name in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            setattr(self.errors, name, type(name, (self.errors.HfHubHTTPError,), {}))

    def module(self):
        module = ModuleType("huggingface_hub")
        module.errors = self.errors
        module.HfApi = lambda: self
        module.snapshot_download = self.snapshot_download
        return module

    def _called(self, function, /, **arguments):
        self.calls.append((function, arguments))
        if self.answer is not None:
            raise self.answer

    def create_repo(self, repo_id, *, private, exist_ok):
        self._called("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._called("upload_folder", repo_id=repo_id, commit_message=commit_message)
        oid = f"c0ffee{len(list((self.root / repo_id).iterdir()))}"
        shutil.copytree(folder_path, self.root / repo_id / oid)
        return SimpleNamespace(oid=oid, commit_url=f"https://hub.example/{repo_id}/commit/{oid}")

    def snapshot_download(self, repo_id, *, revision, cache_dir, allow_patterns):
        self._called("snapshot_download", repo_id=repo_id, revision=revision, cache_dir=cache_dir)
        if not (self.root / repo_id).is_dir():
            raise self.errors.RepositoryNotFoundError("404 Client Error.\nRepository Not Found")
        commits = sorted(path.name for path in (self.root / repo_id).iterdir())
        commit = revision or commits[-1]
        if commit not in commits:
            raise self.errors.RevisionNotFoundError("404 Client Error.\nRevision Not Found")
        folder = cache_dir / repo_id / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.root / repo_id / commit).iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, folder)
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub.module())
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub.errors)
    with sfm.settings.override(cache_dir=tmp_path / "cache"):
        yield hub


def test_round_trip(model, hub):
    first = push_to_hub(model, "org/name", commit_message="First", license="mit")
    assert re.fullmatch(r"hf-hub:org/name@\w+", first)
    with torch.no_grad():
        model.norm.bias += 1
    second = push_to_hub(model, "org/name", private=False, dtype="bfloat16")
    assert [arguments for function, arguments in hub.calls if function == "create_repo"] == [
        {"repo_id": "org/name", "private": True, "exist_ok": True},
        {"repo_id": "org/name", "private": False, "exist_ok": True},
    ]
    messages = [arguments["commit_message"] for function, arguments in hub.calls if function == "upload_folder"]
    assert messages == ["First", "Upload mine"]

    newest, old, new = load("hf-hub:org/name"), load(first), load(Path(second))
    assert fingerprint(newest) == fingerprint(new) != fingerprint(old)
    assert newest.record["data"] == model.record["data"]
    assert old.record["license"] == "mit"
    assert newest.name == "mine"
    assert not newest.training
    torch.testing.assert_close(old.norm.bias + 1, newest.norm.bias, rtol=2**-8, atol=0)
    assert hub.calls[-1][1]["cache_dir"].is_relative_to(sfm.settings.cache_dir)


def test_uploaded_and_downloaded_files(model, hub, tmp_path):
    reference = push_to_hub(model, "org/name")
    (sent,) = (hub.root / "org" / "name").iterdir()
    assert sorted(path.name for path in sent.iterdir()) == ["README.md", "model.safetensors", "record.json"]
    assert 'sfm.models.load("hf-hub:org/name")' in (sent / "README.md").read_text()
    save(model, tmp_path / "disk")
    assert (sent / "record.json").read_bytes() == (tmp_path / "disk" / "record.json").read_bytes()
    assert fingerprint(load(sent)) == fingerprint(model)
    for name in ("malware.py", "weights.pth", "config.pkl"):
        (sent / name).write_text("print('run')")
    load(reference)
    fetched = [path.name for path in sfm.settings.cache_dir.rglob("*") if path.is_file()]
    assert sorted(fetched) == ["model.safetensors", "record.json"]


def test_downloaded_files_are_checked(model, hub):
    push_to_hub(model, "org/name")
    (sent,) = (hub.root / "org" / "name").iterdir()
    # A published checkpoint is a pickle: it is read from disk if a user names it, but never from the hub.
    shutil.copy(Path(__file__).parent / "data" / "heist_small" / "checkpoint.pth", sent / "model.safetensors")
    with pytest.raises(ValueError, match="neither a safetensors file"):
        load("hf-hub:org/name")
    model.norm.bias.data += 1
    save(model, sent)
    content = bytearray((sent / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (sent / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="do not match their checksum"):
        load("hf-hub:org/name")
    (sent / "model.safetensors").unlink()
    shutil.rmtree(sfm.settings.cache_dir)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load("hf-hub:org/name")


def test_a_refused_model_is_not_uploaded(model, hub):
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        push_to_hub(model, "org/name")
    with pytest.raises(TypeError, match="cannot save a Linear"):
        push_to_hub(torch.nn.Linear(1, 1), "org/name")
    assert hub.calls == []


@pytest.mark.parametrize(
    "name", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:org/na me", "hf-hub:org/name@", "hf-hub:org/name@a b"]
)
def test_names_of_a_wrong_form(name, model, hub):
    with pytest.raises(ValueError, match="write 'hf-hub:org/name'"):
        load(name)
    with pytest.raises(ValueError, match="write 'org/name'"):
        push_to_hub(model, name)
    assert hub.calls == []


def test_not_found(model, hub):
    with pytest.raises(
        FileNotFoundError, match=rf"the hub has no 'hf-hub:org/name'.*hf auth login.*{LOCAL}.*404 Client"
    ):
        load("hf-hub:org/name")
    push_to_hub(model, "org/name")
    with pytest.raises(FileNotFoundError, match=r"the hub has no 'hf-hub:org/name@v2'"):
        load("hf-hub:org/name@v2")


def test_offline(model, hub):
    for answer in (
        ConnectionError("offline mode is enabled"),
        hub.errors.HTTPError("Name or service not known"),
        FileNotFoundError("no snapshot"),
    ):
        hub.answer = answer
        with pytest.raises(ConnectionError, match=rf"'hf-hub:org/name' could not be downloaded.*{LOCAL}.*{answer}"):
            load("hf-hub:org/name")
        with pytest.raises(ConnectionError, match=rf"'mine' was not pushed to 'org/name'.*{DISK}.*{answer}"):
            push_to_hub(model, "org/name")


@pytest.mark.parametrize("status", [401, 403])
def test_not_logged_in(status, model, hub):
    hub.answer = hub.errors.HfHubHTTPError(f"{status} Client Error")
    hub.answer.response = SimpleNamespace(status_code=status)
    with pytest.raises(PermissionError, match=rf"not logged in.*hf auth login.*{DISK}"):
        push_to_hub(model, "org/name")


def test_without_the_package(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    install = r"pip install \"spatialfm\[hub\]\""
    with pytest.raises(ImportError, match=rf"{install}.*{LOCAL}"):
        load("hf-hub:org/name")
    with pytest.raises(ImportError, match=rf"{install}.*{DISK}"):
        push_to_hub(model, "org/name")


# --- the real package, if installed, without network ---


@pytest.fixture
def offline(tmp_path, monkeypatch):
    package = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    import_module("huggingface_hub.errors")
    with sfm.settings.override(cache_dir=tmp_path / "cache"):
        yield package


def test_our_hub_has_the_arguments_of_the_real_one(offline, tmp_path):
    for ours in (Hub.create_repo, Hub.upload_folder, Hub.snapshot_download):
        owner = offline if ours is Hub.snapshot_download else offline.HfApi
        real = inspect.signature(getattr(owner, ours.__name__)).parameters
        assert set(inspect.signature(ours).parameters) - {"self"} <= set(real)
    hub = Hub(tmp_path)
    for name in ("RepositoryNotFoundError", "RevisionNotFoundError", "HfHubHTTPError"):
        for base in ("HTTPError", "HfHubHTTPError"):
            assert issubclass(getattr(hub.errors, name), getattr(hub.errors, base))
            assert issubclass(getattr(offline.errors, name), getattr(offline.errors, base))


def test_a_model_downloaded_before_loads_offline(model, offline):
    """The cache has the layout of the real package."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = sfm.settings.cache_dir / "hub" / "models--org--name"
    save(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("hf-hub:org/name", f"hf-hub:org/name@{commit}"):
        assert fingerprint(load(name)) == fingerprint(model)
    with pytest.raises(ConnectionError, match=LOCAL):
        load("hf-hub:org/name@v2")


def test_offline_with_the_real_package(model, offline):
    with pytest.raises(ConnectionError, match=rf"{LOCAL}.*LocalEntryNotFoundError"):
        load("hf-hub:org/name")
    with pytest.raises(ConnectionError, match=rf"{DISK}.*(OfflineModeIsEnabled|ConnectionError)"):
        push_to_hub(model, "org/name")
