"""Caption metrics against figures of the reference implementation, and against what was worked out by hand."""

import json
import math
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlmq.exporter.evaluation.metrics import java
from vlmq.exporter.evaluation.metrics.bleu import bleu
from vlmq.exporter.evaluation.metrics.cider import cider
from vlmq.exporter.evaluation.metrics.ptb import tokens
from vlmq.exporter.evaluation.metrics.rouge import rouge_l

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "captions"
PREDICTIONS = ("all_16bit_full_precision", "all_8bit", "all_4bit_degenerate")
with_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
with_java = pytest.mark.skipif(
    not shutil.which("java") or not find_spec("pycocoevalcap"), reason="needs Java and pycocoevalcap"
)


def load(name):
    return json.loads((DATA / f"{name}.json").read_text())


@cache
def words(name):
    """The captions and references of a file of predictions, through our own tokenizer."""
    references, predicted = load("refs"), load(name)["predictions"]
    said = [tokens(predicted[image]) for image in references]
    return said, [[tokens(text) for text in texts] for texts in references.values()]


@with_data
@pytest.mark.parametrize("name", PREDICTIONS)
def test_real_captions_score_as_the_reference_implementation_has_it(name):
    expected = load("expected")[name]
    scores = cider(*words(name))
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    assert mean == pytest.approx(expected["CIDEr"], abs=1e-6)
    assert spread == pytest.approx(expected["CIDEr_sem"], rel=1e-3)
    assert bleu(*words(name))[3] == pytest.approx(expected["BLEU4"], abs=1e-6)
    ranked = rouge_l(*words(name))
    assert sum(ranked) / len(ranked) == pytest.approx(expected["ROUGE_L"], abs=1e-6)


@with_data
@with_java
def test_meteor_is_what_the_reference_implementation_gives():
    expected = load("expected")["all_8bit"]["METEOR"]
    assert java.score("METEOR", *words("all_8bit")) == pytest.approx(expected, abs=1e-6)


@with_data
def test_every_real_caption_is_split_as_the_java_tokenizer_splits_it():
    plain, split = load("refs"), load("refs_ptb")
    pairs = [pair for image in plain for pair in zip(plain[image], split[image], strict=True)]
    assert len(pairs) > 5000
    assert [text for text, expected in pairs if " ".join(tokens(text)) != expected] == []


# What Stanford's tokenizer (CoreNLP 3.4.1, -preserveLines -lowerCase) made of these, punctuation dropped.
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('He said "hello there" to the dog.', "he said hello there to the dog"),
        ("the man's dog doesn't, can't and won't", "the man 's dog does n't ca n't and wo n't"),
        ("they'll we've I'm he'd I'd've", "they 'll we 've i 'm he 'd i 'd 've"),
        ("cannot gonna gotta 'tis", "can not gon na got ta 't is"),
        ("1,000 people at 10:30 a.m. in the U.S. army.", "1,000 people at 10:30 a.m. in the u.s. army"),
        ("Mr. Smith and Dr. Who vs. etc.", "mr. smith and dr. who vs. etc."),
        (
            "a black-and-white t-shirt -- half - empty --- dots .... end",
            "a black-and-white t-shirt half empty dots end",
        ),
        ("$5 5% #1 & w/ a/c 1/2", "$ 5 5 % # 1 & w / a/c 1/2"),
        ("(left) [square]", "-lrb- left -rrb- -lsb- square -rsb-"),
        ("really?! two!! yes? no.", "really ?! two !! yes no"),
        ("it\u2019s “smart” … £5 ½", "it 's smart # 5 1/2"),
        ("one.Two next,comma 3.5 5. 90's '90s", "one.two next comma 3.5 5 90 's '90s"),
        ("o'clock y'all ma'am o'brien", "o'clock y' all ma'am o'brien"),
        ("the dogs' bone. James' hat", "the dogs bone james hat"),
        ("AT&T m&m's C++ <tag> x_y", "at&t m & m 's c++ <tag> x_y"),
        ("5:00pm 10am 100mph no.5 -40 555-1234", "5:00 pm 10am 100mph no. 5 -40 555-1234"),
        ("cat-dog -cat cat- cat--dog cat/dog/cow", "cat-dog cat cat cat dog cat/dog/cow"),
        ("www.bar.com me@foo.com http://foo.com/bar", "www.bar.com me@foo.com http://foo.com/bar"),
        ("ft. lbs. st. no. sat. Ill. ill.", "ft. lbs st. no sat ill. ill"),
        ("CAN'T d's \u00e9t\u00e9 jalapeño 5½", "ca n't d 's été jalapeño 5 1/2"),
        ("", ""),
    ],
)
def test_marks_and_abbreviations_are_split_as_the_java_tokenizer_splits_them(caption, expected):
    assert tokens(caption) == expected.split()


