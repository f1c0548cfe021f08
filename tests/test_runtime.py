"""Answers from onnxruntime are the answers of PyTorch, and those are transformers' own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import exported
from pictures import QUESTIONS, pictures, prompts
from tiny import VARIANTS, processor
from transformers import AutoProcessor

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.inference.sessions import Continuation
from vlmq.exporter.runtime import GREEDY, OnnxVlm, Sampling, TorchVlm

STEPS = 10


@pytest.fixture(scope="module", params=VARIANTS)
def models(request):
    """(variant, the graphs, packed linears, dense linears of the same weights)"""
    made = exported(request.param)
    assistant = AutoProcessor.from_pretrained(made.folder)
    graphs = OnnxVlm(made.folder, threads=1)
    return request.param, graphs, TorchVlm(made.packed, assistant), TorchVlm(made.dense, assistant)


def test_onnxruntime_answers_with_the_tokens_of_the_fake_quantized_model(models):
    variant, graphs, packed, dense = models
    asked = pictures(), prompts(variant), STEPS
    expected = dense.generate(*asked)
    assert graphs.generate(*asked) == expected
    assert packed.generate(*asked) == expected
    assert len({tuple(answer.tokens) for answer in expected}) > 1  # they do depend on what is asked


def test_an_answer_does_not_depend_on_what_shares_its_batch(models):
    variant, graphs, packed, _ = models
    together = graphs.generate(pictures(), prompts(variant), STEPS)
    for answer, picture, prompt in zip(together, pictures(), prompts(variant), strict=True):
        assert graphs.generate([picture], [prompt], STEPS) == [answer]
        assert packed.generate([picture], [prompt], STEPS) == [answer]


def test_image_features_and_logits_agree_to_float32_rounding(models):
    variant, graphs, _, dense = models
    np.testing.assert_allclose(graphs.image_features(pictures()), dense.image_features(pictures()).numpy(), atol=2e-5)
    np.testing.assert_allclose(
        graphs.next_logits(pictures(), prompts(variant)), dense.next_logits(pictures(), prompts(variant)), atol=2e-5
    )


class Counting:
    """A session that notes how many rows it is given."""

    def __init__(self, session):
        self.session, self.given = session, []

    def get_inputs(self):
        return self.session.get_inputs()

    def run(self, names, fed):
        self.given.extend(len(value) for value in fed.values())
        return self.session.run(names, fed)


def test_questions_about_one_picture_look_at_it_once_and_are_answered_as_if_they_had_not(models, monkeypatch):
    variant, graphs, packed, _ = models
    one, other = pictures()[:2]
    shown = [one, other, one, one, other]
    asked = [prompts(variant)[place % len(QUESTIONS)] for place in range(len(shown))]
    copies = [picture.copy() for picture in shown]
    session = Counting(graphs.vision)
    monkeypatch.setattr(graphs, "vision", session)
    given = []
    hook = packed.tower.embeddings.register_forward_pre_hook(lambda _, args: given.append(len(args[0])))
    for engine, seen in ((graphs, session.given), (packed, given)):
        answers = engine.generate(shown, asked, STEPS)
        logits = engine.next_logits(shown, asked)
        assert seen == [2, 2]
        assert engine.generate(copies, asked, STEPS) == answers
        np.testing.assert_allclose(engine.next_logits(copies, asked), logits, atol=2e-5)
        assert seen == [2, 2, 5, 5]
        said = [answer.tokens for answer in answers]
        forced = engine.forced_logits(shown, asked, said)
        for row, found in zip(engine.forced_logits(copies, asked, said), forced, strict=True):
            np.testing.assert_allclose(found, row, atol=2e-5)
        assert "".join(p.text for p in engine.stream(shown, asked, STEPS) if p.place == 4) == answers[4].text
    hook.remove()
    assert "forward" not in vars(packed.tower)


def test_logits_change_with_the_picture(models):
    variant, graphs, _, _ = models
    left = graphs.next_logits(pictures()[:1], prompts(variant)[:1])
    right = graphs.next_logits(pictures()[1:2], prompts(variant)[:1])
    assert np.abs(left - right).max() > 1e-3


def test_pytorch_answers_with_the_tokens_of_transformers_generate(models):
    """One picture at a time, with nothing of ours around it."""
    variant, _, _, dense = models
    answers = dense.generate(pictures(), prompts(variant), STEPS)
    for answer, picture, prompt in zip(answers, pictures(), prompts(variant), strict=True):
        inputs = processor(variant)(images=picture, text=prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = dense.model.generate(**inputs, do_sample=False, max_new_tokens=STEPS)
        new = tokens[0, 1 if variant == "blip2-t5" else inputs["input_ids"].shape[1] :].tolist()
        assert answer.tokens == (new[: new.index(2)] if 2 in new else new)


def test_an_answer_ends_before_the_end_of_sequence_token(models):
    variant, graphs, packed, _ = models
    asked = pictures(), prompts(variant), STEPS
    whole = graphs.generate(*asked)
    stop = whole[0].tokens[1]
    for model in (graphs, packed):
        before, model.stop = model.stop, {stop}
        try:
            answers = model.generate(*asked)
        finally:
            model.stop = before
        for answer, full in zip(answers, whole, strict=True):
            expected = full.tokens[: full.tokens.index(stop)] if stop in full.tokens else full.tokens
            assert answer.tokens == expected


def test_a_prompt_without_its_placeholder_is_refused():
    graphs = OnnxVlm(exported("llava-llama").folder, threads=1)
    with pytest.raises(VlmqError, match="placeholder"):
        graphs.next_logits(pictures()[:1], ["no picture here"])


def test_graphs_answer_the_same_in_a_process_without_pytorch():
    """The processors of transformers have their own numpy path; nothing may pull PyTorch in behind our back."""
    folder = exported("blip2-opt").folder
    script = f"""
