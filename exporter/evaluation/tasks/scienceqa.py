"""ScienceQA: Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains"; files of scienceqa.github.io.

    problems.json, pid_splits.json, test/<id>/image.png (or images/test/<id>/image.png)

The model chooses a letter. What it says is read as a letter only where it plainly is one; all else is unparsed, counts
as wrong and is counted, never guessed. The rows of the table are the paper's (its table 3): subject, context, grade.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, RootModel, model_validator

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Row, Task
from vlmq.exporter.json_files import parse, parse_keyed, read_text
from vlmq.exporter.samples import Sample

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
SPLIT = "test"
LETTERS = "ABCDEFGH"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GROUPS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")

_END = r"(?=\s*$|[.:;,)]| because\b| since\b)"
_FIRST = re.compile(rf"\(([A-H])\)|([A-H]){_END}")
_SAID = re.compile(rf"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-H]){_END}")
_ANOTHER = re.compile(r"[.)]?\s*(?:,|/|or|and)\s*\(?[A-H]\b")


class Problem(BaseModel):
    question: str
    choices: list[str]
    answer: int
    hint: str = ""
    image: Any = None  # a file's name; in `datasets` the picture
    grade: str = ""
    subject: str = ""

    @model_validator(mode="after")
    def answer_is_a_choice(self) -> "Problem":
        if not 0 <= self.answer < len(self.choices) <= len(LETTERS):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices")
        return self


class Problems(RootModel[dict[str, Problem]]):
    pass


class Splits(RootModel[dict[str, list[str | int]]]):
    pass


def read(place: Place, faults: Faults) -> list[Asked]:
    file = Place(place.path).file("ScienceQA problems", (PROBLEMS,))
    problems = parse_keyed(read_text(file), Problems, file, "name ScienceQA's problems.json", faults).root
    listed = file.with_name(SPLITS)
    splits = parse(read_text(listed), Splits, listed, "put ScienceQA's pid_splits.json there").root
    split = place.split or SPLIT
    if split not in splits:
        raise VlmqError(f"{listed}: no split {split}; choose --split from {', '.join(splits)}")
    asked = []
    for id_ in map(str, splits[split]):
        if id_ in problems:
            asked.append(_asked(id_, problems[id_], _image(file.parent, split, id_, problems[id_])))
        else:
            faults(f"problem-{id_}", f"{listed}: problem {id_} of {split} is not in {PROBLEMS}; repair the files")
    return asked


def _image(folder: Path, split: str, id_: str, problem: Problem) -> Path | None:
    if not problem.image:
        return None
    places = [folder / near / split / id_ / str(problem.image) for near in ("images", "", "../images", "..")]
    return next((path for path in places if path.is_file()), places[0])


def row(row: Row, id_: str) -> Asked:
    return _asked(id_, Problem.model_validate(dict(row)), None)


def _asked(id_: str, problem: Problem, image: Path | None) -> Asked:
    letters = tuple(LETTERS[: len(problem.choices)])
    context = [problem.hint] if problem.hint.strip() else []
    choices = [f"{letter}. {choice}" for letter, choice in zip(letters, problem.choices, strict=True)]
    sample = Sample(
        id=f"problem-{id_}",
        image=image,
        kind="question",
        text="\n".join([*context, problem.question, *choices]),
        answers=(letters[problem.answer],),
    )
    return Asked(sample, _groups(problem), letters)


def _groups(problem: Problem) -> tuple[str, ...]:
    """Subject, context (a text, an image, both, or neither) and grade."""
    grade = re.search(r"\d+", problem.grade)
    has_text, has_image = bool(problem.hint.strip()), problem.image is not None
    held = {
        SUBJECTS.get(problem.subject, ""): True,
        "TXT": has_text,
        "IMG": has_image,
        "NO": not has_text and not has_image,
        "G1-6": grade is not None and int(grade[0]) <= 6,
        "G7-12": grade is not None and int(grade[0]) > 6,
    }
    return tuple(name for name, holds in held.items() if name and holds)


def letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer says: alone, first (`B.`, `(B) a cat`), or after `the answer is`; None for any other.

    None too where it says several, or one that is no choice. "A cat" says no letter.
    """
    text = answer.strip()
    first = _FIRST.match(text)
    if len(text) == 1:
        said = {text.upper()}
    elif first:
        said = set() if _ANOTHER.match(text, first.end()) else {first[1] or first[2]}
    else:
        said = set(_SAID.findall(text))
    found = said.pop() if len(said) == 1 else None
    return found if found in choices else None


def answer_of(record: Record) -> str | None:
    return letter(record.answer or "", record.choices)


def score(records: Sequence[Record]) -> list[float]:
    return [float(answer_of(record) == record.references[0]) for record in records]


TASK = Task(
    name="scienceqa",
    title="ScienceQA",
    read=read,
    row=row,
    score=score,
    answer_of=answer_of,
    order=GROUPS,
    instruction="Answer with the option's letter from the given choices directly.",
)
