import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.terminal import stopping


@pytest.mark.parametrize(
    "command",
    [
        *("export", "verify", "evaluate", "convert", "push", "run"),
        *("inspect", "plan", "importance", "sweep", "allocate", "recipe", "recipe show"),
    ],
)
def test_help_loads_nothing_that_takes_time(command):
    code = (
        f"import sys; sys.argv = ['vlmq', *'{command}'.split(), '--help']\nfrom vlmq import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('LOADED', sorted({'torch', 'transformers', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: vlmq" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_inspect_needs_no_weights_and_says_what_each_linear_gets(vlmq, tiny_folders, tmp_path):
    shutil.copy(tiny_folders["blip2-opt"] / "config.json", tmp_path)
    code, out, _ = vlmq("inspect", tmp_path, "--group-size", 32, "--vision-bits", 8, "--connector-bits", 16)
    assert code == 0
    assert "self_attn.qkv 192 x 64: awq 8-bit g32" in out
    assert "fc1 128 x 64: awq 4-bit g32" in out
    assert "kept: 16 bits asked for" in out


def test_inspect_as_json_counts_the_bytes_that_an_export_has(vlmq, tiny_folders, tmp_path, random_samples):
    flags = (tiny_folders["llava-qwen2"], "--group-size", 32, "--method", "rtn")
    _, out, _ = vlmq("inspect", *flags, "--json")
    expected = json.loads(out)["after"]
    code, _, err = vlmq("export", *flags, "--format", "safetensors", "--no-verify", "-o", tmp_path / "out")
    assert code == 0, err
    file = tmp_path / "out" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == expected


@pytest.fixture(scope="module")
def exported(tiny_folders, tmp_path_factory):
    """An export by rounding to nearest: safetensors alone, calibrated on nothing."""
    output = tmp_path_factory.mktemp("cli") / "out"
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    return export(Request(str(tiny_folders["blip2-opt"]), output, recipe, formats="safetensors", verify=False)).folder


def bad_inputs(folder, exported, tmp_path, images):
    """name -> (arguments, what the one line must say)"""
    truncated = shutil.copytree(folder, tmp_path / "truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "llama"}')
    lines = tmp_path / "missing.jsonl"
    lines.write_text('{"image": "gone.png", "prompt": "what?"}\n')
    rules = tmp_path / "rules.yaml"
    rules.write_text("group_size: 32\nrules:\n- {match: mlp.gate_proj, bits: 8}\n")
    existing = tmp_path / "existing"
    existing.mkdir()
    picture = next(images.iterdir())
    fine = ("--group-size", 32, "--calibration", images, "--samples", 4, "--no-verify")
    return {
        "no such model": (("export", tmp_path / "nowhere"), "no such folder"),
        "not a VLM": (("export", text), "is not a vision-language model"),
        "pickles": (("export", pickled), "only a pickle"),
        "truncated": (("export", truncated), "not a whole safetensors file"),
        "bits 7": (("export", folder, "--bits", 7), "7 bits; choose one of"),
        "no such method": (("export", folder, "--method", "magic"), "unknown method 'magic'"),
        "group": (("export", folder), "64 columns do not divide into groups of 128"),
        "odd group": (("export", folder, "--group-size", 50), "a group of 50 columns"),
        "inputs of 5 bits": (("export", folder, "--activation-bits", 5), "5 bits for inputs; choose 4, 6, 8"),
        "option without a value": (("export", folder, "--option", "damp"), "--option damp: no value; write KEY=VALUE"),
        "option null": (
            ("export", folder, "--option", "threshold=null"),
            "--option threshold=null: no value; write KEY=VALUE, or take threshold out of the recipe file",
        ),
        "option of nothing": (("export", folder, "--option", "damp="), "--option damp=: no value; write KEY=VALUE"),
        "groups of inputs that are not rounded": (
            ("export", folder, "--activation-bits", "none", "--activation-group", 64),
            "--activation-group 64: --activation-bits none rounds no inputs; leave one of them out",
        ),
        "group in words": (("export", folder, "--group-size", "rows"), "group_size: 'rows'; choose a multiple of 16"),
        "inputs of bits in words": (("export", folder, "--activation-bits", "eight"), "activations.bits: 'eight'; cho"),
        "option no method has": (("export", folder, "--option", "dmap=1"), "options.dmap: unknown key"),
        "recipe for another model": (
            ("recipe", "show", folder, "--recipe", rules),
            "the rule match 'mlp.gate_proj' matches no linear",
        ),
        "levels too fine for bfloat16": (
            ("export", folder, "--activation-bits", 8, "--calibrate-in", "bfloat16"),
            "its input is rounded, which --calibrate-in bfloat16 is too coarse for; leave it at float32",
        ),
        "no samples": (
            ("export", folder, *fine, "--samples", 0),
            "needs at least one to be calibrated",
        ),
        "nothing to verify on": (("verify", exported), "name the samples to verify on"),
        "exists": (("export", folder, *fine, "-o", existing), "exists already"),
        "missing image": (("export", folder, *fine, "--calibration", lines), "gone.png"),
        "no parent": (("export", folder, *fine, "-o", tmp_path / "no" / "such"), "no such folder"),
        "no recipe": (("export", folder, "--recipe", tmp_path / "no.yaml"), "cannot be read"),
        "verify nothing": (("verify", text), "vlmq.json"),
        "run nothing": (("run", tmp_path / "nowhere", "--image", "x.png"), "has no config.json"),
        "run no image": (("run", folder, "--image", tmp_path / "gone.png"), "no such image"),
        "run unpaired": (("run", folder, *["--image", picture] * 2, *["--prompt", "a"] * 3), "do not pair up"),
        "run greedy with top-k": (("run", folder, "--image", picture, "--top-k", 5), "choose a temperature above 0"),
        "run on a provider in torch": (
            ("run", folder, "--image", picture, "--engine", "torch", "--provider", "cuda"),
            "a provider is onnxruntime's",
        ),
    }


BAD = (
    "no such model",
    "not a VLM",
    "pickles",
    "truncated",
    "bits 7",
    "no such method",
    "group",
    "odd group",
    "inputs of 5 bits",
    "option without a value",
    "option null",
    "option of nothing",
    "groups of inputs that are not rounded",
    "group in words",
    "inputs of bits in words",
    "option no method has",
    "recipe for another model",
    "no samples",
    "nothing to verify on",
    "exists",
    "missing image",
    "no parent",
    "no recipe",
    "verify nothing",
    "run nothing",
    "run no image",
    "run unpaired",
    "run greedy with top-k",
    "run on a provider in torch",
)


@pytest.mark.parametrize("which", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    which, vlmq, tiny_folders, exported, tmp_path, random_samples
):
    images = random_samples[0].image.parent
    arguments, message = bad_inputs(tiny_folders["blip2-opt"], exported, tmp_path, images)[which]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = vlmq(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("vlmq: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no place here that even root cannot write to")
def test_an_output_place_that_is_read_only_is_refused(vlmq, tiny_folders):
    flags = ("--method", "rtn", "--group-size", 32, "--no-verify", "-o", "/proc/out")
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *flags)
    assert code == 2
    assert "/proc: cannot be written" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_keeps_what_is_finished_and_goes_on_when_asked_again(
    number, tiny_folders, random_samples, tmp_path
):
    flags = (
        "--group-size",
        "32",
        "--calibration",
        str(random_samples[0].image.parent),
        "--samples",
        "4",
        "--no-verify",
        "--no-gate",
    )
    command = [
        sys.executable,
        "-m",
        "vlmq.cli",
        "export",
        str(tiny_folders["blip2-opt"]),
        *flags,
        "-o",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / ".out.journal" / "state.json").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.splitlines()[-2:] == [
        "vlmq: stopped",
        "vlmq: what is finished is kept; the same command goes on from there",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stop_that_a_library_took_for_a_failure_of_its_own_still_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "_signals", [signal.SIGTERM])
    (tmp_path / ".out.journal").mkdir()
    with pytest.raises(RuntimeError), stopping.kept_to_go_on(tmp_path / "out"):
        raise RuntimeError("a worker died")
    assert capsys.readouterr().err == "vlmq: what is finished is kept; the same command goes on from there\n"


def test_progress_is_told_to_programs_as_events(vlmq, tiny_folders, tmp_path):
    flags = (*PLAIN, "--format", "safetensors", "--json", "-o", tmp_path / "out")
    _, out, err = vlmq("export", tiny_folders["blip2-opt"], *flags)
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert json.loads(out)["folder"] == str(tmp_path / "out")
    done = [event["done"] for event in events]
    assert done == sorted(done)
    assert set(done) == set(range(events[0]["of"] + 1))
    at = {event["at"] for event in events}
    packed = [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith(".weight_packed")]
    assert {name for where in at for name in where.split(", ")} >= {name.rpartition(".")[0] for name in packed}
    assert all(event["what"] == "quantizing" and event["resident"] > 10**7 for event in events)


def test_the_memory_of_an_export_is_told_beside_what_was_planned(vlmq, tiny_folders, tmp_path):
    flags = (*PLAIN, "--format", "safetensors", "--json", "-o", tmp_path / "out")
    memory = json.loads(vlmq("export", tiny_folders["blip2-opt"], *flags)[1])["memory"]
    assert 10**8 < memory["planned"] < 10**10
    assert 10**8 < memory["peak"] < 10**10


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_any_work(device, vlmq, tiny_folders, tmp_path):
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *PLAIN, "--device", device, "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"vlmq: --device {device}: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--max-shard-size", "--activation-memory"])
def test_a_size_that_is_none_is_refused(flag, vlmq, tiny_folders, tmp_path):
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *PLAIN, flag, "much", "-o", tmp_path / "out")
    assert (code, err) == (2, f"vlmq: {flag} much: not a size; write one like 512MiB or 5GB\n")


def test_weights_are_written_in_shards_of_the_size_that_is_asked_for(vlmq, tiny_folders, tmp_path):
    flags = (*PLAIN, "--format", "safetensors", "--max-shard-size", "100kB", "-o", tmp_path / "out")
    code, _, _ = vlmq("export", tiny_folders["blip2-opt"], *flags)
    assert code == 0
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert all(file.stat().st_size < max(100_000, largest) + 20_000 for file in files)


@pytest.mark.parametrize(("drop", "code"), [(0.5, 0), (3.0, 1)])
def test_a_verdict_that_misses_its_threshold_is_exit_code_1_and_says_which(drop, code, vlmq, monkeypatch, tmp_path):
    from dataclasses import replace

    from vlmq.exporter import pipeline
    from vlmq.exporter.evaluation import thresholds
    from vlmq.exporter.evaluation.measure import Memory
    from vlmq.exporter.evaluation.statistics import PairedDifference
    from vlmq.exporter.evaluation.verify import Score, Side, Verdict

    score = Score(98.0, 98.0 - drop, PairedDifference(-drop, -drop - 1, -drop + 1, 100, 50))
    side = Side("a folder", "onnx", 2, {"safetensors": 4, "onnx": 4}, Memory(1, 2, 3), 0.01)
    verdict = Verdict(100, 50, 4, {"overall": score}, 0.9, side, side, thresholds=thresholds.limits(4, {}))
    verdict = replace(verdict, misses=tuple(thresholds.judge(verdict)))
    monkeypatch.setattr(pipeline, "verify_folder", lambda *arguments: (verdict, None))
    found, out, err = vlmq("verify", tmp_path)
    assert found == code
    assert f"{-drop:+.2f}" in out
    assert ("vlmq: max-drop: accuracy lost: 3 points, more than the 2 allowed" in err) == bool(code)


def test_thresholds_are_numbers_by_name_and_max_drop_is_one_of_them(vlmq, monkeypatch, tmp_path):
    from vlmq.exporter import pipeline
    from vlmq.exporter.errors import VlmqError

    def verify_folder(folder, reference, data, thresholds, progress, cache, gate):
        raise VlmqError(f"{sorted(thresholds.items())}, {cache}")

    monkeypatch.setattr(pipeline, "verify_folder", verify_folder)
    flags = ("--threshold", "kl=0.05", "--threshold", "top1=99", "--max-drop", 1, "--cache", "kept")
    assert vlmq("verify", tmp_path, *flags)[2] == "vlmq: [('kl', 0.05), ('max-drop', 1.0), ('top1', 99.0)], kept\n"
    code, _, err = vlmq("verify", tmp_path, "--threshold", "kl")
    assert (code, err) == (2, "vlmq: --threshold kl: no number; write NAME=VALUE, such as kl=0.05\n")


def test_an_export_with_an_unknown_threshold_is_refused_before_any_work(vlmq, tiny_folders, tmp_path):
    flags = ("--threshold", "klx=1", "-o", tmp_path / "out")
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *PLAIN, *flags)
    assert (code, err) == (2, "vlmq: --threshold klx: no such threshold; did you mean kl?\n")
    assert not (tmp_path / "out").exists()