from vlmq.exporter.runtime import OnnxVlm, without_torch
without_torch()
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pictures import pictures, prompts
answers = OnnxVlm(Path({str(folder)!r}), threads=1).generate(pictures(), prompts("blip2-opt"), {STEPS})
assert sys.modules["torch"] is None
print(json.dumps([answer.tokens for answer in answers]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = OnnxVlm(folder, threads=1).generate(pictures(), prompts("blip2-opt"), STEPS)
    assert json.loads(done.stdout) == [answer.tokens for answer in expected]
    assert done.stderr == ""


def test_a_folder_without_graphs_is_refused(tmp_path, tiny_folders):
    with pytest.raises(VlmqError, match=r"no vision_encoder\*\.onnx"):
        OnnxVlm(tiny_folders["llava-llama"])


DRAWN = Sampling(temperature=2.0, top_k=20, top_p=0.98, seed=7)


def test_drawn_tokens_are_the_same_for_a_seed_in_both_engines_and_in_any_batch(models):
    variant, graphs, packed, _ = models
    drawn = graphs.generate(pictures(), prompts(variant), STEPS, DRAWN)
    assert drawn == packed.generate(pictures(), prompts(variant), STEPS, DRAWN)
    assert drawn != graphs.generate(pictures(), prompts(variant), STEPS)
    for place, (picture, prompt) in enumerate(zip(pictures(), prompts(variant), strict=True)):
        alone = replace(DRAWN, seed=DRAWN.seed + place)
        assert graphs.generate([picture], [prompt], STEPS, alone) == [drawn[place]]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_what_is_streamed_is_what_is_answered(models, sampling):
    variant, graphs, packed, _ = models
    asked = pictures(), prompts(variant), STEPS, sampling
    for model in (graphs, packed):
        pieces = list(model.stream(*asked))
        for place, answer in enumerate(model.generate(*asked)):
            own = [piece for piece in pieces if piece.place == place]
            assert "".join(piece.text for piece in own) == answer.text
            assert [piece.token for piece in own] == [*answer.tokens, None]


def test_tokens_come_before_the_answer_is_over(models, monkeypatch):
    variant, graphs, _, _ = models
    steps = []
    say = Continuation.say
    monkeypatch.setattr(Continuation, "say", lambda self, embeds: steps.append(1) or say(self, embeds))
    first = next(graphs.stream(pictures()[:1], prompts(variant)[:1], STEPS))
    assert (first.place, steps) == (0, [])


def test_an_error_while_pytorch_streams_is_told(models):
    variant, _, packed, _ = models
    broken = TorchVlm(packed.model, packed.processor)
    broken.stop = {"no token"}
    with pytest.raises((TypeError, ValueError), match="str"):
        list(broken.stream(pictures()[:1], prompts(variant)[:1], STEPS))


def test_a_provider_that_is_not_here_is_one_line():
    folder = exported("llava-llama").folder
    if "CUDAExecutionProvider" in OnnxVlm(folder).decoder.get_providers() or torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code = f"from vlmq.exporter.runtime import OnnxVlm; OnnxVlm({str(folder)!r}, provider='cuda')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert lines[-1].endswith("choose --provider cpu")
    assert lines[-1].startswith("vlmq.exporter.errors.VlmqError: cuda: onnxruntime cannot use it here")
    assert not any("onnxruntime::" in line for line in lines)  # nothing of its own beside ours
