import builtins
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmq.exporter.search import importance
from vlmq.exporter.search.forest import grow, permutation, shapley, shares
from vlmq.exporter.search.scores import read_scores

PUBLISHED = Path(__file__).parents[2] / "shared/data/importance/awq_image_captioning.csv"
WIDTHS = (2, 3, 4, 5, 6, 8, 16)
GAINS = {"vision": 1.0, "connector": 0.3, "language": 2.0}


def gain(bits):
    """What more bits bring, less and less."""
    return 1 - 2.0 ** (1 - np.asarray(bits, float))


def write_table(file, gains, noise=0.0, still=()):
    """Every assignment of WIDTHS to the components, `still` ones left at 16; a score that adds up their gains."""
    generator = np.random.default_rng(0)
    lines = [",".join([*(f"{name}_bits" for name in gains), "CIDEr", "note"])]
    for bits in itertools.product(*((16,) if name in still else WIDTHS for name in gains)):
        score = np.dot(list(gains.values()), gain(bits)) + noise * generator.normal()
        lines.append(",".join(map(str, [*bits, score, "free text"])))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def additive(tmp_path):
    return read_scores(write_table(tmp_path / "additive.csv", GAINS), "CIDEr")


@pytest.fixture
def small(tmp_path):
    return write_table(tmp_path / "small.csv", {"vit": 0.5, "llm": 1.0}, noise=0.05)


@pytest.fixture
def few_forests(monkeypatch):
    """Enough to see what is done with them; a hundred would only be the same again."""
    monkeypatch.setattr(importance, "TREES", 20)
    monkeypatch.setattr(importance, "SEEDS", 3)
    monkeypatch.setattr(importance, "RESAMPLES", 8)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the scores that paper 002 published are not beside this checkout")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_published_scores_give_the_consensus_of_the_paper(seed):
    scores = read_scores(PUBLISHED, "CIDEr")
    assert scores.components == ("vit", "qformer", "llm")
    found = shares(grow(scores.bits, scores.values, importance.TREES, seed), scores.bits, scores.values, seed)
    np.testing.assert_allclose(found[3], (17.1, 2.5, 80.5), atol=1.5)  # table 1, AWQ on COCO


def test_what_adds_up_is_shared_out_as_its_parts_vary(additive):
    """On a full grid a part's variance is what shuffling costs and splits remove; SHAP is its mean deviation."""
    parts = np.outer(list(GAINS.values()), gain(WIDTHS))  # (components, widths)
    variance, deviation = parts.var(axis=1), np.abs(parts - parts.mean(axis=1, keepdims=True)).mean(axis=1)
    forest = grow(additive.bits, additive.values, importance.TREES, seed=0)
    impurity, shuffled, shap, consensus = shares(forest, additive.bits, additive.values, seed=0)
    np.testing.assert_allclose(impurity, 100 * variance / variance.sum(), atol=1.5)
    np.testing.assert_allclose(shuffled, 100 * variance / variance.sum(), atol=1.5)
    np.testing.assert_allclose(shap, 100 * deviation / deviation.sum(), atol=1.5)
    np.testing.assert_allclose(consensus, (impurity + shuffled + shap) / 3)


def test_shuffling_costs_what_scikit_learn_says_it_costs(tmp_path):
    from sklearn.inspection import permutation_importance

    scores = read_scores(write_table(tmp_path / "noisy.csv", GAINS, noise=0.5), "CIDEr")  # not even the forest is exact
    bits, values = scores.bits[:60], scores.values[:60]  # 49 rows of one vision width and 11 of the next
    forest = grow(bits, values, 10, seed=0)
    theirs = permutation_importance(forest, bits, values, n_repeats=50, random_state=1)
    ours = permutation(forest, bits, values, seed=0) / values.var()  # as a loss of R^2
    # Each mean of fifty is this far from the truth, the difference of two of them a little further.
    assert (np.abs(ours - theirs.importances_mean) < 5 * theirs.importances_std / math.sqrt(50)).all()


def expectation(tree, row, known, node=0):
    """A tree's value where only the components `known` are, a split on another weighted by its training rows."""
    left, right = tree.children_left[node], tree.children_right[node]
    if left < 0:
        return tree.value[node, 0, 0]
    if tree.feature[node] in known:
        return expectation(tree, row, known, left if row[tree.feature[node]] <= tree.threshold[node] else right)
    weights = tree.weighted_n_node_samples
    both = (weights[child] * expectation(tree, row, known, child) for child in (left, right))
    return sum(both) / weights[node]


