"""What is wrong with a folder is one line and exit code 2, whichever command meets it, and nothing is written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import card, manifest

RTN = ("--method", "rtn", "--group-size", 32, "--no-verify", "--no-gate")


@pytest.fixture(scope="module")
def exported(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "out"
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    return export(Request(str(tiny_folders["llava-llama"]), folder, recipe, verify=False)).folder


@pytest.fixture
def source(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["llava-llama"], tmp_path / "source")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "folder")


@pytest.fixture
def refused(vlmq, tmp_path):
    """Run a command that must fail; its one line."""

    def run(*arguments):
        before = {path for path in tmp_path.rglob("*")}
        code, out, err = vlmq(*arguments)
        assert code == 2, err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("vlmq: ")
        assert out == ""
        assert {path for path in tmp_path.rglob("*")} == before
        return lines[0]

    return run


def relist(folder):
    """Bring the manifest's record of the files up to date, so that it is not what is found first."""
    made = manifest.read(folder)
    manifest.write(folder, made.model_copy(update={"files": manifest.describe(folder, made.files)}))


def change(folder, **shapes):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for end, cut in shapes.items():
            if name.endswith(end.replace("__", ".")):
                tensors[name] = cut(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_without_a_config(source, folder, refused, random_samples, tmp_path):
    for place in (source, folder):
        (place / "config.json").unlink()
    assert "has no config.json" in refused("export", source, *RTN, "-o", tmp_path / "out")
    assert "has no config.json" in refused("run", folder, "--image", random_samples[0].image)
    assert "config.json: absent, but vlmq.json lists it" in refused(
        "convert", folder, "--to", "awq", "-o", tmp_path / "o"
    )
    assert "config.json: absent, but vlmq.json lists it" in refused("push", folder, "user/name", "--dry-run")


def wrong_header(folder):
    """A header that says it is longer than the file."""
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def no_json(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"oops"
    path.write_bytes(content)


@pytest.mark.parametrize("fault", [wrong_header, no_json])
def test_a_shard_with_a_wrong_header(fault, source, folder, refused, random_samples, tmp_path):
    for place in (source, folder):
        fault(place)
    relist(folder)
    line = "model.safetensors: not a whole safetensors file"
    assert line in refused("export", source, *RTN, "-o", tmp_path / "out")
    assert line in refused("run", folder, "--image", random_samples[0].image, "--engine", "torch")
    assert line in refused("convert", folder, "--to", "awq", "-o", tmp_path / "out")
    assert line in refused("push", folder, "user/name", "--dry-run")


def test_a_tensor_of_the_wrong_shape(source, folder, refused, random_samples, tmp_path):
    change(source, layers__0__mlp__up_proj__weight=lambda tensor: tensor[:-1])
    line = refused("export", source, *RTN, "-o", tmp_path / "out")
    assert "mlp.up_proj.weight has shape (127, 64) where config.json describes (128, 64); get the" in line
    change(folder, layers__0__mlp__up_proj__weight_packed=lambda tensor: tensor[:, :-1])
    relist(folder)
    for arguments in (
        ("run", folder, "--image", random_samples[0].image, "--engine", "torch"),
        ("convert", folder, "--to", "awq", "-o", tmp_path / "out"),
        ("push", folder, "user/name", "--dry-run"),
    ):
        assert "mlp.up_proj.weight_packed: " in refused(*arguments)


def test_a_dense_tensor_of_the_wrong_shape(folder, refused, random_samples):
    change(folder, input_layernorm__weight=lambda tensor: tensor[:-1])
    relist(folder)
    line = refused("run", folder, "--image", random_samples[0].image, "--engine", "torch")
    assert "input_layernorm.weight has shape (63,) where config.json describes (64,); export the model again" in line


def test_a_manifest_that_disagrees_with_the_files(folder, refused, random_samples, tmp_path):
    made = json.loads((folder / manifest.NAME).read_text())
    name = next(iter(made["tensors"]))
    made["tensors"][name]["bits"] = 8
    (folder / manifest.NAME).write_text(json.dumps(made))
    assert f"{name}.weight_packed: " in refused("push", folder, "user/name", "--dry-run")
    assert f"{name}.weight_packed: " in refused("convert", folder, "--to", "awq", "-o", tmp_path / "out")
    line = refused("run", folder, "--image", random_samples[0].image, "--engine", "torch")
    assert "vlmq.json says" in line
    (folder / manifest.NAME).write_text("{")
    assert "vlmq.json: Invalid JSON" in refused("verify", folder)


@pytest.mark.parametrize("cut", [None, 100])
def test_a_graph_with_missing_external_data(cut, folder, refused, random_samples):
    """Absent, or short: a download that was stopped."""
    (data, *_) = sorted((folder / "onnx").glob("decoder*data"))
    if cut is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:cut])
    line = refused("run", folder, "--image", random_samples[0].image, "--engine", "onnx")
    assert "decoder_model_merged" in line
    assert "onnxruntime cannot load it" in line
    assert f"{data.name}: " in refused("push", folder, "user/name", "--dry-run")


def test_measurements_that_are_no_json(folder, refused):
    (folder / card.REPORT).write_text("{")
    assert "report.json: not JSON" in refused("push", folder, "user/name", "--dry-run")
