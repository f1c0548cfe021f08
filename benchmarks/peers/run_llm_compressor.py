"""llm-compressor, AWQ or GPTQ, on LLaVA: `run_llm_compressor.py awq|gptq INPUTS OUTPUT`.

AWQ pins memory whether or not there is a GPU, which a CPU build of torch refuses, so that step is left out. It knows no
LLaVA, and its Llama mapping would match CLIP's q_proj too, so the mapping is given.
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from measured import by_module, cost, load_all, save_dense
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlavaForConditionalGeneration

LANGUAGE = "re:.*language_model.*"
IGNORE = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
MAPPINGS = [
    AWQMapping(f"{LANGUAGE}input_layernorm$", [f"{LANGUAGE}{name}_proj$" for name in "qkv"]),
    AWQMapping(f"{LANGUAGE}v_proj$", [f"{LANGUAGE}o_proj$"]),
    AWQMapping(f"{LANGUAGE}post_attention_layernorm$", [f"{LANGUAGE}gate_proj$", f"{LANGUAGE}up_proj$"]),
    AWQMapping(f"{LANGUAGE}up_proj$", [f"{LANGUAGE}down_proj$"]),
]
GRID = {"targets": ["Linear"], "scheme": "W4A16", "ignore": IGNORE}  # 4 bits, groups of 128, symmetric
RECIPES = {
    "awq": lambda: [AWQModifier(mappings=MAPPINGS), QuantizationModifier(**GRID)],
    "gptq": lambda: [GPTQModifier(**GRID)],
}


def main() -> None:
    method, inputs, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    model = LlavaForConditionalGeneration.from_pretrained(inputs / "checkpoint", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(inputs / "checkpoint")
    tensors = load_file(inputs / "calibration.safetensors")
    tensors.pop("language_ids")
    samples = [{key: value[index] for key, value in tensors.items()} for index in range(len(tensors["input_ids"]))]
    oneshot(
        model=model,
        processor=processor,
        recipe=RECIPES[method](),
        dataset=DataLoader(samples, batch_size=len(samples)),
        sequential_targets=["LlamaDecoderLayer"],
    )
    (scheme,) = {
        module.quantization_scheme.model_dump_json(): module.quantization_scheme
        for module in model.modules()
        if getattr(module, "quantization_scheme", None)
    }.values()
    model.save_pretrained(output / "model", save_compressed=True)
    processor.save_pretrained(output / "model")
    cost(output, "llmcompressor", "compressed-tensors")
    weights = {}
    for module, tensors in by_module(load_all(output / "model")).items():
        if "weight_packed" in tensors:
            tensors = PackedQuantizationCompressor.decompress(tensors, scheme)
        weights |= {f"{module}.weight": tensor for leaf, tensor in tensors.items() if leaf == "weight"}
    save_dense(output, weights)


if __name__ == "__main__":
    main()
