"""Several workers calibrate one export together: the oracle is the export that one process makes."""

import json
import multiprocessing
import os
import re
import socket
import sys
from contextlib import redirect_stderr

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_journal import Stopped, contents, request_to, stopping_at

from vlmq import cli
from vlmq.exporter import calibration
from vlmq.exporter.pipeline import export
from vlmq.formats import manifest

PATIENCE = 60  # seconds, after which workers hang


def work(rank, count, port, together, task, args):
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)
    calibration.BATCH = together
    task(*args)


def on_workers(count, task, *args, together=2):
    """Their exit codes. together: samples that run together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlmq.exporter.pipeline", "test_workers"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [context.Process(target=work, args=(rank, count, port, together, task, args)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        process.kill()
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """In float32, so that scales are stored as they were found."""
    return tiny.tiny_folder("llava-llama", tmp_path_factory.mktemp("float32"), dtype=torch.float32)


@pytest.fixture
def request_for(source, pictures, tmp_path):
    """A request for an export of a name to a place of the test's own: 6 samples, in 3 batches where 2 run together."""

    def made(name, recipe, **more):
        return request_to(source, tmp_path / name, pictures, recipe={"components": {}, **recipe}, **more)

    return made


RECIPES = {
    "awq": {"method": "awq"},
    "awq by the block's error": {"method": "awq", "options": {"awq_loss": "block"}},
    "gptq": {"method": "gptq"},
    "gptq beside the reference": {"method": "gptq", "options": {"gptaq": True, "token_weights": "modality"}},
    "inputs of one range": {"method": "smoothquant", "bits": 8, "activations": {"bits": 8, "group_size": "tensor"}},
}


@pytest.mark.parametrize(
    ("recipe", "together"),
    [*((recipe, 2) for recipe in RECIPES if recipe != "awq"), ("awq", 16)],
    ids=lambda value: f"{value}" if isinstance(value, str) else {2: "3 batches", 16: "1 batch"}[value],
)
def test_two_workers_find_what_one_process_finds(recipe, together, request_for, monkeypatch):
    monkeypatch.setattr(calibration, "BATCH", together)
    alone = request_for("alone", RECIPES[recipe])
    export(alone)
    shared = request_for("shared", RECIPES[recipe])
    assert on_workers(2, export, shared, together=together) == [0, 0]
    expected, found = (load_file(each.output / "model.safetensors") for each in (alone, shared))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert torch.equal(found[name], tensor), name
    assert manifest.read(shared.output).tensors.keys() == manifest.read(alone.output).tensors.keys()
    assert sorted(path.name for path in shared.output.parent.iterdir()) == ["alone", "shared"]


def stop_at_block(request, block):
    try:
        export(request, stopping_at(block))
    except Stopped:
        sys.exit(7)


def test_workers_that_were_stopped_go_on_to_the_same_bytes(request_for, tmp_path):
    whole = request_for("whole", RECIPES["gptq beside the reference"])
    assert on_workers(2, export, whole) == [0, 0]
    request = request_for("out", RECIPES["gptq beside the reference"], activation_memory=0)
    assert on_workers(2, stop_at_block, request, 4) == [7, 7]
    assert json.loads((tmp_path / ".out.journal" / "state.json").read_text())["done"] == 4
    assert on_workers(2, export, request) == [0, 0]
    assert contents(request.output) == contents(whole.output)


def command(said, *arguments):
    sys.argv = ["vlmq", "export", *arguments]
    with open(said / os.environ["RANK"], "w") as file, redirect_stderr(file):
        cli.main()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ("--method", "qvlm", "--activation-bits", "8", "--group-size", "32", "--format", "safetensors"),
            "qvlm searches ranges .* start one, without torchrun",
        ),
        (("--group-size", "48"), "do not divide"),
    ],
)
def test_what_the_first_worker_refuses_is_one_line_and_stops_the_others(flags, line, source, tmp_path):
    said = tmp_path / "said"
    said.mkdir()
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "out"
    assert on_workers(2, command, said, str(source), "-o", str(output), *flags) == [2, 2]
    first, second = ((said / f"{rank}").read_text().splitlines() for rank in range(2))
    assert len(first) == 1
    assert re.search(line, first[0])
    assert len(second) == 1
    assert second[0].startswith("vlmq: worker 1: another worker has ended")
    assert list(output.parent.iterdir()) == []