def test_shap_is_shapley_s_sum_over_all_coalitions(additive):
    rows = np.random.default_rng(0).integers(len(additive.values), size=40)  # some of them twice
    bits, components = additive.bits[rows], range(3)
    forest = grow(bits, additive.values[rows], 3, seed=0)
    expected = np.zeros((len(rows), 3))
    for number, component in itertools.product(range(len(rows)), components):
        others = [other for other in components if other != component]
        for size in range(3):
            for known in itertools.combinations(others, size):
                weight = math.factorial(size) * math.factorial(2 - size) / math.factorial(3)
                expected[number, component] += weight * np.mean(
                    [
                        expectation(tree.tree_, bits[number], {*known, component})
                        - expectation(tree.tree_, bits[number], known)
                        for tree in forest.estimators_
                    ]
                )
    np.testing.assert_allclose(shapley(forest, bits), np.abs(expected).mean(axis=0), rtol=1e-5)


def test_what_one_component_alone_explains_adds_up_to_the_prediction(tmp_path):
    scores = read_scores(write_table(tmp_path / "one.csv", {"vit": 1, "llm": 1, "qformer": 1}, 0.1, ("vit",)), "CIDEr")
    bits = scores.bits * np.float32([1, 1, 0]) + np.float32([0, 0, 16])  # the Q-Former stands still too
    forest = grow(bits, scores.values, 20, seed=0)
    base = np.mean([tree.tree_.value[0, 0, 0] for tree in forest.estimators_])
    whole = np.abs(forest.predict(bits) - base).mean()
    np.testing.assert_allclose(shapley(forest, bits), (0, whole, 0), rtol=1e-5, atol=1e-9)


def test_the_same_seed_gives_the_same_files_and_another_seed_does_not(vlmq, small, tmp_path, few_forests):
    for folder, seed in (("first", 1), ("again", 1), ("other", 2)):
        assert vlmq("importance", small, "--seed", seed, "--out", tmp_path / folder)[0] == 0
    first, again, other = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("first", "again", "other")
    )
    assert set(first) == {"importance.json", "consensus.png", "measures.png"}
    assert first == again
    assert json.loads(first["importance.json"])["tables"] != json.loads(other["importance.json"])["tables"]


def test_shares_add_up_to_the_whole_and_lie_in_their_spread(small, few_forests):
    (found,) = importance.analyse([small])
    assert tuple(found.shares) == ("impurity", "permutation", "shap", "consensus")
    for shares_of in found.shares.values():
        assert sum(share.percent for share in shares_of.values()) == pytest.approx(100)
        assert all(share.least <= share.percent <= share.most for share in shares_of.values())
        assert all(0 <= share.low < share.high <= 100 for share in shares_of.values())


def test_the_interval_of_what_one_row_says_reaches_to_nothing(tmp_path, few_forests):
    """A third of the resamples lacks that row, and then only the language model matters."""
    file = write_table(tmp_path / "one.csv", {"vit": 0.0, "llm": 1.0})
    head, _, last = file.read_text().strip().rpartition("\n")
    file.write_text(f"{head}\n{last.replace(str(gain(16)), '9')}\n")
    share = importance.analyse([file])[0].shares["consensus"]["vit"]
    assert share.least > 20
    assert share.low < 2


def test_what_little_can_be_believed_of_is_said(tmp_path, few_forests):
    noise = write_table(tmp_path / "noise.csv", {"vit": 1e-3, "llm": 1e-3}, noise=1.0)
    still = write_table(tmp_path / "still.csv", GAINS, still=("connector",))
    sure = write_table(tmp_path / "sure.csv", GAINS)
    few, standing, nothing = (found.warnings for found in importance.analyse([noise, still, sure]))
    assert any("49 rows are few" in warning for warning in few)
    assert any("explains little of CIDEr" in warning for warning in few)
    assert any("connector has the same bits in every row, so its share is 0" in warning for warning in standing)
    assert nothing == ()


