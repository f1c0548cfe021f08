"""Greedy tokens of onnxruntime-genai alone: `python ask_genai.py FOLDER REQUESTS`, where it and numpy are installed.

REQUESTS: a JSON file of [{"inputs"}], each an .npz of input_ids (1, n) and pixel_values. Prints lists of new tokens.
"""

import json
import sys

import numpy as np
import onnxruntime_genai as genai

folder, requests = sys.argv[1:]
model = genai.Model(folder)
with open(f"{folder}/genai_config.json") as file:
    image_token = json.load(file)["model"]["image_token_id"]
found = []
with open(requests) as file:
    asked = json.load(file)
for request in asked:
    arrays = np.load(request["inputs"])
    tokens = arrays["input_ids"].astype(np.int32)
    given = genai.NamedTensors()
    given["input_ids"] = tokens
    given["pixel_values"] = arrays["pixel_values"]
    given["num_image_tokens"] = np.array([np.sum(tokens == image_token)], dtype=np.int64)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=tokens.shape[1] + 20)
    generator = genai.Generator(model, parameters)
    generator.set_inputs(given)
    found.append([])
    while not generator.is_done():
        generator.generate_next_token()
        found[-1].append(int(generator.get_next_tokens()[0]))
print(json.dumps(found))
