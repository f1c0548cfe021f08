"""auto-round on LLaVA: `run_auto_round.py signround INPUTS OUTPUT`.

A block is tuned by 20 steps of signed gradients, not the default 200, which would take hours.
It quantizes the language model's blocks and leaves the rest, which is what its defaults do with a LLaVA.
"""

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from measured import cost, save_dense, unpack
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

STEPS = 20
BATCH = 8


def main() -> None:
    inputs, output = Path(sys.argv[2]), Path(sys.argv[3])
    model = LlavaForConditionalGeneration.from_pretrained(inputs / "checkpoint", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(inputs / "checkpoint")
    tensors = load_file(inputs / "calibration.safetensors")
    tensors.pop("language_ids")
    samples = [{key: value[index] for key, value in tensors.items()} for index in range(len(tensors["input_ids"]))]
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(inputs / "checkpoint"),
        processor=processor,
        image_processor=processor.image_processor,
        scheme="W4A16",  # 4 bits, groups of 128, symmetric
        iters=STEPS,
        nsamples=len(samples),
        seqlen=tensors["input_ids"].shape[1],
        batch_size=BATCH,
        dataset=DataLoader(samples, batch_size=BATCH),
        device_map="cpu",
    )
    rounding.quantize_and_save(output_dir=str(output / "written"), format="auto_round")
    (folder,) = (output / "written").iterdir()  # named for its checkpoint and grid
    folder.rename(output / "model")
    cost(output, "auto-round")
    save_dense(output, unpack(output / "model", added=1))


if __name__ == "__main__":
    main()
