"""The tasks by name."""

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.tasks import captions, gqa, retrieval, scienceqa, vizwiz, vqav2
from vlmq.exporter.evaluation.tasks.task import Task

_ALL = (
    *(vqav2.TASK, gqa.TASK, vizwiz.TASK, scienceqa.TASK),
    *(captions.COCO, captions.FLICKR30K, retrieval.COCO, retrieval.FLICKR30K),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_of(name: str) -> Task:
    if name not in TASKS:
        raise VlmqError(f"--task {name}: no such task; choose {', '.join(TASKS)}")
    return TASKS[name]
