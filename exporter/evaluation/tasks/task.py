"""What a task is: where its questions come from, how an answer is scored, and what its table shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.samples import Sample

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.records import Record
    from vlmq.exporter.evaluation.tasks.place import Place


@dataclass(frozen=True)
class Asked:
    """A sample, the rows of the table that it counts in besides `overall`, and the letters it may be answered with."""

    sample: Sample
    groups: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One figure about the whole set; `value` is None where it could not be computed, and `note` says why."""

    name: str
    value: float | None
    note: str = ""
    is_share: bool = False  # in percent


Row = Mapping[str, Any]  # of a data set that `datasets` reads


@dataclass(frozen=True)
class Task:
    """A benchmark.

    read: its official files. row: a row of `datasets`, whose image is put in later; it may raise pydantic's
    ValidationError. score: 0 to 1 for every answered record (captions: their CIDEr). answer_of: what of an answer is
    compared; None where it cannot be told, which is counted and never guessed. more: further figures over the set.
    """

    name: str
    title: str
    read: Callable[[Place, Faults], list[Asked]]
    row: Callable[[Row, str], Asked]
    score: Callable[[Sequence[Record]], list[float]]
    answer_of: Callable[[Record], str | None]
    metric: str = "accuracy"
    scale: float = 100.0  # of the metric, as papers print it
    order: tuple[str, ...] = ()  # of the groups; others follow by name
    more: Callable[[Sequence[Record]], list[Metric]] = lambda records: []
    instruction: str | None = None  # appended to every question
    max_new_tokens: int = 20
    retrieves: bool = False  # images and texts look for each other; nothing is generated

    @property
    def is_share(self) -> bool:
        """Whether a score is right or wrong, or in between, and shown in percent."""
        return self.scale == 100.0


@dataclass
class Faults:
    """Samples that cannot be used: refused at once, or, where the user asked to go on, counted by id."""

    skip: bool
    found: dict[str, str] = field(default_factory=dict)

    def __call__(self, id_: str, line: str) -> None:
        if not self.skip:
            raise VlmqError(line)
        self.found.setdefault(id_, line)


def usable(where: object, asked: Sequence[Asked], faults: Faults) -> list[Asked]:
    """The samples less those without answers, without their image's file, or with the id of an earlier one."""
    kept, seen = [], Counter[str]()
    for one in asked:
        sample = one.sample
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            line = f"{where}: id {sample.id} occurs more than once; give every sample an id of its own"
            faults(f"{sample.id}#{seen[sample.id]}", line)
        elif not sample.answers:
            faults(sample.id, f"{where}: no answers for {sample.id} to be scored by; use a split that has them")
        elif sample.image is not None and not sample.image.is_file():
            faults(sample.id, f"{where}: no image {sample.image} of sample {sample.id}; put the images there")
        else:
            kept.append(one)
    return kept


def with_instruction(asked: Asked, instruction: str | None) -> Asked:
    """The question with a line appended that says how to answer."""
    sample = asked.sample
    if not instruction or sample.text is None:
        return asked
    return replace(asked, sample=replace(sample, text=f"{sample.text}\n{instruction}"))
