"""Choice of device and precision."""

from __future__ import annotations

import pytest
import torch

import spatialfm as sfm
from spatialfm.engine import choose_device, choose_dtype, torch_threads


def test_auto_prefers_cuda_and_never_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"
    assert choose_device("mps").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"


def test_settings_are_the_default():
    with sfm.settings.override(device="cpu"):
        assert choose_device().type == "cpu"
    with sfm.settings.override(device="toaster"), pytest.raises(ValueError, match="device='toaster' is not known"):
        choose_device()


def test_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"device='cuda:3' is not available here; choose from \['cpu', 'cuda:0'\]"):
        choose_device("cuda:3")


def test_dtype():
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu) == "float32"
    assert choose_dtype("bfloat16", cpu) == "bfloat16"
    with pytest.raises(ValueError, match="dtype='float16' is not known"):
        choose_dtype("float16", cpu)


def test_number_of_threads_is_restored():
    def fail():
        assert torch.get_num_threads() == 1
        msg = "inside"
        raise RuntimeError(msg)

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), torch_threads(1):
        fail()
    assert torch.get_num_threads() == before
    with torch_threads():
        assert torch.get_num_threads() == before
        torch.set_num_threads(1)
    assert torch.get_num_threads() == before
