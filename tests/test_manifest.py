"""vlmq.json says what the files hold; any difference between the two is found and named."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from packed import packed_folder
from safetensors.torch import load_file, save_file

from vlmq.formats import manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, to_grid

SITE = "language_model.model.decoder.layers.0.fc1"


def choose(name: str) -> Grid | None:
    if name.startswith("language_model"):
        return Grid(4, 32, symmetric=False)
    return Grid(8, -1) if name.startswith("vision") else None


@pytest.fixture
def exported(tmp_path) -> Path:
    packed_folder("blip2-opt", tmp_path / "out", choose)
    return tmp_path / "out"


def change_tensors(folder: Path, change) -> None:
    """Change the safetensors file and bring the manifest's record of the file up to date, as a bug of ours would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    relist(folder)


def relist(folder: Path) -> None:
    listed = manifest.read(folder)
    manifest.write(folder, listed.model_copy(update={"files": manifest.describe(folder)}))


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as refused:
        manifest.coverage(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_whole_folder_is_covered(exported):
    listed = manifest.coverage(exported)
    assert SITE in listed.tensors
    assert listed == manifest.read(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{SITE}.weight_packed"), f"{SITE}.weight_packed: absent"),
        (lambda tensors: tensors.pop(f"{SITE}.weight_zero_point"), f"{SITE}.weight_zero_point: absent"),
        (lambda tensors: tensors.update({f"{SITE}.weight_scale": torch.zeros(1, 1)}), f"{SITE}.weight_scale: "),
        (
            lambda tensors: tensors.update({f"{SITE}.weight_scale": tensors[f"{SITE}.weight_scale"].float()}),
            "bytes packed",
        ),
        (lambda tensors: tensors.update({f"{SITE}.weight": torch.zeros(2, 2)}), f"{SITE}.weight: stored in full"),
        (
            lambda tensors: tensors.update({"stray.weight_packed": torch.zeros(2, 2)}),
            "stray.weight_packed: packed, but",
        ),
        (
            lambda tensors: tensors.update({"vision_model.encoder.layers.0.mlp.fc1.weight_zero_point": torch.zeros(1)}),
            "weight_zero_point: not expected",
        ),
    ],
)
def test_a_folder_whose_tensors_differ_is_refused(exported, change, message):
    change_tensors(exported, change)
    assert message in refusal(exported)


def test_a_truncated_file_is_refused(exported):
    path = exported / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors: " in refusal(exported)


def test_one_flipped_bit_is_found(exported):
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert "its bytes are not those vlmq.json lists" in refusal(exported)
    assert manifest.coverage(exported, hashes=False)


def test_a_missing_companion_is_found(exported):
    (exported / "tokenizer.json").unlink()
    assert "tokenizer.json: absent" in refusal(exported)


def test_weights_that_are_not_listed_are_found(exported):
    save_file({"a": torch.zeros(1)}, exported / "model-2.safetensors")
    assert "model-2.safetensors: not listed" in refusal(exported)


