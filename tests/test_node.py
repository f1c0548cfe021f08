"""transformers.js loads an exported folder as it is, and says what our runtime says."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.data import demo_folder
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import OnnxVlm
from vlmq.exporter.samples import prompt_of
from vlmq.exporter.sources import read

NODE = Path(__file__).parent / "node"
QUESTIONS = 12

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed"),
    pytest.mark.skipif(
        not (NODE / "node_modules").is_dir(), reason="run `npm install --ignore-scripts` in tests/node first"
    ),
]


@pytest.mark.parametrize("name", ["llava-mini", "blip2-mini"])
def test_transformers_js_gives_the_tokens_of_our_runtime(name, tmp_path):
    folder = tmp_path / "out"
    recipe = make_recipe({"method": "rtn", "group_size": 64})
    export(Request(name, folder, recipe, formats="onnx", verify=False, gate=False))
    family = open_checkpoint(name).family
    samples = read(demo_folder("evaluation"), None).samples[: 40 * QUESTIONS : 40]
    requests = [{"image": str(sample.image), "prompt": prompt_of(sample, family)} for sample in samples]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = ["node", str(NODE / "ask.mjs"), str(folder), str(tmp_path / "requests.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    vlm = OnnxVlm(folder)
    expected = [
        vlm.generate([Image.open(request["image"]).convert("RGB")], [request["prompt"]], 20)[0].tokens
        for request in requests
    ]
    found = [tokens[:-1] if tokens[-1] in vlm.stop else tokens for tokens in json.loads(done.stdout)]
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) > QUESTIONS // 3  # they do depend on what is asked
