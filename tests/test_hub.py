"""The real huggingface_hub client pushes to, and fetches from, a small Hub on 127.0.0.1, with failures injected."""

import json
import os
import shutil
import subprocess
import sys

import hub_server
import pytest
from hub_server import Fault
from huggingface_hub import ModelCard

from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import card, hub, manifest
from vlmq.formats.errors import FormatError


@pytest.fixture
def server():
    with hub_server.running() as found:
        yield found


@pytest.fixture(scope="module")
def exported(tiny_folders, tmp_path_factory):
    """An export that its report and its release say is good; what they measure is not the matter here."""
    folder = tmp_path_factory.mktemp("hub") / "out"
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    export(Request(str(tiny_folders["llava-llama"]), folder, recipe, formats="safetensors", verify=False))
    approve(folder)
    return folder


def approve(folder):
    (folder / card.REPORT).write_text(json.dumps({"ok": True, "misses": []}))
    release = {"ok": True, "misses": [], "manifest_sha256": manifest.identity(folder)}
    (folder / card.RELEASE).write_text(json.dumps(release))


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def command(server, tmp_path, *arguments, **environment):
    """vlmq in a process of its own, whose Hub is the server: (exit code, stdout, stderr)."""
    known = {**os.environ, **server.environment(tmp_path / "home"), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "vlmq", *map(str, arguments)], capture_output=True, text=True, env=known, cwd=tmp_path
    )
    return done.returncode, done.stdout, done.stderr


def one_line(err):
    (line,) = [line for line in err.splitlines() if line.startswith("vlmq: ")]
    assert "Traceback" not in err
    return line


def test_what_is_pushed_is_on_the_hub_byte_for_byte_and_nothing_else_is(server, folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    code, out, err = command(server, tmp_path, "push", folder, "user/small", "--private")
    assert code == 0, err
    repository = server.repositories["user/small"]
    assert repository.private
    there = repository.files("main")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"notes.txt"}
    assert set(there) - {".gitattributes"} == names
    assert all(there[name] == (folder / name).read_bytes() for name in names)
    assert f"at commit {repository.branches['main']}" in out
    assert "note: notes.txt is not part of the export and is not pushed" in err
    text = there["README.md"].decode()
    assert 'from_pretrained("user/small")' in text
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"


def test_pushing_again_sends_no_large_file_again(server, folder, tmp_path):
    command(server, tmp_path, "push", folder, "user/small")
    before = len(server.requests)
    code, _, err = command(server, tmp_path, "push", folder, "user/small")
    assert code == 0, err
    assert not [request for request in server.requests[before:] if request[0] == "PUT"]


def test_a_stopped_push_goes_on_with_what_is_not_there_yet(server, folder, tmp_path):
    server.faults = [Fault("POST", "/commit/", "drop", times=1)]
    code, _, err = command(server, tmp_path, "push", folder, "user/small")
    assert code == 2
    assert "the same command goes on" in one_line(err)
    assert "model.safetensors" not in server.repositories["user/small"].files("main")
    sent = [path for method, path in server.requests if method == "PUT"]
    assert sent
    code, out, err = command(server, tmp_path, "push", folder, "user/small")
    assert code == 0, err
    assert "at commit" in out
    assert [path for method, path in server.requests if method == "PUT"] == sent


def test_a_dry_run_pushes_nothing_and_needs_no_hub(server, folder, tmp_path):
    before = (folder / "README.md").read_bytes()
    code, out, err = command(
        server, tmp_path, "push", folder, "user/small", "--dry-run", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert code == 0, err
    assert "model.safetensors" in out
    assert "user/small: would be given" in out
    assert server.requests == []
    assert (folder / "README.md").read_bytes() == before


def test_a_revision_is_a_branch_of_its_own(server, folder, tmp_path):
    code, _, err = command(server, tmp_path, "push", folder, "user/small", "--revision", "w4", "--base-model", "a/b")
    assert code == 0, err
    repository = server.repositories["user/small"]
    assert set(repository.files("main")) == {".gitattributes"}
    assert ModelCard(repository.files("w4")["README.md"].decode()).data.base_model == "a/b"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET", "/whoami", 401), "the Hub does not know this token"),
        (Fault("POST", "/api/repos/create", 403), "this token may not write there"),
        (Fault("POST", "/preupload/", 404), "no such repository, or this token may not see it"),
        (Fault("POST", "/api/repos/create", 500), "the Hub answers 500 (injected)"),
        (Fault("POST", "/commit/", 500), "the Hub answers 500 (injected)"),
        (Fault("POST", "/commit/", "drop"), "dropped the connection"),
        (Fault("PUT", "/lfs/", 400), "the Hub answers 400 (injected)"),
        (Fault("PUT", "/lfs/", "corrupt"), "the Hub has other bytes of model.safetensors than were sent"),
    ],
    ids=str,
)
def test_a_failure_is_one_line_and_nothing_is_called_done(server, folder, tmp_path, fault, message):
    server.faults = [fault]
    code, out, err = command(server, tmp_path, "push", folder, "user/small")
    assert code == 2
    assert message in one_line(err)
    assert one_line(err).startswith("vlmq: user/small: ")
    assert "at commit" not in out


