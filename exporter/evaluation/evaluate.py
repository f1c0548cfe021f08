"""One model on one task: asked batch by batch, every answer on the disk as it comes, scored at the end.

The engines are those that `vlmq run` and `vlmq verify` use; answers are greedy. A run that was ended, however it was,
goes on behind its last whole batch and ends in the same file: batches depend on the samples alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

import vlmq
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import records as files
from vlmq.exporter.evaluation.answers import batches as batches_of
from vlmq.exporter.evaluation.questionnaire import Questionnaire, gather, relative
from vlmq.exporter.evaluation.records import Header, Journal, Record, Results
from vlmq.exporter.evaluation.summary import scored
from vlmq.exporter.evaluation.tasks.registry import task_of
from vlmq.exporter.evaluation.tasks.task import Asked, Task
from vlmq.exporter.images import open_image
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.runtime import Engine, OnnxVlm, TorchVlm, engine_of, open_vlm
from vlmq.exporter.samples import IMAGE_MARK, Templates, prompt_of

RETRIEVED = 16  # images, or texts, in a batch of a retrieval model


@dataclass(frozen=True)
class Request:
    """What `vlmq evaluate` was asked for; None is for the task, or the folder, to choose."""

    model: str
    task: str
    data: str
    out: Path
    split: str | None = None
    limit: int | None = None
    engine: Engine | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    instruction: str | None = None
    with_image: bool = False
    skip_bad: bool = False
    rerank: int = 0  # in retrieval: how many of the most similar the matching head looks at
    fresh: bool = False


def evaluate(request: Request, progress: Progress = silent) -> Results:
    """Answers and scores of every sample, which `request.out` holds too.

    VlmqError for data that cannot be used, a model that cannot be run, and a file with answers of another run.
    """
    task = task_of(request.task)
    folder = folder_of(request.model, task)
    engine: Engine = "torch" if task.retrieves else request.engine or engine_of(folder)
    _refuse_what_does_not_apply(request, task)
    asking = gather(
        task,
        request.data,
        request.split,
        request.limit,
        request.instruction,
        request.with_image,
        request.skip_bad,
    )
    header = _header(request, task, folder, engine, asking)
    faults = [Record(id=id_, failed=line) for id_, line in asking.faults.items()]
    with _alone(request.out):
        plan = _batches(asking.asked, header.batch_size)
        journal = Journal(request.out, header, [[one.sample.id for one in batch] for batch in plan], request.fresh)
        if task.retrieves and not journal.finished:
            found = _retrieved(request, folder, asking, header, progress)
            files.finish(request.out, header, scored(task, [*found, *faults]))
        elif not journal.finished:
            _answer(request, folder, engine, plan, journal, header, progress)
            found = [journal.done[one.sample.id] for one in asking.asked]
            files.finish(request.out, header, scored(task, [*found, *faults]))
    return files.read(request.out)


def folder_of(model: str, task: Task) -> Path:
    """The folder of an export, a checkpoint, a demo by its name, or a model of the Hub."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if task.retrieves:  # not a family that vlmq exports
        raise VlmqError(f"{model}: no config.json there; name the folder of a Blip2ForImageTextRetrieval checkpoint")
    from vlmq.exporter.checkpoint import open_checkpoint

    return open_checkpoint(model).folder


def _refuse_what_does_not_apply(request: Request, task: Task) -> None:
    """A flag that would change nothing is a misunderstanding."""
    asking = (request.instruction, request.max_new_tokens, request.engine if request.engine == "onnx" else None)
    if task.retrieves and any(value is not None for value in asking):
        raise VlmqError(
            f"--task {task.name}: nothing is generated; leave out --instruction, --max-new-tokens, --engine"
        )
    if request.rerank and not task.retrieves:
        raise VlmqError(f"--rerank {request.rerank}: {task.name} retrieves nothing; leave it out")


def _header(request: Request, task: Task, folder: Path, engine: Engine, asking: Questionnaire) -> Header:
    from transformers import AutoConfig

    from vlmq.exporter.evaluation.answers import BATCH
    from vlmq.exporter.evaluation.worker import fitting

    batch_size = request.batch_size or RETRIEVED
    if not request.batch_size and not task.retrieves:
        batch_size = fitting(AutoConfig.from_pretrained(folder, local_files_only=True), BATCH)
    return Header(
        task=task.name,
        data=asking.source,
        model=str(request.model),
        weights=_weights(folder, engine),
        engine=engine,
        samples=len(asking.faults)
        + sum(1 + (len(one.sample.answers) if task.retrieves else 0) for one in asking.asked),
        samples_sha256=asking.digest(),
        batch_size=batch_size,
        max_new_tokens=request.max_new_tokens or task.max_new_tokens,
        rerank=request.rerank,
        versions={"vlmq": vlmq.__version__, **_versions("transformers", *_PACKAGES[engine])},
    )


