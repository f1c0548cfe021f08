"""A killed export goes on where it was: the oracle is the run that nothing disturbed, byte for byte."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.journal import journaled, left_behind
from vlmq.exporter.pipeline import Request, export, plan
from vlmq.exporter.recipe import make_recipe
from vlmq.formats.errors import FormatError

KILLS = 20
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def request_to(folder, output, pictures, **more):
    recipe = {"bits": 4, "group_size": 32, "components": {"language": {"method": "gptq"}}, **more.pop("recipe", {})}
    return Request(
        str(folder), output, make_recipe(recipe), formats="safetensors", calibration=str(pictures), samples=6,
        verify=False, gate=False, **more,
    )  # fmt: skip


def watch_writes(folder, happened):
    """Call `happened` before whatever this process changes below a folder."""

    def hook(event, args):
        written = event in WRITES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if written and str(args[0]).startswith(str(folder)):
            happened()

    sys.addaudithook(hook)


def run_and_die(request, after):
    """In a process of its own: killed by the operating system before its `after`-th change of the disk."""
    left = [after]

    def happened():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(request.output.parent, happened)
    export(request)


def run_and_count(request, count):
    def happened():
        count.value += 1

    watch_writes(request.output.parent, happened)
    export(request)


def process(target, *args):
    context = multiprocessing.get_context("forkserver")  # a process that has imported everything, and run nothing
    context.set_forkserver_preload(["vlmq.exporter.pipeline", "vlmq.exporter.evaluation.verify", "test_journal"])
    started = context.Process(target=target, args=args)
    started.start()
    started.join()
    return started.exitcode


def contents(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_killed_at_any_change_of_the_disk_is_resumed_to_the_same_bytes(tiny_folders, pictures, tmp_path):
    source, limits = tiny_folders["llava-llama"], (0, 30_000, 2**30)
    counts, wholes = {}, []
    for limit in limits:
        place = tmp_path / f"whole-{limit}"
        place.mkdir()
        count = multiprocessing.get_context("forkserver").Value("i", 0)
        whole = request_to(source, place / "out", pictures, activation_memory=limit)
        assert process(run_and_count, whole, count) == 0
        counts[limit] = count.value
        wholes.append(contents(whole.output))
    expected = wholes[0]
    assert all(whole == expected for whole in wholes)
    dice = random.Random(0)
    resumed = 0
    for kill in range(KILLS):
        place = tmp_path / f"killed-{kill}"
        place.mkdir()
        limit = dice.choice(limits)
        request = request_to(source, place / "out", pictures, activation_memory=limit)
        assert process(run_and_die, request, dice.randrange(counts[limit])) == -signal.SIGKILL
        state = place / ".out.journal" / "state.json"
        resumed += state.exists() and json.loads(state.read_text())["done"] > 0
        if not request.output.exists():  # else it was killed while it cleaned up
            export(replace(request, activation_memory=dice.choice(limits)))
        assert contents(request.output) == expected
    assert resumed > KILLS / 2


class Stopped(Exception):  # noqa: N818 - as a person stops a run
    pass


def stopping_at(block):
    def progress(what, done, of, at=""):
        if what == "quantizing" and done >= block:
            raise Stopped

    return progress


SIDE_BY_SIDE = {"method": "gptq", "options": {"gptaq": True}, "rotate": ["language"]}
SEARCHED = {
    "method": "qvlm",
    "activations": {"bits": 8, "group_size": "token"},
    "options": {"vision_tuning": False},
    "embedding": {"bits": 8},
}
TUNED = {**SEARCHED, "options": {"token_weights": "modality"}}


@pytest.mark.parametrize("recipe", [SIDE_BY_SIDE, SEARCHED, TUNED], ids=["alongside", "across layers", "tuned"])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_run_stopped_between_blocks_goes_on_with_all_it_knew(recipe, block, tiny_folders, pictures, tmp_path):
    whole = request_to(tiny_folders["llava-llama"], tmp_path / "whole", pictures, recipe=recipe)
    export(whole)
    request = request_to(tiny_folders["llava-llama"], tmp_path / "out", pictures, recipe=recipe)
    with pytest.raises(Stopped):
        export(request, stopping_at(block))
    begun = []
    export(request, lambda what, done, of, at="": begun.append(done))
    assert 0 < begun[0] <= block
    assert contents(request.output) == contents(whole.output)
    assert [path.name for path in tmp_path.iterdir() if "journal" in path.name] == []


@pytest.fixture
def stopped(tiny_folders, pictures, tmp_path):
    request = request_to(tiny_folders["llava-llama"], tmp_path / "out", pictures)
    with pytest.raises(Stopped):
        export(request, stopping_at(2))
    return request


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"recipe": {"bits": 3, "group_size": 32}}, "recipe"),
        ({"seed": 5}, "calibration"),
        ({"samples": 5}, "calib"),
        ({"calibrate_in": "bfloat16"}, "dtype of the calibration"),
    ],
)
def test_a_journal_of_other_inputs_is_refused_until_one_asks_for_a_fresh_start(other, differs, stopped, pictures):
    request = replace(stopped, **{**other, **({"recipe": make_recipe(other["recipe"])} if "recipe" in other else {})})
    with pytest.raises(VlmqError, match=f"journal of a run with another {differs}.*--fresh"):
        export(request)
    export(stopped)  # which was not disturbed
    assert not (stopped.output.parent / ".out.journal").exists()


def test_a_fresh_start_forgets_what_was_finished(stopped):
    begun = []
    export(
        replace(stopped, recipe=make_recipe({"bits": 3, "group_size": 32}), fresh=True),
        lambda *said: begun.append(said[1]),
    )
    assert begun[0] == 0


def test_two_runs_cannot_export_to_one_place(tmp_path):
    with (
        journaled(tmp_path / "out", {}, 0),
        pytest.raises(VlmqError, match="another run is exporting to it"),
        journaled(tmp_path / "out", {}, 0),
    ):
        pass


def test_a_run_that_ends_before_a_block_is_finished_leaves_nothing(tiny_folders, pictures, tmp_path):
    with pytest.raises(Stopped):
        export(request_to(tiny_folders["llava-llama"], tmp_path / "out", pictures), stopping_at(0))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_is_one_line(stopped):
    (stopped.output.parent / ".out.journal" / "blocks" / "00000.safetensors").write_bytes(b"x")
    with pytest.raises(VlmqError, match=r"00000.safetensors: cannot be read .*--fresh"):
        export(stopped)


def test_a_full_disk_keeps_what_is_finished(stopped, monkeypatch):
    def full(*args, **kwargs):  # as the library says it
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("vlmq.exporter.activations.save_file", full)
        with pytest.raises(FormatError, match="No space left"):
            export(stopped)
    begun = []
    export(stopped, lambda *said: begun.append(said[1]))
    assert begun[0] == 2


def test_what_an_earlier_run_left_is_not_counted_as_taken(stopped, monkeypatch):
    """Of the disk, which the same command is going to need: it needs no more than it did at first."""
    needed = plan(stopped).disk[0].bytes
    monkeypatch.setattr("vlmq.exporter.planning.machine.free_disk", lambda place: needed - left_behind(stopped.output))
    assert left_behind(stopped.output) > 0
    export(stopped)


def test_samples_that_ask_something_else_are_other_samples(stopped, pictures, tmp_path):
    other = tmp_path / "pictures"
    shutil.copytree(pictures, other)
    for number, picture in enumerate(sorted(other.glob("*.png"))):
        picture.with_suffix(".txt").write_text(f"What is number {number}?")
    with pytest.raises(VlmqError, match="another calibration"):
        export(replace(stopped, calibration=str(other)))