def test_a_connection_that_drops_once_while_a_file_is_sent_is_taken_up_again(server, folder, tmp_path):
    server.faults = [Fault("PUT", "/lfs/", "drop", times=1)]
    code, _, err = command(server, tmp_path, "push", folder, "user/small")
    assert code == 0, err


def test_a_file_that_the_commit_lost_is_missed(folder):
    there = {}
    with pytest.raises(FormatError, match=r"the Hub lacks config.json; the same command goes on"):
        hub._compare(folder, "user/small", {"config.json": 1}, there)


def test_nobody_without_a_token_or_a_hub_gets_a_traceback(server, folder, tmp_path):
    code, _, err = command(server, tmp_path, "push", folder, "user/small", HF_TOKEN="")
    assert code == 2
    assert "log in with `hf auth login`" in one_line(err)
    code, _, err = command(server, tmp_path, "push", folder, "user/small", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2
    assert "the Hub cannot be reached" in one_line(err)
    code, _, err = command(server, tmp_path, "push", folder, "user/small", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in one_line(err)


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def failed(folder):
    (folder / card.REPORT).write_text(json.dumps({"ok": False, "misses": ["accuracy fell by 9 points"]}))


def ungated(folder):
    release = json.loads((folder / card.RELEASE).read_text())
    (folder / card.RELEASE).write_text(json.dumps(release | {"ok": False, "misses": ["other weights"]}))


def of_another(folder):
    release = json.loads((folder / card.RELEASE).read_text())
    (folder / card.RELEASE).write_text(json.dumps(release | {"manifest_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("fault", "message", "forgivable"),
    [
        (flip, "its bytes are not those vlmq.json lists", False),
        (lambda folder: (folder / manifest.NAME).unlink(), "No such file or directory", False),
        (lambda folder: (folder / card.REPORT).unlink(), "was not verified; run vlmq verify", True),
        (lambda folder: (folder / card.RELEASE).unlink(), "was not loaded with transformers; run vlmq verify", True),
        (of_another, "was not loaded with transformers; run vlmq verify", True),
        (failed, "failed its verification (accuracy fell by 9 points)", True),
        (ungated, "failed the release gate (other weights)", True),
    ],
)
def test_what_is_not_known_to_be_good_is_not_pushed(folder, fault, message, forgivable):
    hub.push(folder, "user/small", dry_run=True)
    fault(folder)
    with pytest.raises(FormatError) as refused:
        hub.push(folder, "user/small", dry_run=True)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ("--allow-unverified" in str(refused.value)) == forgivable
    if forgivable:
        assert hub.push(folder, "user/small", dry_run=True, allow_unverified=True).files
    else:
        with pytest.raises(FormatError):
            hub.push(folder, "user/small", dry_run=True, allow_unverified=True)


@pytest.mark.parametrize(
    ("name", "message"), [("small", r"whose\? write user/name"), ("a/b/c", "not a repository's name")]
)
def test_a_name_that_no_repository_has_is_refused(folder, name, message):
    with pytest.raises(FormatError, match=message):
        hub.push(folder, name, dry_run=True)


EXPORT = ("--method", "rtn", "--group-size", 32, "--format", "safetensors", "--no-verify", "--no-gate")


def test_a_model_of_the_hub_is_exported_at_a_revision_that_the_manifest_pins(server, tiny_folders, tmp_path):
    first = server.publish("user/base", tiny_folders["blip2-opt"])
    (tmp_path / "other").mkdir()
    changed = shutil.copytree(tiny_folders["blip2-opt"], tmp_path / "other" / "model")
    (changed / "generation_config.json").unlink()
    second = server.publish("user/base", changed)
    code, _, err = command(server, tmp_path, "export", "user/base", *EXPORT, "-o", "new")
    assert code == 0, err
    assert manifest.read(tmp_path / "new").source.revision == second
    code, _, err = command(server, tmp_path, "export", "user/base", *EXPORT, "-o", "old", "--revision", first)
    assert code == 0, err
    made = manifest.read(tmp_path / "old")
    assert (made.source.name, made.source.revision) == ("user/base", first)
    data = ModelCard((tmp_path / "old" / "README.md").read_text()).data
    assert data.base_model == "user/base"
    assert data.to_dict()["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET", "/resolve/.*safetensors", "corrupt"), "came otherwise than the Hub has it; remove "),
        (Fault("GET", "/api/models/", 401), "not a folder here, and the Hub does not know this token"),
        (Fault("GET", "/api/models/", 404), "not a folder here, and no such repository, or this token may not see it"),
        (Fault("GET", "/api/models/", 500), "not a folder here, and the Hub answers 500 (injected)"),
        (Fault("GET", "/api/models/", "drop"), "not a folder here, and the Hub cannot be reached"),
    ],
    ids=str,
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(server, tiny_folders, tmp_path, fault, message):
    server.publish("user/base", tiny_folders["blip2-opt"])
    server.faults = [fault]
    code, _, err = command(server, tmp_path, "export", "user/base", *EXPORT, "-o", "out")
    assert code == 2, err
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()
