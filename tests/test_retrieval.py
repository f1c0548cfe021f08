"""Retrieval against transformers' own forward, and ranks against counting by hand."""

import numpy as np
import pytest
import torch
from test_tasks import karpathy_files
from tiny import IMAGE, QUERIES, VOCABULARY, config, tokenizer
from transformers import Blip2ForImageTextRetrieval, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import retriever
from vlmq.exporter.evaluation.comparison import compare
from vlmq.exporter.evaluation.evaluate import Request, evaluate
from vlmq.exporter.evaluation.ranking import belonging, first, ranks, similarity
from vlmq.exporter.evaluation.summary import summarise
from vlmq.exporter.images import open_image

TEXTS = ["the red circle", "how many green squares are there", "a photo of the blue", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random retrieval model, saved as users have it."""
    made = config("blip2-opt")
    made.image_token_index = made.image_token_id = None
    made.image_text_hidden_size = 32
    made.qformer_config.use_qformer_text_input = True
    made.qformer_config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "query_tokens" in name else 0.15))
    folder = tmp_path_factory.mktemp("retrieval")
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    Blip2Processor(images, tokenizer(), num_query_tokens=QUERIES).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return karpathy_files(tmp_path / "data")


def request_of(folder, data, out, **changes):
    return Request(str(folder), "flickr30k-retrieval", str(data), out, **changes)


def forward(folder, pictures, texts, matching):
    """transformers' own: (images, texts), one pair at a time where the matching head looks."""
    model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    tool = retriever.open_retriever(folder).processor
    pixels = tool.image_processor(pictures, return_tensors="pt")["pixel_values"]
    found = np.zeros((len(pictures), len(texts)), dtype=np.float32)
    with torch.inference_mode():
        for row, column in np.ndindex(found.shape):
            encoded = tool.tokenizer([texts[column]], return_tensors="pt")
            inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
            said = model(pixel_values=pixels[row : row + 1], use_image_text_matching_head=matching, **inputs)
            found[row, column] = said.logits_per_image[0, 1] if matching else said.logits_per_image[0, 0]
    return found


def test_similarities_and_matches_are_those_of_transformers_for_every_pair(folder, pictures):
    shown = [open_image(path) for path in sorted(pictures.glob("*.png"))[:3]]
    model = retriever.open_retriever(folder)
    found = similarity(model.image_features(shown), model.text_features(TEXTS))
    np.testing.assert_allclose(found, forward(folder, shown, TEXTS, matching=False), atol=2e-6)
    matched = np.stack([model.matches(picture, TEXTS) for picture in shown])
    np.testing.assert_allclose(matched, forward(folder, shown, TEXTS, matching=True), atol=2e-5)
    assert np.ptp(found) > 1e-3
    assert np.ptp(matched) > 1e-3


def test_a_rank_is_how_many_wrong_ones_come_before_the_best_right_one():
    generator = np.random.default_rng(0)
    scores, right = generator.normal(size=(6, 15)), belonging([place // 3 for place in range(15)], 5)
    right = np.vstack([right, np.roll(right[0], 7)])
    expected = []
    for row in range(6):  # sort and look, one row at a time
        order = sorted(range(15), key=lambda column: -scores[row, column])
        places = [place for place, column in enumerate(order) if right[row, column]]
        expected.append(places[0])  # what is before the best right one is wrong
    assert ranks(scores, right).tolist() == expected


def test_a_model_that_scores_everything_alike_finds_nothing():
    assert ranks(np.zeros((3, 6)), belonging([0, 0, 1, 1, 2, 2], 3)).tolist() == [4, 4, 4]


def test_the_first_of_a_row_are_its_highest():
    assert first(np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), 2).tolist() == [[False, True, True], [True, True, False]]


def test_similarity_of_many_in_steps_is_that_of_all_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(7, 3, 4)), generator.normal(size=(5, 4))
    expected = np.einsum("iqd,td->itq", images, texts).max(-1)
    monkeypatch.setattr("vlmq.exporter.evaluation.ranking._CELLS", 40)
    np.testing.assert_allclose(similarity(images, texts), expected, rtol=1e-5)


@pytest.mark.parametrize("rerank", [0, 2])
def test_an_evaluation_ranks_as_transformers_scores_do(folder, data, tmp_path, rerank):
    results = evaluate(request_of(folder, data, tmp_path / "out.jsonl", rerank=rerank, batch_size=3))
    texts = ["A dog runs.", "A dog sits."] * 2
    shown = [open_image(data / f"flickr30k-images/{number}.jpg") for number in (3, 4)]
    alike = forward(folder, shown, texts, matching=False)
    if rerank:
        together = alike + forward(folder, shown, texts, matching=True)
        by_image = np.where(first(alike, 2), together, -np.inf)
        by_text = np.where(first(alike.T, 2), together.T, -np.inf)
    else:
        by_image, by_text = alike, alike.T
    right = belonging([0, 0, 1, 1], 2)
    # Equal texts of two images have equal scores but for rounding: a pair of them may come in either order.
    found = {record.id: record.rank for record in results.records}
    expected = [*ranks(np.round(by_image, 5), right), *ranks(np.round(by_text, 5), right.T)]
    exact = [*ranks(np.round(by_image, 5) + right * 1e-3, right), *ranks(np.round(by_text, 5), right.T)]
    names = ["caption-3", "caption-4", "caption-3:0", "caption-3:1", "caption-4:0", "caption-4:1"]
    assert list(found) == names
    for name, most, least in zip(names, expected, exact, strict=True):
        assert least <= found[name] <= most
    shown_groups = {group.name: group.samples for group in summarise(results).groups}
    assert shown_groups == {"overall": 6, "image to text": 2, "text to image": 4}
    assert compare(results, results).changes[0].word == "no difference"


class Ended(BaseException):
    """A run that is killed."""


def test_a_run_that_was_ended_looks_at_no_image_twice_and_leaves_no_features(folder, data, tmp_path, monkeypatch):
    unbroken = evaluate(request_of(folder, data, tmp_path / "unbroken.jsonl", batch_size=1))

    def kill(what, done, of):
        if what == "texts" and done == 1:
            raise Ended

    request = request_of(folder, data, tmp_path / "out.jsonl", batch_size=1)
    with pytest.raises(Ended):
        evaluate(request, kill)
    monkeypatch.setattr(retriever.Retriever, "image_features", lambda *_: pytest.fail("an image was looked at again"))
    assert evaluate(request).records == unbroken.records
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_bad_image_stops_retrieval_or_is_counted_with_its_texts(folder, data, tmp_path):
    (data / "flickr30k-images/4.jpg").write_bytes(b"no image")
    with pytest.raises(VlmqError, match=r"sample caption-4: .*4\.jpg: not an image"):
        evaluate(request_of(folder, data, tmp_path / "out.jsonl"))
    results = evaluate(request_of(folder, data, tmp_path / "out.jsonl", skip_bad=True))
    assert summarise(results).odd.failed == 3
    assert {record.rank for record in results.answered} == {0}  # alone among themselves


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"engine": "onnx"}, "leave out"), ({"instruction": "x"}, "leave out"), ({"max_new_tokens": 3}, "leave out")],
)
def test_what_does_not_apply_to_retrieval_is_refused(folder, data, tmp_path, changes, said):
    with pytest.raises(VlmqError, match=said):
        evaluate(request_of(folder, data, tmp_path / "out.jsonl", **changes))


def test_a_model_without_the_heads_is_refused(tiny_folders, data, tmp_path):
    with pytest.raises(VlmqError, match="is no Blip2ForImageTextRetrieval"):
        evaluate(request_of(tiny_folders["blip2-opt"], data, tmp_path / "out.jsonl"))
    with pytest.raises(VlmqError, match="--rerank 5: coco retrieves nothing"):
        evaluate(Request(str(tiny_folders["blip2-opt"]), "coco", str(data), tmp_path / "out.jsonl", rerank=5))
