"""Features of patches in batches."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import spatialfm as sfm
from spatialfm.engine._device import torch_threads
from spatialfm.engine._images import encode_patches
from spatialfm.models._towers import ImageTower, load_tower


class Source:
    """Patches of an array; records how many batches were read, and in which threads."""

    def __init__(self, array):
        self.array, self.read, self.threads = array, 0, set()

    def __len__(self):
        return len(self.array)

    def batches(self, n=64):
        for start in range(0, len(self), n):
            self.read += 1
            self.threads.add(threading.get_ident())
            yield self.array[start : start + n]


def random_patches(n, size=16):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 5)
    )
    return ImageTower(network, name="small", size=16, mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100, None])
def test_batches_do_not_matter(tower, batch_size):
    patches = random_patches(7)
    expected = torch.cat([tower.encode(patch[None]) for patch in patches])
    found = encode_patches(tower, Source(patches), device="cpu", batch_size=batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_built_in_tower_in_batches():
    tower = load_tower()
    patches = random_patches(5, 224)
    one, three = (encode_patches(tower, Source(patches), device="cpu", batch_size=n) for n in (1, 3))
    np.testing.assert_allclose(one, three, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_no_more_than_one_batch_ahead_and_in_other_threads(tower, n_threads):
    source, n_read, threads = Source(random_patches(10)), [], []

    def record(module, inputs):
        n_read.append(source.read)
        threads.append((threading.get_ident(), torch.get_num_threads()))

    tower.register_forward_pre_hook(record)
    with torch_threads(n_threads):
        encode_patches(tower, source, device="cpu", batch_size=1)
        assert torch.get_num_threads() == n_threads
    assert len(n_read) == 10
    assert all(read <= done + 1 + n_threads for done, read in enumerate(n_read))
    assert source.threads == {threading.get_ident()}
    assert all(thread not in source.threads and alone == 1 for thread, alone in threads)


def test_mode_and_weights_of_the_tower_are_restored(tower):
    tower.train()
    encode_patches(tower, Source(random_patches(2)), device="cpu")
    assert tower.training
    assert torch.equal(tower.network[1].running_mean, torch.zeros(8))  # evaluated, not trained


def test_no_patches(tower):
    assert encode_patches(tower, Source(random_patches(0)), device="cpu").shape == (0, 5)


def test_errors_of_the_source_and_of_arguments(tower):
    class Broken(Source):
        def batches(self, n=64):
            yield self.array[:1]
            msg = "the slide is damaged"
            raise OSError(msg)

    with pytest.raises(OSError, match="the slide is damaged"):
        encode_patches(tower, Broken(random_patches(3)), device="cpu")
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        encode_patches(tower, Source(random_patches(3)), device="cpu", batch_size=0)


def test_bfloat16_is_near_and_only_on_request(tower):
    source = Source(random_patches(4))
    exact = encode_patches(tower, source, device="cpu")
    low = encode_patches(tower, source, device="cpu", dtype="bfloat16")
    assert low.dtype == np.float32
    assert 1e-5 < np.abs(low - exact).max() / np.abs(exact).max() < 0.05


def test_tissue_patches():
    import anndata as ad

    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    spatial = np.random.default_rng(1).uniform(10, 50, (6, 2))
    adata = ad.AnnData(np.ones((6, 1), np.float32), obsm={"spatial": spatial})
    patches = sfm.pp.patches(adata, image, size_px=20, out_px=16)
    tower = ImageTower(
        nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()), name="small", size=16, mean=[0.5] * 3, std=[0.5] * 3
    )
    found = encode_patches(tower, patches, device="cpu", batch_size=4)
    np.testing.assert_allclose(found, tower.encode(patches[:]), rtol=1e-5, atol=1e-6)
