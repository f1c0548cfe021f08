"""Does transformers read a folder as a LLaVA? `reload.py INPUTS FOLDER DENSE` prints the answer as JSON.

Yes: every tensor of the model is in the files and none is left over, and it puts out what the dense weights do. It is
run in the environment of the tool that wrote the folder.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from score import original, outputs, put, relative
from transformers import AutoModelForImageTextToText

SAME = 1e-2  # half precision of scales, at most


def main() -> None:
    inputs, folder, dense = map(Path, sys.argv[1:])
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        faults = [f"{len(info[kind])} {kind}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
        expected = original(inputs)
        put(load_file(dense), expected)
        difference = relative(outputs(model.eval(), inputs)[1], outputs(expected, inputs)[1])
        faults += [f"logits differ by {difference:.1e}"] if difference > SAME else []
        print(json.dumps({"reloads": not faults, "why": ", ".join(faults) or f"logits differ by {difference:.1e}"}))
    except Exception as error:  # whatever a loader stumbles over is the answer
        line = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps({"reloads": False, "why": line[:200]}))


if __name__ == "__main__":
    main()
