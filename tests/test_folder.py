"""A folder appears whole or not at all, and its safetensors are what the safetensors library says they are."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from vlmq.formats import folder as folders
from vlmq.formats.errors import FormatError
from vlmq.formats.folder import copy_companions, staged
from vlmq.formats.shards import SafetensorsWriter, headers

MIXED = {  # element sizes in an order that would misalign if the bytes were simply appended
    "a": torch.arange(3, dtype=torch.uint8),
    "b": torch.tensor([1.5, -2.0, 3.0], dtype=torch.float16),
    "c": torch.tensor([[1, 2], [3, 4]], dtype=torch.int64),
    "d": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "e": torch.tensor([7], dtype=torch.int32),
    "f": torch.tensor(2.5, dtype=torch.bfloat16),
    "g": torch.tensor([True, False]),
    "h": torch.empty(0, 4),
    "i": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T,
}


def write(folder: Path, max_shard_bytes: int = 10**9) -> list[Path]:
    folder.mkdir()
    writer = SafetensorsWriter(folder, max_shard_bytes)
    for name, tensor in MIXED.items():
        writer.add({name: tensor})
    return writer.close()


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == MIXED.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in MIXED.items()
    )


def test_the_safetensors_library_reads_what_the_writer_wrote(tmp_path):
    assert write(tmp_path / "out") == [tmp_path / "out/model.safetensors"]
    assert same(load_file(tmp_path / "out/model.safetensors"))
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors"]


def test_every_tensor_lies_at_a_multiple_of_its_element_size(tmp_path):
    content = write(tmp_path / "out")[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in MIXED.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


def test_shards_are_named_and_indexed_as_transformers_expects(tmp_path):
    paths = write(tmp_path / "out", max_shard_bytes=40)
    *shards, index = paths
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [
        f"model-{shard:05}-of-{count:05}.safetensors" for shard in range(1, count + 1)
    ]
    listed = json.loads(index.read_text())
    assert listed["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MIXED.values())
    found = {}
    for path in shards:
        tensors = load_file(path)
        assert all(listed["weight_map"][name] == path.name for name in tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40
        found |= tensors
    assert same(found)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(path.name for path in paths)


def test_equal_tensors_give_equal_bytes(tmp_path):
    first, second = write(tmp_path / "first")[0], write(tmp_path / "second")[0]
    assert first.read_bytes() == second.read_bytes()


def test_headers_tell_dtype_shape_and_bytes_without_reading_tensors(tmp_path):
    write(tmp_path / "out", max_shard_bytes=40)
    found = headers(tmp_path / "out")
    assert {name: (header.dtype, header.shape, header.bytes) for name, header in found.items()} == {
        name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in MIXED.items()
    }


def test_a_truncated_file_is_refused_in_one_line(tmp_path):
    path = write(tmp_path / "out")[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError, match="not a whole safetensors file") as refused:
        headers(tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_a_name_written_twice_is_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path)
    writer.add({"a": torch.zeros(1)})
    with pytest.raises(FormatError, match="a: written twice"):
        writer.add({"a": torch.zeros(1)})


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"a is in one\.safetensors too"):
        headers(tmp_path)


def test_a_finished_folder_appears_under_its_name(tmp_path):
    with staged(tmp_path / "out") as stage:
        (stage / "onnx").mkdir()
        (stage / "onnx/graph").write_text("whole")
        assert not (tmp_path / "out").exists()
        assert stage.name.startswith(".")
        assert stage.parent == tmp_path
    assert (tmp_path / "out/onnx/graph").read_text() == "whole"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [RuntimeError("half way"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_a_failed_run_leaves_nothing(failure, tmp_path):
    with pytest.raises(type(failure)), staged(tmp_path / "out") as stage:  # noqa: PT012
        (stage / "model.safetensors").write_text("half")
        raise failure
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_while_reaching_the_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "sync", fail)
    with pytest.raises(FormatError, match="No space left on device; free some"), staged(tmp_path / "out") as stage:
        (stage / "model.safetensors").write_text("whole")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_target_is_refused_and_left_alone(make, tmp_path):
    make(tmp_path / "out")
    with pytest.raises(FormatError, match="out: exists already; choose another"), staged(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_that_appears_meanwhile_is_refused_and_left_alone(tmp_path):
    with pytest.raises(FormatError, match="appeared during the run"), staged(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(FormatError, match="missing: no such folder; create it"), staged(tmp_path / "missing/out"):
        pytest.fail("the block must not run")


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch):
    def refuse(**where: object) -> None:  # root writes anywhere, so the mode of a folder would prove nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(folders, "TemporaryFile", refuse)
    with (
        pytest.raises(FormatError, match="cannot be written \\(Permission denied\\); choose another"),
        staged(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")


def test_companions_come_along_and_weights_pickles_and_code_do_not(tmp_path):
    source = tiny_folder("llava-llama", tmp_path / "source")
    for name in ("pytorch_model.bin", "modeling_custom.py", "extra.pkl", "model-00001-of-00002.safetensors"):
        (source / name).write_text("no")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    copied = copy_companions(source, tmp_path / "out", {"quant_method": "compressed-tensors"})
    assert sorted(copied) == sorted(os.listdir(tmp_path / "out"))
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= set(copied)
    assert not [name for name in copied if name.endswith((".bin", ".py", ".pkl", ".safetensors"))]


def test_config_is_verbatim_but_for_the_quantization(tmp_path):
    source = tiny_folder("blip2-opt", tmp_path / "source")
    before = json.loads((source / "config.json").read_text()) | {"an_entry_transformers_never_heard_of": [1e-5]}
    (source / "config.json").write_text(json.dumps(before))
    (tmp_path / "out").mkdir()
    copy_companions(source, tmp_path / "out", {"quant_method": "x"})
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == before | {"quantization_config": {"quant_method": "x"}}
    assert list(after) == [*before, "quantization_config"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: absent"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"quantization_config": {}}', "quantized already"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        copy_companions(tmp_path, tmp_path / "out")