def test_a_linear_cannot_be_both_quantized_and_kept(exported):
    listed = manifest.read(exported)
    manifest.write(exported, listed.model_copy(update={"kept": {SITE: "by mistake"}}))
    assert "listed as quantized and as kept" in refusal(exported)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "vlmq.json").unlink(), "No such file"),
        (lambda folder: (folder / "vlmq.json").write_text("{"), "Invalid JSON"),
        (lambda folder: edit(folder, surprise=1), "surprise: Extra inputs"),
        (lambda folder: edit(folder, version=99), "version 99; this release"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(exported, break_it, message):
    break_it(exported)
    assert message in refusal(exported)


def edit(folder: Path, **entries) -> None:
    path = folder / "vlmq.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_writing_and_reading_return_the_same_manifest_and_the_same_bytes(exported):
    before = (exported / "vlmq.json").read_bytes()
    listed = manifest.read(exported)
    backwards = listed.model_copy(update={"tensors": dict(reversed(listed.tensors.items()))})
    manifest.write(exported, backwards)
    assert (exported / "vlmq.json").read_bytes() == before
    assert manifest.read(exported) == listed


def test_the_bits_counted_are_the_bytes_on_disk(exported):
    sizes = manifest.sizes(manifest.read(exported))
    tensors = load_file(exported / "model.safetensors")
    packed = {name: tensor for name, tensor in tensors.items() if ".weight_" in name}
    assert sizes.linears == sum(tensor.nbytes for tensor in packed.values())
    shapes = [tensor.tolist() for name, tensor in packed.items() if name.endswith("weight_shape")]
    assert sizes.weights == sum(rows * columns for rows, columns in shapes)
    assert sizes.bits_per_weight == pytest.approx(8 * sizes.linears / sizes.weights)
    assert sizes.linears_ratio == pytest.approx(16 / sizes.bits_per_weight)
    assert sizes.files == (exported / "model.safetensors").stat().st_size
    source = load_file(exported.with_suffix(".source") / "model.safetensors")
    assert sizes.files_fp16 == sum(tensor.nbytes for tensor in source.values())


def test_four_bits_in_groups_of_64_are_3_7_times_smaller_than_fp16():
    """4 bits, a 16-bit scale and a 4-bit zero in 64, and 16 bytes of shape."""
    weight = to_grid(torch.randn(256, 256), Grid(4, 64, symmetric=False))
    record = manifest.record(weight, "rtn")
    assert record.bytes == 256 * 256 // 2 + 256 * 4 * 2 + 256 * 4 // 2 + 16
    assert 2 * 256 * 256 / record.bytes == pytest.approx(3.7, abs=0.05)


def test_a_weight_of_which_some_rows_are_quantized_is_recorded_as_it_is_stored(exported):
    name = "vision_model.encoder.layers.0.self_attn.qkv"
    weight = torch.randn(192, 64).half()

    def store_dense(tensors: dict) -> None:
        for part in [part for part in tensors if part.startswith(f"{name}.weight")]:
            del tensors[part]
        tensors[f"{name}.weight"] = weight

    change_tensors(exported, store_dense)
    listed = manifest.read(exported)
    record = manifest.record_dense(weight, Grid(4, 32), "rtn", (slice(128, 192),))
    assert record.bytes == 192 * 64 * 2
    assert record.sha256 == hashlib.sha256(weight.float().numpy().tobytes()).hexdigest()
    manifest.write(exported, listed.model_copy(update={"tensors": listed.tensors | {name: record}}))
    assert manifest.coverage(exported).tensors[name].rows == ((128, 192),)
    change_tensors(exported, lambda tensors: tensors.update({f"{name}.weight": weight[:64].clone()}))
    assert "qkv.weight: not the dense weight" in refusal(exported)


def test_a_folder_of_graphs_alone_is_covered_by_its_files(exported):
    (exported / "model.safetensors").unlink()
    (exported / "onnx").mkdir()
    (exported / "onnx/decoder.onnx").write_bytes(b"graph")
    listed = manifest.read(exported).model_copy(update={"onnx": {"accuracy_level": 0}})
    manifest.write(exported, listed)
    relist(exported)
    assert manifest.coverage(exported)
    (exported / "onnx/decoder.onnx").write_bytes(b"grape")
    assert "its bytes are not" in refusal(exported)


ODD = Limits(-0.1, 1 / 3)  # no float32 is either


@pytest.fixture
def rounded(tmp_path) -> Path:
    packed_folder("blip2-opt", tmp_path / "out", choose, inputs=Grid(8, TENSOR, symmetric=False), limits=ODD)
    return tmp_path / "out"


def test_the_grid_and_the_limits_of_an_input_come_back_as_they_were(rounded):
    entry = manifest.coverage(rounded).tensors[SITE]
    assert entry.grids == Grids(Grid(4, 32, symmetric=False), Grid(8, TENSOR, symmetric=False), ODD)
    tensors = load_file(rounded / "model.safetensors")
    assert entry.bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[0] == SITE) - (
        tensors[f"{SITE}.bias"].nbytes
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{SITE}.input_scale"), f"{SITE}.input_scale: absent"),
        (lambda tensors: tensors.pop(f"{SITE}.input_zero_point"), f"{SITE}.input_zero_point: absent"),
        (lambda tensors: tensors.update({f"{SITE}.input_scale": torch.ones(1).half()}), f"{SITE}.input_scale: torch"),
        (lambda tensors: tensors.update({f"{SITE}.input_scale": torch.ones(2)}), f"{SITE}.input_scale: torch"),
        (lambda tensors: tensors.update({"lm.input_scale": torch.ones(1)}), "lm.input_scale: packed, but"),
    ],
)
def test_a_folder_whose_input_grids_differ_is_refused(rounded, change, message):
    change_tensors(rounded, change)
    assert message in refusal(rounded)


def test_a_stored_range_is_not_expected_of_an_input_that_has_none(exported):
    change_tensors(exported, lambda tensors: tensors.update({f"{SITE}.input_scale": torch.ones(1)}))
    assert f"{SITE}.input_scale: not expected" in refusal(exported)


def test_a_manifest_written_before_inputs_were_rounded_is_still_read(exported):
    path = exported / "vlmq.json"
    old = json.loads(path.read_text())
    for entry in old["tensors"].values():
        assert entry.pop("inputs") is None
        assert entry.pop("limits") is None
    before = manifest.read(exported)
    path.write_text(json.dumps(old))
    assert manifest.read(exported) == before


def test_a_weight_with_one_scale_is_recorded_as_asked_and_stored_as_rows(tmp_path):
    packed_folder("blip2-opt", tmp_path / "out", lambda name: Grid(8, TENSOR))
    entry = manifest.coverage(tmp_path / "out").tensors[SITE]
    assert (entry.group, entry.grids.weight.group) == (TENSOR, ROW)
    scale = load_file(tmp_path / "out/model.safetensors")[f"{SITE}.weight_scale"]
    assert scale.shape == (entry.shape[0], 1)
    assert len(scale.unique()) == 1


def test_the_digest_is_that_of_the_dequantized_float32_weight():
    weight = to_grid(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), Grid(3, 32))
    assert manifest.digest(weight) == hashlib.sha256(weight.dequantize().numpy().tobytes()).hexdigest()
