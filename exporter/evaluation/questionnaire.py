"""What a model will be asked: the samples of a task, from wherever `--data` says they are."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.rows import Rows, is_saved
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Task, usable, with_instruction
from vlmq.exporter.samples import draw

DEMO = "demo"


@dataclass(frozen=True)
class Questionnaire:
    """The samples in their order, and those that cannot be asked, by id with the reason."""

    source: str
    asked: tuple[Asked, ...]
    faults: dict[str, str]

    def digest(self) -> str:
        """SHA-256 of everything that is asked and compared with."""
        said = [
            repr((one.sample.id, one.sample.kind, one.sample.text, one.sample.answers, one.groups, one.choices))
            for one in self.asked
        ]
        return sha256("\n".join([*said, *sorted(self.faults)]).encode()).hexdigest()


def gather(
    task: Task,
    data: str,
    split: str | None = None,
    limit: int | None = None,
    instruction: str | None = None,
    with_image: bool = False,
    skip_bad: bool = False,
) -> Questionnaire:
    """The samples of `data`, `limit` of them drawn by a hash of their ids, so that fewer are the beginning of more.

    with_image: leave out questions about text alone. VlmqError for the first sample that is bad, unless `skip_bad`,
    and where none is left.
    """
    faults = Faults(skip_bad)
    place = _place(data, split)
    rows = None if place else Rows(data, split)
    found = rows.asked(task, faults) if rows else task.read(place, faults) if place else []
    if with_image:
        found = [one for one in found if one.sample.image is not None]
    if limit is not None:
        kept = {id(sample) for sample in draw([one.sample for one in found], limit)} if found else set()
        found = [one for one in found if id(one.sample) in kept]
    if rows:
        found = rows.with_images(found)
    source = rows.source if rows else str(data)
    asked = usable(source, found, faults)
    if not asked:
        first = next(iter(faults.found.values()), "")
        bad = f"; {len(faults.found)} are bad, the first: {first}" if first else ""
        raise VlmqError(f"{source}: no samples of {task.title} to ask about{bad}; check --data and --split")
    said = task.instruction if instruction is None else instruction
    return Questionnaire(source, tuple(with_instruction(one, said) for one in asked), faults.found)


def _place(data: str, split: str | None) -> Place | None:
    """Official files; None for a data set that `datasets` reads."""
    if data == DEMO:
        from vlmq.exporter.data import demo_folder

        return Place(demo_folder("evaluation"), split)
    path = Path(data).expanduser()
    if is_saved(path) or (not path.exists() and not path.is_absolute() and data.count("/") == 1):
        return None
    if not path.exists():
        raise VlmqError(f"{data}: no such file or folder; check --data")
    return Place(path, split)


def relative(one: Asked, data: str) -> str | None:
    """The image's name as results keep it: relative to the data where it lies there."""
    image = one.sample.image
    if image is None:
        return None
    home = Path(data).expanduser()
    home = home if home.is_dir() else home.parent
    return image.relative_to(home).as_posix() if image.is_relative_to(home) else image.name
