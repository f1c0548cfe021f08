"""Greedy tokens of transformers alone: `python ask_transformers.py FOLDER REQUESTS`; vlmq is not imported.

REQUESTS: a JSON file of [{"image", "prompt"}]. Prints a list of lists of new tokens.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, requests = sys.argv[1:]
model, told = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
wrong = {kind: sorted(names)[:3] for kind, names in told.items() if kind.endswith("_keys") and names}
assert not wrong, wrong
compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
if compressor is not None:  # several grids, which are not unpacked as they are loaded: docs/formats.md
    compressor.decompress_model(model)
processor = AutoProcessor.from_pretrained(folder, backend="pil")
found = []
with open(requests) as file:
    asked = json.load(file)
for request in asked:
    image = Image.open(request["image"]).convert("RGB")
    inputs = processor(images=image, text=request["prompt"], return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    found.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
print(json.dumps(found))
