"""Candidates that race, against the sums of all of their losses."""

import pytest
import torch

from vlmq.exporter.methods.racing import CLOSE, race

SLAB, SLABS = 64, 50
ROWS = SLAB * SLABS


def drawn(seed, steps):
    """Losses (candidates, rows) whose rows differ by much, and candidates by `steps` of a part of each row."""
    dice = torch.Generator().manual_seed(seed)
    hardness = torch.randn(ROWS, generator=dice).mul(1.5).exp()  # log-normal: a few rows weigh as much as hundreds
    own = torch.randn(len(steps), ROWS, generator=dice).mul(0.3).exp()
    return hardness * own * (1 + torch.tensor(steps).unsqueeze(1))


def run(losses):
    looked = []

    def of(candidate, slab):
        looked.append((candidate, slab))
        return losses[candidate, slab::SLABS]

    return race(len(losses), SLABS, losses.shape[1], of), looked


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("step", [0.2, 0.03])
def test_the_winner_of_a_race_is_that_of_all_rows(seed, step):
    losses = drawn(seed, [step * abs(index - 8) for index in range(20)])
    winner, _ = run(losses)
    assert winner == losses.double().sum(1).argmin()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("step", [0.01, 0.001, 0.0001])
def test_the_winner_among_candidates_that_are_alike_loses_next_to_nothing_more(seed, step):
    losses = drawn(seed, [step * abs(index - 8) for index in range(20)])
    totals = losses.double().sum(1)
    assert totals[run(losses)[0]] <= totals.min() * (1 + CLOSE)


def test_a_race_that_is_soon_decided_looks_at_few_rows():
    _, looked = run(drawn(0, [0.2 * abs(index - 8) for index in range(20)]))
    assert len(looked) < 0.2 * 20 * SLABS


def test_of_equals_the_first_wins_at_once():
    winner, looked = run(drawn(0, [0.0]).expand(3, -1))
    assert (winner, len(looked)) == (0, 3)


def test_a_race_over_one_slab_is_a_search_of_all():
    losses = drawn(1, [0.02 * index for index in range(5)])[:, :7].contiguous()
    assert race(5, 1, 7, lambda candidate, slab: losses[candidate]) == losses.sum(1).argmin()
