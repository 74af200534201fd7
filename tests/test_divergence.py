"""Steps that are not finite are left out by all processes or by none, and too many of them end the run."""

from types import SimpleNamespace

import pytest
import torch

from rq_draft_revise.divergence import NonFiniteGuard


FINITE, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def run_of_one(scaler=None):
    return SimpleNamespace(num_processes=1, device=torch.device("cpu"), scaler=scaler)


def run_of_two(others: torch.Tensor):
    """The second process always reports `others`: two numbers, whether its loss and its gradient are not finite."""
    accelerator = run_of_one()
    accelerator.num_processes = 2
    accelerator.reduce = lambda tensor, reduction: {"sum": tensor + others[: len(tensor)].to(tensor.dtype)}[reduction]
    return accelerator


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
def test_a_step_is_taken_if_and_only_if_loss_and_gradient_are_finite(bad):
    guard = NonFiniteGuard(run_of_one(), max_in_row=100)
    for loss in (FINITE, bad):
        assert guard.accepts(loss, None) == (loss is FINITE)
        for grad_norm in (FINITE, bad):
            assert guard.accepts(loss, grad_norm) == (loss is FINITE and grad_norm is FINITE)
    assert guard.num_skipped == 1 + 3


def test_what_one_process_sees_holds_for_all():
    assert NonFiniteGuard(run_of_two(torch.tensor([0, 0])), 5).accepts(FINITE, FINITE)
    assert not NonFiniteGuard(run_of_two(torch.tensor([1, 0])), 5).accepts(FINITE, None)
    assert not NonFiniteGuard(run_of_two(torch.tensor([0, 1])), 5).accepts(FINITE, FINITE)
    assert not NonFiniteGuard(run_of_two(torch.tensor([0, 0])), 5).accepts(NAN, FINITE)


def test_only_steps_in_a_row_end_the_run_with_advice():
    guard = NonFiniteGuard(run_of_one(), max_in_row=3)
    for _ in range(10):
        assert not guard.accepts(NAN, FINITE) and not guard.accepts(FINITE, NAN)
        assert guard.accepts(FINITE, FINITE)
    assert not guard.accepts(NAN, FINITE) and not guard.accepts(NAN, FINITE)
    with pytest.raises(
        RuntimeError, match="loss and the gradient's norm.*3 .*--learning_rate.*--mixed_precision.*data"
    ):
        guard.accepts(NAN, NAN)
    assert guard.num_skipped == 23


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="`max_in_row`.*got 0"):
        NonFiniteGuard(run_of_one(), 0)


def scaled_step(guard, scaler, weight, optimizer, gradient: float) -> bool:
    """A step of float16 training whose gradient is `gradient`, as far as float16 can hold it times the scale."""
    scaler.scale(torch.ones(()))  # sets the scaler up
    weight.grad = (torch.tensor([gradient]) * scaler.get_scale()).half().float()
    scaler.unscale_(optimizer)
    accepted = guard.accepts(FINITE, weight.grad.norm())
    if accepted:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return accepted


def test_float16_may_search_its_scale_but_not_for_ever():
    """The scale falls from 65,536 by halves until the gradient fits into float16, whose largest number is 65,504."""
    scaler = torch.amp.GradScaler("cpu")
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = NonFiniteGuard(run_of_one(scaler), max_in_row=2)
    accepted = [scaled_step(guard, scaler, weight, optimizer, 1000.0) for _ in range(20)]
    assert accepted == [False] * 10 + [True] * 10  # 65,536 / 2^10 * 1000 = 64,000
    assert weight.item() == -10_000 and guard.num_skipped == 10

    with pytest.raises(RuntimeError, match="2 optimizer steps"):  # a gradient that no scale makes finite
        for _ in range(20):
            assert not scaled_step(guard, scaler, weight, optimizer, float("inf"))
    assert scaler.get_scale() <= 1 and guard.num_skipped < 10 + 10
    assert weight.item() == -10_000
