import os
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "formats", "exporter", "terminal")


def setuptools():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def listed():
    return set(setuptools()["packages"])


def test_the_listed_packages_are_the_directories_that_hold_modules():
    """An unlisted one would be missing from the wheel without a word."""
    places = {folder: name for name, folder in setuptools()["package-dir"].items()}
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    found = {"vlmq"} | {places.get(folder.as_posix(), ".".join(("vlmq", *folder.parts))) for folder in folders}
    assert listed() == found


def test_no_room_can_shadow_hugging_face_s_package_of_the_same_name():
    """With an __init__.py in kernels/, transformers would take it for Hugging Face's `kernels`."""
    assert not [file for room in ROOMS for file in (ROOT / room).rglob("__init__.py")]


def test_a_wheel_holds_all_that_the_command_needs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("vlmq-*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    assert (site / "optimum" / "commands" / "register" / "vlmq.py").is_file()
    assert (site / "vlmq" / "formats" / "card.md.jinja").is_file()
    code = (
        "import vlmq, vlmq.cli, vlmq.exporter.pipeline\nfrom vlmq.exporter.demo.catalog import CHECKPOINTS\n"
        "print(vlmq.__file__, all((folder / 'model.safetensors').is_file() for folder in CHECKPOINTS.values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(site / "vlmq" / "__init__.py"), "True"]
