"""A cache of its own for each test, and what the sources say."""

import logging

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="tgol_trainer.sources")
    return caplog
