"""The folder that an export becomes: whole or not at all, with the files that stay as they were beside the weights."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from vlmq.formats.errors import FormatError

# What a reader needs beside the weights. Weights, pickles and Python code are never among them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


def refuse_place(final: Path) -> None:
    """FormatError where `final` exists, or where its parent is missing or cannot be written."""
    parent = Path(os.path.abspath(final)).parent
    if os.path.lexists(final):
        raise FormatError(f"{final}: exists already; choose another --output or remove it")
    if not parent.is_dir():
        raise FormatError(f"{parent}: no such folder; create it or choose another --output")
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise FormatError(f"{parent}: cannot be written ({error.strerror}); choose another --output") from None


@contextmanager
def full_disk_in_words(folder: Path) -> Iterator[None]:
    """FormatError where writing in a folder fails for want of room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FormatError(f"{folder}: {error.strerror}; free some or choose another --output") from None
        raise


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final` to write in, renamed to `final` when the block ends well.

    On any other end, Ctrl-C included, it is removed and nothing has appeared under the final name. FormatError as
    `refuse_place` has it.
    """
    final = Path(os.path.abspath(final))
    refuse_place(final)
    stage = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    with full_disk_in_words(final.parent):
        stage.mkdir()
    try:
        with full_disk_in_words(final.parent):
            yield stage
            _to_disk(stage)
        if os.path.lexists(final):  # made by someone else meanwhile: a rename would replace an empty folder
            raise FormatError(f"{final}: appeared during the run; choose another --output")
        stage.rename(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already when all went well
    sync(final.parent)


def companions(source: Path) -> list[str]:
    """The names of the COMPANIONS that a folder has."""
    return [str(path.relative_to(source)) for pattern in COMPANIONS for path in sorted(source.glob(pattern))]


def copy_companions(
    source: Path, target: Path, quantization_config: Mapping | None = None, changes: Mapping | None = None
) -> list[str]:
    """Copy config.json (every value as it was, `quantization_config` added) and COMPANIONS; the names copied.

    changes: entries of config.json that the weights ask for, such as {"text_config": {"tie_word_embeddings": False}};
    what lies beside them, at every depth, stays.

    config.json is not read and written back by transformers, which drops and renames entries. FormatError where
    it is absent, is no JSON object, or names a quantization already.
    """
    config = config_of(source, changes)
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copied = ["config.json"]
    for name in companions(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)  # the contents: a Hub cache holds links
        copied.append(name)
    return copied


def config_of(source: Path, changes: Mapping | None = None) -> dict:
    """What config.json of an export of `source` says, but for `quantization_config`; errors as above."""
    return _changed(_read_config(source / "config.json"), changes or {})


def _changed(config: Mapping, changes: Mapping) -> dict:
    nested = {
        name: _changed(config.get(name, {}), value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return {**config, **nested}


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: absent; name the folder of a transformers model") from None
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a JSON object; fetch it again")
    if "quantization_config" in config:
        raise FormatError(f"{path}: the model is quantized already; start from its 16-bit original")
    return config


def _to_disk(folder: Path) -> None:
    """fsync every file and folder: after a power cut a renamed folder must not hold empty files."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
