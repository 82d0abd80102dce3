"""Fixtures shared by the tests; what they are made of is in tiny.py, imported where a test asks for it."""

import os
from dataclasses import replace

import pytest

# Before torch is imported, and for the processes that tests start: tiny nets gain nothing from threads, and on some
# CPUs torch 2.13 corrupts the heap ("free(): invalid next size") with two of them, in the backward pass of small
# bfloat16 convolutions.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["served", "tiny_people", "tiny_hub", "tiny_runs", "converted_heads", "shard_batches"]


@pytest.fixture(scope="session")
def pipe():
    """A whole tiny FaceSnap, shared by all tests as by all visitors of a page: no call may change it."""
    from tiny import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def tiny_readers(monkeypatch):
    """Lets `from_pretrained` read the tiny stand-ins of the two parts that are ONNX files."""
    from tiny import TinyAnalyser, TinyScorer

    monkeypatch.setattr("facesnap.folder.FaceAnalyser", TinyAnalyser)
    monkeypatch.setattr("facesnap.folder.Recogniser", TinyScorer)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Rendered people as photographs, and the training shards made of them; for reading only."""
    from photo_folder import prepare_once

    return prepare_once(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def shallow():
    """The benchmarks' small size with fewer transformers, which takes half the time."""
    from benchmarks.random_models import SIZES

    whole = SIZES["small"]
    SIZES["small"] = replace(whole, depths=(1, 1, 3))
    yield
    SIZES["small"] = whole
