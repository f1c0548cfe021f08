"""Pushing a folder to the Hugging Face Hub: whole, checked there, or refused in one line.

Uploading is huggingface_hub's work, which leaves out what the Hub has already: a push that was stopped goes on when it
is given again. What is theirs to tell, the files of the finished commit, is compared with what lies here.
"""

import glob
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from vlmq.formats import card, card_plot, manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.manifest import Manifest

OWN = (manifest.NAME, card.NAME, card.REPORT, card.RELEASE, card_plot.NAME, "report.html")  # beside the listed files
# of the HTTP library that this release of huggingface_hub uses
NetworkError: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class Pushed:
    """What is, or with `dry_run` would be, on the Hub: names of files and their bytes; `left` are not pushed."""

    repository: str
    files: dict[str, int]
    left: tuple[str, ...]
    commit: str | None = None
    url: str | None = None


def push(
    folder: Path,
    repository: str,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    allow_unverified: bool = False,
    base_model: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Pushed:
    """Push an export to `user/name`, made where it is not there, as one commit on the branch `revision`.

    The card is written anew with the repository's name. base_model: the Hub's name of the source, where that was a
    folder. FormatError for a folder that is not as its manifest says; for one that was not verified, or failed, unless
    `allow_unverified`; and where the Hub refuses, cannot be reached, or has other bytes than were sent.
    """
    _refuse_name(repository)
    made = manifest.coverage(folder)
    faults = unverified(folder, made)
    if faults and not allow_unverified:
        raise FormatError(f"{folder}: {faults[0]}, or pass --allow-unverified; the card will say so")
    if dry_run:
        return _list(folder, repository, made)
    card.write(folder, repository, base_model)
    pushed = _list(folder, repository, made)
    progress("pushing", 0, 1)
    try:
        api = HfApi(library_name="vlmq", library_version=made.vlmq)
        api.whoami()
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in pushed.files],
            commit_message=f"vlmq {made.vlmq}: {len(made.tensors)} linears quantized",
            revision=revision,
        )
        there = {
            entry.path: entry
            for entry in api.list_repo_tree(repository, recursive=True, revision=done.oid)
            if isinstance(entry, RepoFile)
        }
    except (OSError, ValueError, RuntimeError, NetworkError) as error:
        raise FormatError(f"{repository}: {in_words(error)}") from error
    _compare(folder, repository, pushed.files, there)
    progress("pushing", 1, 1)
    return Pushed(repository, pushed.files, pushed.left, done.oid, str(url))


def _refuse_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise FormatError(f"{repository}: not a repository's name; write user/name") from None
    if repository.count("/") != 1:
        raise FormatError(f"{repository}: whose? write user/name")


def unverified(folder: Path, made: Manifest) -> list[str]:
    """Why an export is not known to be good, each with its remedy; none: it was verified, and loaded elsewhere."""
    report, release = card.read_json(folder / card.REPORT), card.read_json(folder / card.RELEASE)
    again = f"vlmq verify {folder}"
    found = []
    if not report:
        found.append(f"was not verified; run {again}")
    elif report.get("ok") is not True:
        miss = next(iter(report.get("misses", ())), "it does not answer as the reference")
        found.append(f"failed its verification ({miss}); export it otherwise")
    if not any(name.endswith(".safetensors") for name in made.files):
        return found
    if not release or release.get("manifest_sha256") != manifest.identity(folder):
        found.append(f"was not loaded with transformers; run {again}")
    elif release.get("ok") is not True:
        miss = next(iter(release.get("misses", ())), "transformers reads it otherwise")
        found.append(f"failed the release gate ({miss}); export it otherwise")
    return found


def _list(folder: Path, repository: str, made: Manifest) -> Pushed:
    names = sorted({*made.files, *(name for name in OWN if (folder / name).is_file())})
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    sizes = {name: (folder / name).stat().st_size for name in names}
    return Pushed(repository, sizes, tuple(sorted(there - set(names))))


def _compare(folder: Path, repository: str, files: Mapping[str, int], there: Mapping[str, RepoFile]) -> None:
    """FormatError for the first file that the Hub does not have as it lies here."""
    for name, size in files.items():
        found = there.get(name)
        if found is None:
            raise FormatError(f"{repository}: the Hub lacks {name}; the same command goes on from there")
        if found.size != size or not _same(folder / name, found):
            raise FormatError(f"{repository}: the Hub has other bytes of {name} than were sent; run the same command")


def _same(path: Path, found: RepoFile) -> bool:
    """Large files are known by their sha256, others by the name that git has for their bytes."""
    if found.lfs is not None:
        return found.lfs.sha256 == manifest.file_sha256(path)
    content = path.read_bytes()
    return found.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_words(error: BaseException) -> str:
    """What went wrong and the remedy, without the name of the repository, in one line."""
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # "Error while uploading ..."
        cause = cause.__cause__
    if isinstance(cause, LocalTokenNotFoundError):
        return "no token here; log in with `hf auth login`"
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(cause, RevisionNotFoundError):
        return "has no such revision; name a branch"
    if isinstance(cause, HfHubHTTPError):
        return _status(cause.response.status_code, cause.server_message)
    if isinstance(cause, NetworkError | ConnectionError):
        return (
            f"the Hub cannot be reached, or dropped the connection ({type(cause).__name__}); the same command goes on"
        )
    return f"{' '.join(str(cause).split())}; the same command goes on"


def _status(code: int, message: str | None) -> str:
    said = f" ({' '.join(message.split())})" if message else ""
    if code == 401:
        return f"the Hub does not know this token{said}; log in with `hf auth login`"
    if code == 403:
        return f"this token may not write there{said}; take one with write access"
    if code == 404:
        return f"no such repository, or this token may not see it{said}; check the name and `hf auth whoami`"
    return f"the Hub answers {code}{said}; the same command goes on when it is well again"