def test_flags_override_the_recipe_file(vlmq, tiny_folders, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 3\ngroup_size: 32\ncomponents:\n  vision: {bits: 8, method: rtn}\n")
    code, out, _ = vlmq("inspect", tiny_folders["blip2-opt"], "--recipe", file, "--bits", 6, "--vision-bits", 5)
    assert code == 0
    assert "self_attn.qkv 192 x 64: rtn 5-bit g32" in out
    assert "fc1 128 x 64: awq 6-bit g32" in out


FLAGS = (
    *("--method", "awq+gptq", "--bits", 3, "--group-size", "row", "--asymmetric", "--qkv", "split"),
    *("--activation-bits", 8, "--activation-group", "tensor", "--rotate", "language", "--rotate", "vision"),
    *("--option", "damp=0.05", "--option", "act_order=false", "--option", "token_weights=modality"),
    *("--indivisible", "shrink", "--vision-bits", 8, "--connector-method", "rtn"),
)
FILE = """
method: awq+gptq
bits: 3
group_size: -1
symmetric: false
qkv: split
activations: {bits: 8, group_size: 0}
rotate: [language, vision]
options: {damp: 0.05, act_order: false, token_weights: modality}
indivisible: shrink
components: {vision: {bits: 8}, connector: {method: rtn}}
"""


def test_flags_make_the_recipe_that_a_file_makes(vlmq, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(FILE)
    code, by_flags, err = vlmq("recipe", "show", *FLAGS)
    assert (code, err) == (0, "")
    assert by_flags == vlmq("recipe", "show", "--recipe", file)[1]


@pytest.mark.parametrize("flags", [(), FLAGS, ("--method", "uniform", "--language-method", "awq")])
def test_recipe_show_prints_a_file_that_reads_back_to_the_same_recipe(flags, vlmq, tmp_path):
    file = tmp_path / "shown.yaml"
    _, shown, _ = vlmq("recipe", "show", *flags)
    file.write_text(shown)
    assert vlmq("recipe", "show", "--recipe", file)[1] == shown


def test_flags_change_single_keys_of_a_file(vlmq, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("activations: {bits: 8, group_size: tensor}\noptions: {damp: 0.05, alpha: 0.5}\n")
    _, out, _ = vlmq("recipe", "show", "--recipe", file, "--activation-bits", 4, "--option", "alpha=search")
    shown = yaml.safe_load(out)
    assert shown["activations"] == {"bits": 4, "group_size": "tensor", "symmetric": True}
    assert (shown["options"]["damp"], shown["options"]["alpha"]) == (0.05, "search")
    _, out, _ = vlmq("recipe", "show", "--recipe", file, "--activation-bits", "none")
    assert yaml.safe_load(out)["activations"] == "none"


def test_recipe_show_checks_the_recipe_against_a_model_from_its_configuration(vlmq, tiny_folders, tmp_path):
    shutil.copy(tiny_folders["blip2-opt"] / "config.json", tmp_path)
    assert vlmq("recipe", "show", tmp_path, "--group-size", 32)[0] == 0
    code, out, err = vlmq("recipe", "show", tmp_path)
    assert (code, out) == (2, "")
    assert "64 columns do not divide into groups of 128" in err


def test_inspect_says_how_inputs_are_rounded(vlmq, tiny_folders):
    flags = ("--method", "rtn", "--group-size", "tensor", "--activation-bits", 8)
    _, out, _ = vlmq("inspect", tiny_folders["blip2-opt"], *flags)
    assert "fc1 128 x 64: rtn 4-bit per tensor, inputs 8-bit per token" in out
    _, out, _ = vlmq("inspect", tiny_folders["blip2-opt"], *flags, "--activation-group", 32)
    assert "inputs 8-bit g32" in out


def test_the_help_names_every_method_and_every_default(vlmq, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = vlmq("export", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert all(method in words for method in METHODS)
    for default in ("[default: awq]", "[default: 4]", "[default: 128]", "[default: fused]"):
        assert default in words


GRID = ("--method", "rtn", "--group-size", 32)
PLAIN = (*GRID, "--no-verify", "--no-gate")


def test_graphs_alone_end_with_their_folder_and_no_sizes_of_what_is_not_there(vlmq, tiny_folders, tmp_path):
    code, out, err = vlmq("export", tiny_folders["llava-llama"], *PLAIN, "--format", "onnx", "-o", tmp_path / "out")
    assert code == 0, err
    assert "weights quantized" in out
    assert "smaller" not in out


@pytest.mark.parametrize(
    ("flags", "name"), [(("--bits", "2", "--vision-bits", "8"), "w2-8"), (("--language-bits", 16), "w4")]
)
def test_a_folder_is_named_after_the_bits_that_are_in_it(flags, name, vlmq, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = vlmq("export", tiny_folders["llava-llama"], *PLAIN, "--format", "safetensors", *flags)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [f"llava-llama-rtn-{name}"]


def test_two_methods_cannot_both_scale_one_input(vlmq, tiny_folders, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "group_size: 32\nactivations: {bits: 8}\nrules:\n- {match: 'language.*k_proj', method: smoothquant}\n"
    )
    code, _, err = vlmq("recipe", "show", tiny_folders["llava-llama"], "--recipe", recipe)
    assert code == 2
    assert "would rescale the input it shares with" in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--rotate", "language"),
        ("--activation-bits", 8, "--activation-group", "tensor", "--calibration", "PICTURES", "--samples", 4),
    ],
)
def test_what_is_inspected_is_what_is_exported(flags, vlmq, tiny_folders, pictures, tmp_path):
    """The head that a rotation unties, and the scale of an input that has one range."""
    folder = tiny_folders["blip2-opt"]
    flags = [pictures if flag == "PICTURES" else flag for flag in flags]
    code, _, err = vlmq("export", folder, *PLAIN, *flags, "--format", "safetensors", "-o", tmp_path / "out")
    assert code == 0, err
    recipe = [flag for flag in flags if flag not in ("--calibration", pictures, "--samples", 4)]
    _, out, _ = vlmq("inspect", folder, *GRID, *recipe, "--json")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads(out)["after"] == sum(tensor.nbytes for tensor in tensors.values())
