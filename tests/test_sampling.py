"""Drawn tokens: the filters are transformers' own, the draws have the probabilities, the seed decides."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.inference.sampling import GREEDY, Sampling, chooser, probabilities

ROWS, VOCABULARY = 40, 97


def logits(seed: int = 0) -> np.ndarray:
    """Some rows flat, some peaked."""
    source = np.random.default_rng(seed)
    return (source.normal(size=(ROWS, VOCABULARY)) * source.uniform(0.1, 6, (ROWS, 1))).astype(np.float32)


def of_transformers(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What transformers' generate() would draw from, its processors in its order."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(None, torch.tensor(scores, dtype=torch.float64)).softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, VOCABULARY, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-17])
def test_what_is_drawn_from_is_what_transformers_would_draw_from(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    expected = of_transformers(logits(), sampling)
    found = probabilities(logits(), sampling)
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_tokens_that_are_alike_at_the_edge_of_top_k_all_stay_as_in_transformers():
    scores = np.array([[1.0, 2.0, 2.0, 3.0, 0.0]], dtype=np.float32)
    sampling = Sampling(1.0, top_k=2)
    np.testing.assert_allclose(probabilities(scores, sampling), of_transformers(scores, sampling), atol=1e-12)
    assert (probabilities(scores, sampling) > 0).sum() == 3


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = np.tile(np.linspace(-1, 1, 12, dtype=np.float32), (4000, 1))
    sampling = Sampling(0.7, top_k=9, top_p=0.97)
    drawn = chooser(sampling, len(scores))(scores)
    likely = of_transformers(scores[:1], sampling)[0]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[likely == 0] == 0).all()
    assert chisquare(counts[likely > 0], likely[likely > 0] * len(scores)).pvalue > 0.001


def test_the_same_seed_draws_the_same_and_another_does_not():
    def draws(seed: int) -> list[list[int]]:
        choose = chooser(Sampling(1.0, seed=seed), ROWS)
        return [choose(logits(step)).tolist() for step in range(3)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(1000)


def test_a_place_in_a_batch_draws_what_the_seed_as_much_higher_draws_alone():
    together = chooser(Sampling(1.0, seed=3), ROWS)
    alone = [chooser(Sampling(1.0, seed=3 + place), 1) for place in range(ROWS)]
    for step in range(3):
        scores = logits(step)
        one_by_one = [choose(scores[[place]])[0] for place, choose in enumerate(alone)]
        assert together(scores).tolist() == one_by_one


def test_at_temperature_0_the_likeliest_token_is_taken():
    assert chooser(GREEDY, ROWS)(logits()).tolist() == logits().argmax(-1).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1, "top_k": -2}, "top_k -2"),
        ({"temperature": 1, "top_p": 0}, "top_p 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p 1.5"),
        ({"temperature": 1, "seed": -1}, "seed -1"),
        ({"top_p": 0.9}, "choose a temperature above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(values, message):
    with pytest.raises(VlmqError, match=message):
        Sampling(**values)
