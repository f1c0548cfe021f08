"""Measurements of a model in a fresh process, against the same model in this one and sizes known beforehand."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tiny import processor, tiny_folder

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import measure as measuring
from vlmq.exporter.evaluation import worker
from vlmq.exporter.evaluation.answers import answer_all, batches, images_of
from vlmq.exporter.evaluation.components import blocks_in, cosine, outputs_of, relative_error
from vlmq.exporter.evaluation.measure import Request, measure
from vlmq.exporter.evaluation.sensitivity import Shown, shown
from vlmq.exporter.families import family_of
from vlmq.exporter.load import load
from vlmq.exporter.runtime import Answer, TorchVlm
from vlmq.exporter.samples import Sample


@pytest.fixture(scope="module")
def vlm(tiny_folders):
    return opened(tiny_folders["blip2-opt"], "blip2-opt")


def opened(folder, variant):
    model = load(folder)
    return TorchVlm(model, processor(variant))


FORCED = [[5, 6, 7], [], [8], [9, 10], [5]]


@pytest.fixture(scope="module")
def measured(tiny_folders, random_samples, tmp_path_factory):
    """The tiny BLIP-2 measured in a process of its own, and what was told of its progress."""
    told = []
    found = measure(
        tiny_folders["blip2-opt"],
        "torch",
        random_samples,
        tmp_path_factory.mktemp("measured"),
        timed=3,
        probes=5,
        batch_size=5,
        max_new_tokens=4,
        forced=FORCED,
        progress=lambda *place: told.append(place),
    )
    return found, told


def test_a_fresh_process_answers_as_this_one_does(measured, vlm, random_samples):
    found, _ = measured
    here = answer_all(vlm, random_samples, family_of(vlm.model.config), batch_size=1, max_new_tokens=4)
    assert found.texts == [answer.text for answer in here]
    assert found.tokens == [answer.tokens for answer in here]


def test_a_fresh_process_puts_out_what_this_one_does_for_every_component(measured, vlm, random_samples):
    found, _ = measured
    probes = random_samples[:5]
    here = outputs_of(
        vlm, images_of(probes), [family_of(vlm.model.config).question.format(sample.text) for sample in probes]
    )
    blocks = {f"block:{name}" for name in blocks_in(vlm.model)}
    assert here.keys() == {"vision", "connector", "language"}
    assert set(found.outputs) == {*here, *blocks, "logits"}
    for component, output in here.items():
        assert output.std() > 0
        np.testing.assert_allclose(found.outputs[component], output, rtol=1e-4, atol=1e-5)


def test_the_logits_along_given_answers_are_those_of_one_pass_over_prompt_and_answer(measured, vlm, random_samples):
    """No cache and no generation: prompt and answer in a row, the logits before every token read off."""
    found, _ = measured
    assert found.lengths == [len(tokens) + 1 for tokens in FORCED]
    start = 0
    for sample, tokens in zip(random_samples[:5], FORCED, strict=True):
        prompt = family_of(vlm.model.config).question.format(sample.text)
        inputs = vlm.processor(images=images_of([sample]), text=[prompt], return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = vlm.model(inputs["pixel_values"], ids, attention_mask=torch.ones_like(ids)).logits[0]
        expected = logits[inputs["input_ids"].shape[1] - 1 :].numpy()
        np.testing.assert_allclose(
            found.outputs["logits"][start : start + len(expected)], expected, rtol=1e-4, atol=1e-5
        )
        start += len(expected)


def test_other_images_are_those_of_other_samples_and_grey_ones(random_samples):
    class Looks:
        """Answers with the first pixel."""

        def generate(self, images, prompts, max_new_tokens):
            return [Answer("", [image.getpixel((0, 0))[0]]) for image in images]

    images = images_of(random_samples[:5])
    first = [image.getpixel((0, 0))[0] for image in images]
    found = shown(Looks(), images, ["?"] * 5, 2, 4)
    assert [tokens for (tokens,) in found.own] == first
    assert [tokens for (tokens,) in found.swapped] == [*first[1:], first[0]]
    assert found.blank == [[128]] * 5
    assert found.changed() == {"swapped": 100.0, "blank": 100.0}
    asked = []
    counting = SimpleNamespace(
        generate=lambda images, *_, **__: asked.extend(images) or [Answer("", [0])] * len(images)
    )
    assert shown(counting, images, ["?"] * 5, 2, 4, own=[[7]] * 5).own == [[7]] * 5
    assert len(asked) == 10  # those that are known are not asked again
    assert Shown([[1], [2]], [[1], [3]], [[1], [2]]).changed() == {"swapped": 50.0, "blank": 0.0}


def test_what_was_answered_about_a_probe_is_what_is_compared(tiny_folders, random_samples, monkeypatch):
    """A model that answers with the first pixel; probes in another order than the samples."""

    class Pixels:
        def generate(self, images, prompts, max_new_tokens):
            return [Answer("", [image.getpixel((0, 0))[0]]) for image in images]

        def forced_logits(self, images, prompts, answers):
            return [np.zeros((len(tokens) + 1, 3)) for tokens in answers]

        def image_features(self, images):
            return np.zeros((len(images), 1, 2))

        def next_logits(self, images, prompts):
            return np.zeros((len(images), 3))

    monkeypatch.setattr(worker, "open_vlm", lambda *_: Pixels())
    probes = [random_samples[place] for place in (3, 0, 4)]
    request = Request(str(tiny_folders["blip2-opt"]), "torch", list(random_samples), [], probes)
    found = worker.work(request)
    assert found.shown.own == [[image.getpixel((0, 0))[0]] for image in images_of(probes)]
    assert found.lengths == [2, 2, 2]


def test_progress_is_told_after_every_batch_up_to_the_last(measured):
    _, told = measured
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_time_memory_and_threads_are_measured(measured):
    found, _ = measured
    assert found.seconds_per_answer > 0
    assert len(found.speed.answer) == len(found.speed.first_token) == 3
    assert min(found.speed.first_token) > 0
    assert found.speed.tokens_per_second > 0
    assert found.speed.images_per_second > 0
    assert found.threads >= 1
    # Python with torch is known to take more than 100 MB; a tiny model far less than that.
    assert 100e6 < found.memory.imported <= found.memory.loaded + 1e6
    assert found.memory.loaded <= found.memory.peak + 1e6
    assert found.memory.model < 100e6


def test_resident_memory_grows_by_a_tensor_and_the_peak_is_remembered_until_forgotten():
    program = """
