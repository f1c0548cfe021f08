"""optimum-cli, where it is installed, knows vlmq as one of its exports; where it is not, nothing seems to be."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmq.formats import manifest

MODULE = Path(__file__).parent.parent / "exporter" / "optimum_cli" / "vlmq.py"
INSTALLED = importlib.util.find_spec("optimum.subpackages") if importlib.util.find_spec("optimum") else None
needs_optimum = pytest.mark.skipif(INSTALLED is None, reason="optimum is not installed: pip install 'vlmq[optimum]'")


@pytest.fixture
def optimum_cli(tmp_path):
    """The real optimum-cli beside vlmq's module: as it is installed, or laid out so: (exit code, stdout, stderr)."""
    if importlib.util.find_spec("optimum.commands.register.vlmq") is None:
        place = tmp_path / "site" / "optimum" / "commands" / "register"
        place.mkdir(parents=True)
        shutil.copy(MODULE, place)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
        )
        return done.returncode, done.stdout, done.stderr

    return run


@needs_optimum
def test_optimum_cli_lists_vlmq_among_its_exports(optimum_cli):
    code, out, err = optimum_cli("export", "--help")
    assert code == 0, err
    assert "vlmq" in out
    code, out, err = optimum_cli("export", "vlmq", "--help")
    assert code == 0, err
    assert "--activation-bits" in out


@needs_optimum
def test_optimum_cli_exports_as_vlmq_does_and_hands_its_exit_code_back(optimum_cli, tiny_folders, tmp_path):
    flags = ("--method", "rtn", "--group-size", 32, "--format", "safetensors", "--no-verify", "--no-gate")
    code, out, err = optimum_cli("export", "vlmq", tiny_folders["llava-qwen2"], *flags, "-o", "out")
    assert code == 0, err
    assert "weights quantized" in out
    assert manifest.coverage(tmp_path / "out").family == "llava"
    code, _, err = optimum_cli("export", "vlmq", "./nothing", *flags)
    assert code == 2
    assert "vlmq: ./nothing: no such folder" in err


def test_without_optimum_the_module_does_not_make_transformers_think_it_is_there(tmp_path):
    """A namespace of that name, and no distribution: what a wheel of vlmq alone leaves behind."""
    place = tmp_path / "optimum" / "commands" / "register"
    place.mkdir(parents=True)
    shutil.copy(MODULE, place)
    code = "from transformers.utils import is_optimum_available\nprint(is_optimum_available())"
    if INSTALLED is not None:
        pytest.skip("optimum is installed, so that it is there")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False"]