@with_java
def test_the_tokenizer_agrees_with_the_java_one_on_mixed_up_captions():
    """Its own oracle, run here: words and marks in combinations that no one wrote down."""
    import random

    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    source = random.Random(5)
    parts = (
        "a man's dog isn't on the U.S. street at 5:30 p.m. , with 1,000 cats and black-and-white 3.5 T-shirts ( red ) !"
    )
    parts = [
        *parts.split(),
        "don't",
        "women's",
        "dogs'",
        '"stop"',
        "x-ray,",
        "N.Y.",
        "etc.",
        "50%",
        "$5",
        "#1",
        "cannot",
    ]
    captions = [" ".join(source.choices(parts, k=9)) for _ in range(300)]
    expected = PTBTokenizer().tokenize({place: [{"caption": caption}] for place, caption in enumerate(captions)})
    found = {place: [" ".join(tokens(caption))] for place, caption in enumerate(captions)}
    assert {
        place: (captions[place], found[place], said) for place, said in expected.items() if found[place] != said
    } == {}


@pytest.mark.skipif(not find_spec("pycocoevalcap"), reason="needs pycocoevalcap")
def test_the_metrics_equal_the_reference_implementations_on_random_sentences():
    import random

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    source = random.Random(1)

    def sentence():
        return source.choices(["a", "dog", "cat", "on", "the", "mat", "red", "is"], k=source.randrange(1, 12))

    said = [sentence() for _ in range(40)]
    known = [[sentence() for _ in range(source.randrange(1, 6))] for _ in said]
    references = {place: [" ".join(words) for words in texts] for place, texts in enumerate(known)}
    captions = {place: [" ".join(words)] for place, words in enumerate(said)}
    assert cider(said, known) == pytest.approx(list(Cider().compute_score(references, captions)[1]), abs=1e-9)
    assert bleu(said, known) == pytest.approx(Bleu(4).compute_score(references, captions, verbose=0)[0], abs=1e-9)
    assert rouge_l(said, known) == pytest.approx(list(Rouge().compute_score(references, captions)[1]), abs=1e-9)


def test_cider_of_two_images_is_what_the_formula_gives_by_hand():
    # Every n-gram of one image is unknown to the other, so each weighs log(2/1), and a caption equal to its only
    # reference has a cosine of 1 in all four orders: 10. One word of two, of another length by one bigram:
    # orders 1 and 2 are ("a",), cosine 1/sqrt(2), and none; 10 * exp(-1/72) * (1/sqrt(2)) / 4.
    known = [[["a", "b"]], [["c", "d", "e", "f"]]]
    first, second = cider([["a"], ["c", "d", "e", "f"]], known)
    assert first == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)
    assert second == pytest.approx(10.0)


def test_saying_a_word_again_and_again_pays_nothing():
    known = [[["a", "dog", "runs", "home"]], [["the", "cat"]]]
    once, often = (cider([said, ["the", "cat"]], known)[0] for said in (["dog"], ["dog"] * 4))
    assert often < once


def test_empty_captions_score_nothing():
    known = [[["a", "dog"]], [["a", "cat"]]]
    assert cider([[], []], known) == [0.0, 0.0]
    assert bleu([[], []], known) == [0.0, 0.0, 0.0, 0.0]
    assert rouge_l([[], []], known) == [0.0, 0.0]


def test_what_needs_java_says_so_where_there_is_none(monkeypatch):
    pytest.importorskip("pycocoevalcap.meteor")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(java.UnavailableError, match="needs Java"):
        java.score("METEOR", [["a"]], [[["a"]]])


def test_what_needs_the_extra_names_it(monkeypatch):
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    with pytest.raises(java.UnavailableError, match=r"vlmq\[captions\]"):
        java.score("SPICE", [["a"]], [[["a"]]])
