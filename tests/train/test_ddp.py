"""Two processes on the CPU are equal to one process with both batches of a step."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import spatialfm as sfm
from spatialfm.models import HEISTConfig
from spatialfm.train._heist import HEISTRecipe
from spatialfm.train._loop import neighboring
from spatialfm.train._slides import read_slide

STEPS = 4
SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def two(write_run, tmp_path_factory):
    """Folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    path = write_run(folder, devices=2, max_steps=STEPS, validate_every=STEPS, log_every=1)
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "GLOBAL_RANK" not in done.stderr + done.stdout
    return folder


def test_processes_draw_different_batches_and_have_the_same_weights(two):
    one, other = (json.loads((two / f"process{rank}.json").read_text()) for rank in (0, 1))
    assert len(one["drawn"]) >= STEPS
    # There are ten contexts, so two processes may draw the same now and then.
    assert sum(a != b for a, b in zip(one["drawn"], other["drawn"], strict=False)) >= STEPS - 1
    assert one["sha256"] == other["sha256"] == sfm.models.load(two / "run").record["sha256"]
    record = sfm.models.load(two / "run").record
    assert record["cells_seen"] == sum(len(cells) for process in (one, other) for cells in process["drawn"][:STEPS])


def test_the_gradient_is_that_of_both_batches(two, slide, small):
    """Compared with a plain loop in one process that averages the losses of both batches."""
    recipe = HEISTRecipe(torch.device("cpu"), "float32", mask=0.2, n_genes=16, rotate=True, reflect=True, dropout=0.2)
    data = read_slide("brain", slide, recipe, context_size=48, held_out=0.05, seed=[0, 0], reading={"rng": 0})
    torch.manual_seed(0)
    model = recipe.build(HEISTConfig(**small["config"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=3e-3)
    norms, means = [], []
    for step in range(1, STEPS + 1):
        parts = []
        for rank in (0, 1):
            random = np.random.default_rng([0, step, rank])
            random.choice(1, p=[1.0])  # the slide
            batch = recipe.batch(data.state, neighboring(data.train, 48, random), random)
            seed = int(random.integers(2**62))
            torch.manual_seed(seed)
            parts.append(recipe.losses(model, batch, torch.Generator().manual_seed(seed)))
        optimizer.zero_grad()
        loss = (parts[0]["loss"] + parts[1]["loss"]) / 2
        loss.backward()
        means.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            warm, cosine = step / small["warmup"], (1 + math.cos(math.pi * step / STEPS)) / 2
            group["lr"] = 5e-4 * warm * (0.02 + 0.98 * cosine)
        optimizer.step()

    log = pd.read_csv(two / "run" / "logs" / "version_0" / "metrics.csv")
    np.testing.assert_allclose(log["loss"], means, rtol=1e-4)
    np.testing.assert_allclose(log["gradient_norm"], norms, rtol=1e-3)
    trained = sfm.models.load(two / "run").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=2e-6, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_end_and_continue_together(write_run, tmp_path):
    """If the first process is killed, the second ends too; if called again, both continue to the same losses."""
    arguments = {
        "devices": 2,
        "max_steps": 150,
        "checkpoint_every": 1,
        "validate_every": 25,
        "patience": 100,
        "log_every": 1,
    }
    path = write_run(tmp_path, **arguments)
    command = [sys.executable, "-m", "spatialfm.train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = tmp_path / "run" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert checkpoint.exists(), "no checkpoint within two minutes"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the pipe closes when the last process that holds it has ended
    assert process.returncode == -signal.SIGKILL
    at = torch.load(checkpoint, weights_only=True)["progress"]["step"]
    assert 1 <= at < 150
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert f"continuing from step {at}" in again.stderr
    logs = [pd.read_csv(p) for p in sorted((tmp_path / "run" / "logs").glob("version_*/metrics.csv"))]
    rows = pd.concat(logs).drop_duplicates("step", keep="last").set_index("step").sort_index()
    (tmp_path / "whole").mkdir()
    path = write_run(tmp_path / "whole", **arguments)
    subprocess.run([*command[:-1], str(path)], capture_output=True, check=True, timeout=300)
    whole = pd.read_csv(tmp_path / "whole" / "run" / "logs" / "version_0" / "metrics.csv").set_index("step")
    np.testing.assert_allclose(rows["loss"], whole["loss"], rtol=1e-3)


@pytest.mark.slow
def test_if_one_process_fails_both_name_the_slide(write_run, tmp_path):
    path = write_run(tmp_path, devices=2, max_steps=50, checkpoint_every=1)
    done = subprocess.run([sys.executable, SCRIPT, path, "--break"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: slide 'brain': not finite") == 2
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["progress"]["step"] == 2
    assert not (tmp_path / "run" / "model.safetensors").exists()
