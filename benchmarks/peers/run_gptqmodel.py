"""GPTQModel on the Llama alone, image features as embeddings: `run_gptqmodel.py awq|gptq INPUTS OUTPUT`.

It has no LLaVA. Its AWQ takes half precision only.
"""

import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from measured import cost, save_dense, unpack
from safetensors.torch import load_file

CONFIGS = {"gptq": (GPTQConfig, torch.float32), "awq": (AWQConfig, torch.bfloat16)}


def main() -> None:
    method, inputs, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    kind, dtype = CONFIGS[method]
    ids = load_file(inputs / "calibration.safetensors")["language_ids"]
    model = GPTQModel.load(str(inputs / "language"), kind(bits=4, group_size=128, sym=True), dtype=dtype, device="cpu")
    samples = [{"input_ids": sample, "attention_mask": torch.ones_like(sample)} for sample in ids]
    model.quantize(samples, batch_size=len(samples))
    model.save(str(output / "model"))
    cost(output, "gptqmodel")
    save_dense(output, unpack(output / "model", added=1))


if __name__ == "__main__":
    main()
