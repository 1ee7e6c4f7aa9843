"""The documentation keeps up with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

import spatialfm as sfm

GALLERY = Path(__file__).parents[1] / "docs" / "gallery.md"


@pytest.mark.parametrize("name", sfm.pl.__all__)
def test_gallery_shows_every_figure(name):
    assert f"\nsfm.pl.{name}(" in GALLERY.read_text("utf-8")
