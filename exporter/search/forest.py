"""Three ways to ask a random forest which component's bits its predictions hang on (paper 002, section 4.1).

The forest is grown on all rows: the question is what explains these scores, not how well others are foretold, and a
held-out part of a few dozen rows would decide the answer by itself. Needs the extra `search`.
"""

from __future__ import annotations

import numpy as np
import shap
from sklearn.ensemble import RandomForestRegressor

REPEATS = 50  # of each permutation (4.1)


def grow(bits: np.ndarray, values: np.ndarray, trees: int, seed: int, judged: bool = False) -> RandomForestRegressor:
    """A forest from bits (rows, components) to values (rows,); judged: with its R^2 on the rows each tree left out."""
    return RandomForestRegressor(trees, random_state=seed, oob_score=judged).fit(bits, values)


def shares(forest: RandomForestRegressor, bits: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """Impurity, permutation, SHAP and their mean, each in percent of its sum: (4, components), float64.

    NaN where a forest found nothing that depends on bits.
    """
    found = np.stack([forest.feature_importances_, permutation(forest, bits, values, seed), shapley(forest, bits)])
    totals = found.sum(axis=1, keepdims=True)
    percent = 100 * np.divide(found, totals, out=np.full_like(found, np.nan), where=totals > 0)
    return np.vstack([percent, percent.mean(axis=0)])


def permutation(forest: RandomForestRegressor, bits: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """How much the mean squared error grows when one component's bits are shuffled over the rows: (components,).

    The mean over REPEATS; in proportion to the loss of R^2. A forest is slow to ask and a component has few levels, so
    that every row is predicted once at every level, and a shuffle only looks predictions up.
    """
    generator = np.random.default_rng(seed)
    rows = np.arange(len(values))
    before = np.mean((forest.predict(bits) - values) ** 2)
    growth = []
    for component, column in enumerate(bits.T):
        levels, level = np.unique(column, return_inverse=True)
        changed = np.repeat(bits[:, None], len(levels), axis=1)  # (rows, levels, components)
        changed[:, :, component] = levels
        predicted = forest.predict(changed.reshape(-1, bits.shape[1])).reshape(len(rows), len(levels))
        shuffled = generator.permuted(np.tile(level, (REPEATS, 1)), axis=1)  # (repeats, rows)
        growth.append(np.mean((predicted[rows, shuffled] - values) ** 2) - before)
    return np.maximum(growth, 0.0)


def shapley(forest: RandomForestRegressor, bits: np.ndarray) -> np.ndarray:
    """Mean absolute SHAP value of each component over the rows, by TreeSHAP: (components,), in the target's unit."""
    distinct, counts = np.unique(bits, axis=0, return_counts=True)
    return np.average(np.abs(shap.TreeExplainer(forest).shap_values(distinct)), axis=0, weights=counts)
