"""The one evaluator: `score.py INPUTS DENSE` prints how far a decoder's weights are from the original, as JSON.

The weights go into the same fp32 LLaVA, which reads the held-out samples. Errors are relative Frobenius norms over all
tokens; `kl` is the mean divergence, in nats, of the next token's distribution.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration


def original(inputs: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(inputs / "checkpoint", dtype=torch.float32).eval()


def put(weights: dict[str, Tensor], model: LlavaForConditionalGeneration) -> None:
    """Give the model a decoder's weights, exactly all of them."""
    decoder = model.model.language_model
    expected = {name for name in decoder.state_dict() if name != "embed_tokens.weight"}
    if set(weights) != expected:
        raise SystemExit(f"not the decoder's weights: {sorted(set(weights) ^ expected)[:4]} ...")
    decoder.load_state_dict(weights, strict=False)


@torch.inference_mode()
def outputs(model: LlavaForConditionalGeneration, inputs: Path) -> tuple[Tensor, Tensor]:
    """Last hidden states (samples, length, width) and logits (samples, length, vocabulary) of the held-out samples."""
    tensors = load_file(inputs / "heldout.safetensors")
    found = model(**tensors, output_hidden_states=True)
    return found.hidden_states[-1].float(), found.logits.float()


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).norm() / reference.norm()).item()


def main() -> None:
    inputs, dense = Path(sys.argv[1]), Path(sys.argv[2])
    model = original(inputs)
    hidden, logits = outputs(model, inputs)
    put(load_file(dense), model)
    found_hidden, found_logits = outputs(model, inputs)
    before, after = logits.log_softmax(-1), found_logits.log_softmax(-1)
    scores = {
        "hidden": relative(found_hidden, hidden),
        "logits": relative(found_logits, logits),
        "kl": (before.exp() * (before - after)).sum(-1).mean().item(),
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
