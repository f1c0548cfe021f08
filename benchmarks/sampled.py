"""Run a command of vlmq, and see fifty times a second where it is: seconds by component, and by what is being done.

    python benchmarks/sampled.py FOUND.json export CHECKPOINT --method awq ...

A thread looks at the stack of the main one. What is done is told by the innermost function that KINDS names; those
that do little else than multiply matrices are MULTIPLYING. Wall time, so that reading and waiting show as well; what a
GPU does is told of the function that waits for it.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

EVERY = 0.02  # seconds
KINDS = {  # the file, the function  ->  what it does
    ("torch/nn/modules/linear.py", "forward"): "running linears",
    ("vlmq/exporter/calibration.py", "forward"): "running linears",  # in bfloat16
    ("transformers/integrations/sdpa_attention.py", "sdpa_attention_forward"): "running attention",
    ("vlmq/exporter/calibration.py", "run"): "the rest of running blocks",
    ("vlmq/exporter/sums.py", "add"): "Gram matrices",
    ("vlmq/exporter/methods/awq.py", "rescale"): "searching scales",
    ("vlmq/exporter/methods/awq.py", "clip"): "searching ranges",
    ("vlmq/exporter/methods/gptq.py", "upper_factor"): "factoring",
    ("vlmq/exporter/methods/gptq.py", "_move"): "moving columns",
    ("vlmq/exporter/methods/gptq.py", "_round_columns"): "rounding columns",
    ("vlmq/exporter/checkpoint.py", "_stored"): "reading",
    ("vlmq/exporter/writing.py", "write_weights"): "packing and writing",
    ("vlmq/formats/manifest.py", "source"): "hashing the source",
    ("importlib/_bootstrap.py", "_find_and_load"): "importing",
    ("<frozen importlib._bootstrap>", "_find_and_load"): "importing",
}
PRODUCTS = ("vlmq/exporter/statistics.py", "row_losses")  # inside a search it is the product, all else is rounding
MULTIPLYING = {"running linears", "running attention", "Gram matrices", "factoring", "moving columns", "products"}


def seen(frame: FrameType | None) -> tuple[str, str]:
    """The component whose block is being quantized, and what is being done."""
    kind, component, products = "", "", False
    while frame is not None:
        code = frame.f_code
        name = code.co_filename.replace("\\", "/")
        for (file, function), what in KINDS.items():
            if not kind and code.co_name == function and name.endswith(file):
                kind = what
        products = products or (not kind and code.co_name == PRODUCTS[1] and name.endswith(PRODUCTS[0]))
        if code.co_name == "_quantize_span" and "block" in frame.f_locals:
            component = frame.f_locals["block"].component
        frame = frame.f_back
    return component or "around", f"{kind}: products" if products else kind or "everything else"


def main() -> None:
    file, arguments = Path(sys.argv[1]), sys.argv[2:]
    counts: Counter[tuple[str, str]] = Counter()
    main_thread, over = threading.get_ident(), threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not over.wait(EVERY):
            now = time.perf_counter()
            counts[seen(sys._current_frames().get(main_thread))] += now - last
            last = now

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    sys.argv = ["vlmq", *arguments]
    from vlmq.cli import main as vlmq

    try:
        vlmq()
    finally:
        over.set()
        watching.join()
        file.write_text(json.dumps(summary(counts) | on_gpu(), indent=1) + "\n")


def on_gpu() -> dict[str, int]:
    """The most memory that torch took of a GPU, in bytes, where it took any."""
    import torch  # after the command, which has imported it by then

    return {"gpu_peak_bytes": torch.cuda.max_memory_reserved()} if torch.cuda.is_initialized() else {}


def summary(counts: dict[tuple[str, str], float]) -> dict[str, object]:
    """Seconds by component and by kind, and the share of them in which matrices were multiplied."""
    components: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for (component, kind), seconds in counts.items():
        components[component] += seconds
        kinds[kind] += seconds
    multiplied = sum(seconds for kind, seconds in kinds.items() if kind.split(": ")[-1] in MULTIPLYING)
    return {
        "seconds_by_component": {name: round(seconds, 1) for name, seconds in components.most_common()},
        "seconds_by_kind": {name: round(seconds, 1) for name, seconds in kinds.most_common()},
        "share_multiplying": round(multiplied / max(sum(kinds.values()), 1e-9), 3),
    }


if __name__ == "__main__":
    main()