import json, numpy
from vlmq.exporter.evaluation.memory import forget_peak, peak, resident
before = resident()
kept = numpy.ones(100_000_000, dtype=numpy.uint8)
after = resident()
forget_peak()
passing = numpy.ones(200_000_000, dtype=numpy.uint8)
del passing
high = peak()
forget_peak()
print(json.dumps([after - before, high - after, peak() - resident()]))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    kept, passing, forgotten = json.loads(said.stdout)
    assert 95e6 < kept < 110e6
    assert 190e6 < passing < 220e6
    if sys.platform == "linux":
        assert forgotten < 10e6


def test_a_worker_that_dies_leaves_one_line_with_its_folder_and_its_last_words(tmp_path, random_samples):
    with pytest.raises(VlmqError, match="the process that runs it in torch failed: ") as error:
        measure(tmp_path, "torch", random_samples, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_interrupted_measurement_leaves_no_process_running(tiny_folders, random_samples, tmp_path):
    def interrupt(done, of):
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_folders["blip2-opt"], "torch", random_samples, tmp_path, batch_size=1, progress=interrupt)
    assert set(psutil.Process().children()) <= before


def test_text_without_an_image_cannot_be_evaluated():
    with pytest.raises(VlmqError, match="alone: text without an image"):
        images_of([Sample("alone", None, "prompt", "once upon a time")])


def test_a_worker_that_refuses_says_so_in_its_own_line(tmp_path, tiny_folders, random_samples, monkeypatch):
    request = Request(str(tiny_folders["llava-llama"]), "onnx", list(random_samples), [], [])  # it has no graphs
    request.write(tmp_path / "request.json")
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    assert worker.main() == 2
    assert "onnx" in measuring._fault(request, tmp_path, 2, "noise")
    assert not (tmp_path / "found.json").exists()


def test_a_request_travels_unchanged(tmp_path, random_samples):
    request = Request("folder", "onnx", list(random_samples), list(random_samples[:2]), [], batch_size=3)
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


@pytest.mark.parametrize("variant", ["llava-llama", "llava-qwen2"])
def test_the_vision_output_of_llava_is_what_its_projector_reads(tmp_path, variant, random_samples):
    vlm = opened(tiny_folder(variant, tmp_path / variant), variant)
    images = images_of(random_samples[:2])
    outputs = outputs_of(vlm, images, [family_of(vlm.model.config).question.format("?")] * 2)
    pixels = vlm.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(outputs["vision"], states[-2][:, 1:].numpy(), rtol=1e-4, atol=1e-5)


class Echo:
    """Answers every prompt with itself, and remembers the batches."""

    def __init__(self):
        self.batches = []

    def generate(self, images, prompts, max_new_tokens):
        self.batches.append((images, prompts))
        return [Answer(prompt, [len(prompt)]) for prompt in prompts]


def test_answers_come_in_the_order_of_the_samples_and_an_image_is_decoded_once_a_batch(random_samples, vlm):
    samples = [
        Sample(f"{number}-{image.id}", image.image, "question", "why? " * (1 + number * 7 % 3))
        for number in range(4)
        for image in random_samples[:3]
    ]
    echo = Echo()
    answers = answer_all(echo, samples, family_of(vlm.model.config), batch_size=8)
    assert [answer.text for answer in answers] == [
        family_of(vlm.model.config).question.format(sample.text) for sample in samples
    ]
    images, _ = echo.batches[0]
    assert len({id(image) for image in images}) == 2  # four questions about each image, together


def test_batches_hold_every_sample_once_and_start_with_the_longest_prompts(random_samples):
    prompts = [sample.text for sample in random_samples]
    found = list(batches(random_samples, prompts, 5))
    assert sorted(place for places in found for place in places) == list(range(12))
    assert [len(places) for places in found] == [5, 5, 2]
    lengths = [len(prompts[place]) for places in found for place in places]
    assert lengths == sorted(lengths, reverse=True)


def test_a_cosine_is_of_directions_and_zero_is_only_like_zero():
    first = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert cosine(first[:1], first[:1] * 7) == pytest.approx(1.0)
    assert cosine(first[:2], np.array([[4.0, 3.0], [-2.0, 0.0]])) == pytest.approx((0.96 - 1) / 2)
    assert cosine(first[2:], np.array([[0.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)


def test_outputs_that_are_not_numbers_are_like_nothing():
    assert cosine(np.ones((1, 2)), np.array([[np.nan, 1.0]])) == 0.0


def test_an_error_is_relative_to_the_size_of_the_reference():
    assert relative_error(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])) == pytest.approx(0.1)
    assert relative_error(np.ones((1, 2)), np.array([[np.nan, 1.0]])) == float("inf")