def test_the_command_shows_and_writes_the_same_for_every_table(vlmq, small, tmp_path, few_forests):
    other = write_table(tmp_path / "other.csv", {"vit": 1.0, "qformer": 0.1, "llm": 1.0}, still=("qformer",))
    code, out, err = vlmq("importance", small, other, "-o", tmp_path / "shown")
    assert code == 0
    assert "small: CIDEr, 49 rows" in out
    assert "qformer" in out
    assert err.startswith(f"vlmq: warning: {small}: 49 rows are few")
    code, out, _ = vlmq("importance", small, other, "-o", tmp_path / "json", "--json")
    assert code == 0
    written = json.loads((tmp_path / "shown/importance.json").read_text())
    assert json.loads(out)["tables"] == written["tables"]
    assert [set(table["shares"]["consensus"]) for table in written["tables"]] == [
        {"vit", "llm"},
        {"vit", "qformer", "llm"},
    ]
    for name in ("consensus.png", "measures.png"):
        with Image.open(tmp_path / "shown" / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


HEADER = "vit_bits,llm_bits,METEOR,CIDEr"
ROWS = "".join(f"\n{vision},{language},0.3,{vision + language}" for vision in WIDTHS[:4] for language in WIDTHS[:4])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (HEADER, "fewer than 10 rows (0)"),
        (HEADER + "\n2,3,0.3,1", "fewer than 10 rows (1)"),
        ("a,b,CIDEr\n2,3,4", "fewer than two columns end in _bits (found: a, b, CIDEr)"),
        ("vit_bits,bits,CIDEr\n2,3,4", "fewer than two columns end in _bits"),
        ("vit_bits,vit_bits,CIDEr\n2,3,4", "vit_bits names two columns"),
        ("vit_bits,llm_bits,METEOR\n2,3,4", "no scores named CIDEr; choose a --target of METEOR"),
        ("vit_bits,llm_bits\n2,3", "no scores named CIDEr"),
        (HEADER + ROWS + "\n2,four,0.3,1", "line 18: llm_bits is 'four', not a number"),
        (HEADER + ROWS + "\n2,4,0.3,", "line 18: CIDEr is '', not a number"),
        (HEADER + ROWS + "\n2,4,0.3,nan", "line 18: CIDEr is 'nan', not a number"),
        (HEADER + ROWS + "\n2,4,0.3", "line 18: 3 cells under 4 names"),
        (HEADER + ROWS + "\n0,4,0.3,1", "bits of 0 or less"),
        (HEADER + "\n2,3,0.3,1\n4,3,0.3,1" * 8, "CIDEr is 1 in every row"),
        (HEADER + "\n2,3,0.3,1\n2,3,0.3,2" * 8, "every row has the same bits"),
        (HEADER + ROWS + '\n"2,4', "line 18: 1 cells under 4 names"),
        ("\xff\xfe", "not CSV"),
    ],
)
def test_bad_tables_get_one_line_and_nothing_is_written(vlmq, tmp_path, text, words):
    file = tmp_path / "bad.csv"
    file.write_bytes(text.encode("latin-1"))
    code, out, err = vlmq("importance", file, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"vlmq: {file}: ")
    assert words in err
    assert list(tmp_path.iterdir()) == [file]


def test_a_target_that_is_a_component_or_a_file_that_is_not_there_gets_one_line(vlmq, small, tmp_path):
    code, _, err = vlmq("importance", small, "--target", "vit_bits", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "no scores named vit_bits; choose a --target of CIDEr, note" in err
    code, _, err = vlmq("importance", tmp_path / "absent.csv", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "absent.csv: cannot be read (No such file or directory)" in err


def test_a_folder_that_is_there_already_is_left_as_it_was(vlmq, small, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = vlmq("importance", small, "--out", tmp_path / "out")
    assert code == 2
    assert "exists already; choose another --output" in err
    assert not list((tmp_path / "out").iterdir())


def test_without_the_extra_one_line_says_what_to_install(vlmq, small, tmp_path, monkeypatch):
    found = builtins.__import__

    def lacking(name, *others):
        if name == "shap":
            raise ModuleNotFoundError("No module named 'shap'", name="shap")
        return found(name, *others)

    monkeypatch.delitem(sys.modules, "vlmq.exporter.search.forest")
    monkeypatch.setattr(builtins, "__import__", lacking)
    code, _, err = vlmq("importance", small, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "No module named 'shap'" in err
    assert "pip install 'vlmq[search]'" in err
    assert not (tmp_path / "out").exists()
