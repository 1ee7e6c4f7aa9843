from __future__ import annotations

import logging
from pathlib import Path

import pytest

import spatialfm as sfm
from spatialfm._settings import Settings, logger, progress


def test_override_restores():
    before = vars(sfm.settings).copy()
    with sfm.settings.override(n_jobs=1, verbosity=0, progress=True, cache_dir="somewhere") as settings:
        assert settings is sfm.settings
        assert (settings.n_jobs, settings.verbosity, settings.progress) == (1, 0, True)
        assert settings.cache_dir == Path("somewhere")
        assert logger.level == logging.ERROR
    assert vars(sfm.settings) == before
    assert logger.level == logging.INFO


def test_override_restores_after_an_error():
    before = vars(sfm.settings).copy()
    with pytest.raises(ZeroDivisionError), sfm.settings.override(n_jobs=1, device="cpu"):
        1 / 0  # noqa: B018
    assert vars(sfm.settings) == before


def test_override_refuses_as_a_whole():
    before = vars(sfm.settings).copy()
    with pytest.raises(ValueError, match="verbosity"), sfm.settings.override(n_jobs=1, verbosity=9):
        pytest.fail("entered a block with a setting that does not exist")
    assert vars(sfm.settings) == before


def test_overrides_nest():
    with sfm.settings.override(n_jobs=1):
        with sfm.settings.override(n_jobs=2):
            assert sfm.settings.n_jobs == 2
        assert sfm.settings.n_jobs == 1


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_jobs", 0, ValueError),
        ("n_jobs", 1.5, ValueError),
        ("n_jobs", True, ValueError),
        ("verbosity", 4, ValueError),
        ("verbosity", "info", ValueError),
        ("progress", "yes", ValueError),
        ("threads", 2, AttributeError),
    ],
)
def test_bad_values(name, value, error):
    settings = Settings()
    before = vars(settings).copy()
    with pytest.raises(error, match=name):
        setattr(settings, name, value)
    assert vars(settings) == before


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown, capsys):
    with sfm.settings.override(progress=shown):
        assert list(progress([1, 2], desc="counting")) == [1, 2]
    assert ("counting" in capsys.readouterr().err) is shown


def test_verbosity_decides_what_is_said(capsys):
    with sfm.settings.override(verbosity=1):
        logger.info("assumed")
        logger.warning("careful")
    assert capsys.readouterr().err == "careful\n"