_PACKAGES: dict[Engine, tuple[str, ...]] = {"torch": ("torch",), "onnx": ("onnxruntime-gpu", "onnxruntime")}


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime comes in two packages, of which one is installed
            continue
    return found


def _weights(folder: Path, engine: Engine) -> str:
    """SHA-256 over all files that answers depend on: weights or graphs, configuration, tokenizer, image processor."""
    read = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja")]
    read += (folder / "onnx").rglob("*") if engine == "onnx" else folder.glob("*.safetensors")
    total = sha256()
    for path in sorted(path for path in read if path.is_file() and path.name != "report.json"):
        total.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _batches(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Batches of samples with an image, then of those without: no batch has both."""
    made = []
    for part in ([one for one in asked if one.sample.image], [one for one in asked if not one.sample.image]):
        samples = [one.sample for one in part]
        prompts = [sample.text or "" for sample in samples]
        made += [[part[place] for place in places] for places in batches_of(samples, prompts, size)]
    return made


def _retrieved(
    request: Request, folder: Path, asking: Questionnaire, header: Header, progress: Progress
) -> list[Record]:
    from vlmq.exporter.evaluation.retrieve import Shelf, retrieve
    from vlmq.exporter.evaluation.retriever import open_retriever

    shelf = Shelf.beside(request.out, header.model_dump_json(exclude={"rerank"}))
    found = retrieve(
        open_retriever(folder),
        asking.asked,
        [relative(one, request.data) for one in asking.asked],
        header.batch_size,
        request.rerank,
        request.skip_bad,
        shelf,
        progress,
    )
    shelf.remove()
    return found


def _answer(
    request: Request,
    folder: Path,
    engine: Engine,
    plan: Sequence[Sequence[Asked]],
    journal: Journal,
    header: Header,
    progress: Progress,
) -> None:
    """Ask what is not answered yet."""
    from transformers import AutoConfig

    from vlmq.exporter.families import family_of

    of = sum(map(len, plan))
    progress(header.task, len(journal.done), of)
    left = [batch for batch in plan if batch[0].sample.id not in journal.done]
    if not left:
        return
    family = family_of(AutoConfig.from_pretrained(folder, local_files_only=True))
    alone = next((batch[0] for batch in left if batch[0].sample.image is None), None)
    if alone and IMAGE_MARK not in family.question:
        raise VlmqError(
            f"{header.data}: {alone.sample.id} has no image, and {family.name} reads no prompt without one; "
            "leave such questions out with --with-image"
        )
    vlm = open_vlm(folder, engine)
    for batch in left:
        journal.add(_answered(vlm, batch, family, header.max_new_tokens, request))
        progress(header.task, len(journal.done), of)


def _answered(
    vlm: OnnxVlm | TorchVlm, batch: Sequence[Asked], family: Templates, max_new_tokens: int, request: Request
) -> list[Record]:
    """The records of one batch; samples whose image cannot be decoded fail, or stop the run."""
    images, failed = {}, {}
    for image in dict.fromkeys(one.sample.image for one in batch if one.sample.image):
        try:
            images[image] = open_image(image)
        except VlmqError as fault:
            failed[image] = str(fault)
            if not request.skip_bad:
                first = next(one.sample.id for one in batch if one.sample.image == image)
                raise VlmqError(f"sample {first}: {fault}, or pass --skip-bad to count it as failed") from None
    asked = [one for one in batch if one.sample.image not in failed]
    answers = {}
    if asked:
        shown = [images[one.sample.image] for one in asked if one.sample.image]
        prompts = [prompt_of(one.sample, family) for one in asked]
        said = vlm.generate(shown, prompts, max_new_tokens=max_new_tokens)
        answers = {one.sample.id: answer for one, answer in zip(asked, said, strict=True)}
    return [
        Record(
            id=one.sample.id,
            image=relative(one, request.data),
            question=one.sample.text,
            references=one.sample.answers,
            groups=one.groups,
            choices=one.choices,
            answer=answers[one.sample.id].text if one.sample.id in answers else None,
            tokens=tuple(answers[one.sample.id].tokens) if one.sample.id in answers else (),
            failed=None if one.sample.id in answers else failed.get(one.sample.image or Path()),
        )
        for one in batch
    ]


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Held while a run writes to `out`; VlmqError where another does."""
    if not out.parent.is_dir():
        raise VlmqError(f"{out}: no folder {out.parent}; create it, or choose another --out")
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VlmqError(f"{out}: another run is writing it; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
