"""The masks of training: their distribution is the paper's, whichever way they are drawn."""

import math

import pytest
import torch

from rq_draft_revise.masks import draws_of_step, random_mask


def distance_from_cosine(num_masked: torch.Tensor, num_positions: int) -> float:
    """The largest distance between distribution functions: of the counts, and of ceil(cos(pi r / 2) N).

    The latter is P(count <= k) = 2/pi arcsin(k / N).
    """
    k = torch.arange(1, num_positions + 1)
    empirical = (num_masked[:, None] <= k).double().mean(0)
    return (empirical - 2 / math.pi * torch.arcsin(k.double() / num_positions)).abs().max().item()


@pytest.mark.parametrize("num_positions", [16, 64, 256])
def test_a_stratified_batch_has_its_share_of_every_mask_ratio(num_positions):
    for seed in range(5):
        masks = random_mask(500, num_positions, torch.Generator().manual_seed(seed))
        # Of one r a stratum each is at most one on the wrong side: no statistics, and no room for a floor or a round.
        assert distance_from_cosine(masks.sum(1), num_positions) <= 1 / 500 + 1e-9


def test_of_all_positions_two_out_of_pi_are_masked():
    masks = random_mask(1000, 1024, torch.Generator().manual_seed(0))
    # The ceiling adds half a position of 1024 on the average; a stratum is a thousandth wide.
    assert masks.double().mean().item() == pytest.approx(2 / math.pi + 0.5 / 1024, abs=1e-3)


def test_independent_masks_have_the_distribution_of_the_paper():
    counts = random_mask(20_000, 64, torch.Generator().manual_seed(0), stratified=False).sum(1)
    assert distance_from_cosine(counts, 64) < 1.63 / math.sqrt(20_000)  # Kolmogorov's bound, 1 % level
    assert counts.min() >= 1 and counts.max() == 64


def test_each_image_of_a_stratified_batch_has_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([random_mask(8, 256, generator).double().mean(1) for _ in range(2000)])
    deviation = math.sqrt(1 / 2 - 4 / math.pi**2)  # of cos(pi r / 2)
    assert (shares.mean(0) - 2 / math.pi - 0.5 / 256).abs().max() < 4 * deviation / math.sqrt(2000)


@pytest.mark.parametrize("stratified", [True, False])
def test_which_positions_are_masked_is_uniform(stratified):
    count, num_positions = 20_000, 16
    masks = random_mask(count, num_positions, torch.Generator().manual_seed(0), stratified).double()
    together = masks.T @ masks / count  # how often two positions are masked at once; on the diagonal, how often each
    for frequencies in (together.diagonal(), together[~torch.eye(num_positions, dtype=torch.bool)]):
        p = frequencies.mean()
        assert (frequencies - p).abs().max() < 5 * math.sqrt(p * (1 - p) / count)


def test_at_least_one_position_is_masked_and_at_most_all():
    for num_positions in (1, 2, 64):
        for stratified in (True, False):
            counts = random_mask(3000, num_positions, torch.Generator().manual_seed(1), stratified).sum(1)
            assert counts.min() == 1 and counts.max() == num_positions


@pytest.mark.parametrize("stratified", [True, False])
def test_the_draws_of_a_step_are_stratified_only_if_asked_to_be(stratified):
    batch_size, num_positions = 8, 256
    bounds = num_positions * torch.cos(torch.arange(batch_size + 1) / batch_size * math.pi / 2)  # of the strata
    for step in range(20):
        counts = draws_of_step(batch_size, num_positions, 0.0, 0, step, stratified).masks.sum(1).sort().values.flip(0)
        has_one_of_each = ((bounds[1:] <= counts) & (counts <= bounds[:-1].ceil())).all()
        assert has_one_of_each == stratified  # of 20 independent batches none has: a chance of 8!/8^8 each


def test_each_seed_and_each_step_has_draws_of_its_own_and_they_repeat():
    def drawn(seed, step):
        draws = draws_of_step(4, 64, 0.5, seed, step)
        return draws.masks.flatten().tolist(), draws.dropped.tolist()

    runs = [(seed, step) for seed in (0, 1, 2) for step in (0, 1, 2, 1000)]
    masks = [tuple(drawn(*run)[0]) for run in runs]
    assert len(set(masks)) == len(runs)
    assert [drawn(*run) for run in runs] == [drawn(*run) for run in runs]


@pytest.mark.parametrize("masked", [True, False])
def test_as_many_conditions_are_dropped_as_asked_for_whatever_the_mask(masked):
    for dropout in (0.0, 0.3, 1.0):
        dropped = torch.stack([draws_of_step(8, 4, dropout, 0, step, masked=masked).dropped for step in range(500)])
        assert abs(dropped.double().mean() - dropout) <= 5 * math.sqrt(dropout * (1 - dropout) / 4000)
