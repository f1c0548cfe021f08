"""Fixtures that several rooms share: tiny random checkpoints and random image-text samples on disk."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach a network

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `tiny` and the oracles by their file names

import tiny

from vlmq import cli
from vlmq.exporter import release
from vlmq.exporter.samples import Sample

GATE = release.check


@pytest.fixture(scope="session", autouse=True)
def without_gate():
    """The gate starts a process for each export: tests of other things do without it, those of it have `gated`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "check", lambda folder: None)
        yield


@pytest.fixture
def gated(monkeypatch):
    """Exports go through the release gate."""
    monkeypatch.setattr(release, "check", GATE)


@pytest.fixture(params=tiny.VARIANTS)
def variant(request):
    """One of the supported families, as a tiny model."""
    return request.param


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """variant -> the folder of its tiny checkpoint, saved once."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.tiny_folder(name, root / name) for name in tiny.VARIANTS}


@pytest.fixture(scope="session")
def random_samples(tmp_path_factory):
    """Twelve questions of two lengths about random pictures."""
    folder = tmp_path_factory.mktemp("images")
    samples = []
    for index in range(12):
        file = folder / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        question = "what is the colour of the circle?" if index % 2 else "how many?"
        samples.append(Sample(str(index), file, "question", question, ("red",)))
    return tuple(samples)


@pytest.fixture(scope="session")
def pictures(random_samples):
    """Their folder, as a user might name it."""
    return random_samples[0].image.parent


@pytest.fixture
def vlmq(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vlmq", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
