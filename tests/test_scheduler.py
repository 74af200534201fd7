"""DraftAndReviseScheduler: what every run obeys, whatever a model predicts."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rq_draft_revise import DraftAndReviseScheduler


SELECTIONS = ("random", "top-c", "top-c-50%")
MASK = 50
DEPTH = 2


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def masked_codes(masked: torch.Tensor) -> torch.Tensor:
    """A code map `(B, h, w, DEPTH)` of zeros that is masked where `masked` `(B, h, w)` is."""
    return torch.where(masked, MASK, 0).unsqueeze(-1).repeat(1, 1, 1, DEPTH)


def all_masked(batch_size: int, height: int, width: int) -> torch.Tensor:
    return masked_codes(torch.ones(batch_size, height, width, dtype=torch.bool))


def predict(step) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a model: stacks and log-probabilities that depend on an image's own numbers alone."""
    stacks = 1 + (step.uniforms * (MASK - 1)).long()  # never 0, which is what `masked_codes` starts from
    return stacks, step.uniforms.log().sum(dim=-1)


def run(scheduler, sample, generator=None, region=None):
    """Every step as `(timestep, sample before, step input, model output, sample after)`."""
    scheduler.set_partitions(sample, MASK, generator, region)
    for timestep in scheduler.timesteps.tolist():
        step = scheduler.get_step_input(sample, timestep)
        output = predict(step)
        after = scheduler.step(output, timestep, sample).prev_sample
        yield timestep, sample, step, output, after
        sample = after


def outcome(scheduler, sample, *args):
    """The code map after all steps."""
    return [sample, *(after for *_, after in run(scheduler, sample, *args))][-1]


def is_masked(codes: torch.Tensor) -> torch.Tensor:
    """`(B, N)`: positions whose whole stack is masked; a stack masked in part fails."""
    masked = (codes == MASK).flatten(1, 2)
    assert (masked.any(dim=-1) == masked.all(dim=-1)).all()
    return masked.all(dim=-1)


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`(B, N)`: positions where two code maps differ."""
    return (before != after).flatten(1, 2).any(dim=-1)


def assert_balanced_partition(blocks: list[torch.Tensor], whole: torch.Tensor) -> None:
    """`blocks` `(B, N)` bool hold each position of `whole` once and no other, in sizes that differ by one at most."""
    blocks = torch.stack(blocks)
    assert torch.equal(blocks.sum(dim=0), whole.long())
    sizes = blocks.sum(dim=2)
    assert (sizes.amax(dim=0) - sizes.amin(dim=0)).max() <= 1


@st.composite
def ragged_masks(draw, smallest=0):
    """`(B, h, w)` bool; each image has its own positions, at least `smallest` in the image that has the most."""
    batch_size, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = batch_size * height * width
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    masked = torch.tensor(bits).view(batch_size, height, width)
    if masked.flatten(1).sum(dim=1).max() < smallest:
        masked[0] = True
    return masked


laws = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@laws
@given(masked=ragged_masks(smallest=1), selection=st.sampled_from(SELECTIONS), data=st.data())
def test_a_draft_writes_each_masked_position_once_in_balanced_blocks(masked, selection, data):
    most = int(masked.flatten(1).sum(dim=1).max())
    steps = data.draw(st.integers(1, most), label="num_inference_steps")
    scheduler = DraftAndReviseScheduler(steps, num_revisions=0, selection=selection)
    blocks = []
    for timestep, before, step, _, after in run(scheduler, masked_codes(masked)):
        assert scheduler.is_draft(timestep)
        assert torch.equal(step.codes, before)  # only what was masked anyway is asked for
        block = is_masked(before) & ~is_masked(after)
        assert torch.equal(changed(before, after), block)
        blocks.append(block)
    assert_balanced_partition(blocks, masked.flatten(1))


@laws
@given(region=ragged_masks(smallest=1), whole=st.booleans(), data=st.data())
def test_a_revision_masks_and_changes_each_position_of_the_region_once(region, whole, data):
    most = int(region.flatten(1).sum(dim=1).max()) if not whole else region[0].numel()
    steps = data.draw(st.integers(1, most), label="num_revise_steps")
    scheduler = DraftAndReviseScheduler(num_revise_steps=steps, num_revisions=2)
    scheduler.set_timesteps(num_inference_steps=0)
    sample = masked_codes(torch.zeros_like(region))
    blocks = []
    for timestep, before, step, output, after in run(scheduler, sample, region=None if whole else region):
        assert not scheduler.is_draft(timestep)
        block = is_masked(step.codes)
        assert torch.equal(changed(before, step.codes), block)
        assert not changed(before, after)[~block].any()
        # what is written is what was predicted there
        for row, position in block.nonzero().tolist():
            column = step.positions[row].tolist().index(position)
            assert torch.equal(after[row].flatten(0, 1)[position], output[0][row, column])
        blocks.append(block)
    whole = torch.ones_like(region) if whole else region
    assert_balanced_partition(blocks[:steps], whole.flatten(1))
    assert_balanced_partition(blocks[steps:], whole.flatten(1))


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_partitions_are_uniform_and_independent_of_each_other():
    images, positions, steps = 3000, 12, 4
    size = positions // steps
    scheduler = DraftAndReviseScheduler(steps, num_revise_steps=steps, num_revisions=2)
    scheduler.set_partitions(all_masked(images, 3, 4), MASK, torch.Generator().manual_seed(0))
    blocks = torch.stack([scheduler.get_step_input(all_masked(images, 3, 4), t).positions for t in range(3 * steps)])
    block_of = torch.zeros(3, images, positions, dtype=torch.long)  # which block a position is in, by phase
    for t, members in enumerate(blocks):
        block_of[t // steps].scatter_(1, members, t % steps)

    # Under the law the statistics have means of about their degrees of freedom and variances of twice that; the bounds
    # lie five standard deviations above. A partition of neighbours, or one that is shared by images, is far beyond.
    def bound(freedom):
        return freedom + 5 * (2 * freedom) ** 0.5

    for phase in block_of:
        # every position is as often in every block
        counts = torch.nn.functional.one_hot(phase, steps).sum(dim=0).double()
        assert chi_square(counts, images / steps) < bound((positions - 1) * (steps - 1))
        # every pair of positions is as often in one block
        together = (
            (phase.unsqueeze(2) == phase.unsqueeze(1))
            .sum(dim=0)
            .double()[tuple(torch.triu_indices(positions, positions, 1))]
        )
        assert chi_square(together, images * (size - 1) / (positions - 1)) < bound(positions * (positions - 1) / 2)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        # the block in one phase says nothing of the block in another
        pairs = torch.bincount((block_of[one] * steps + block_of[other]).flatten(), minlength=steps**2).double()
        assert chi_square(pairs, images * positions / steps**2) < bound((steps - 1) ** 2)


@laws
@given(masked=ragged_masks(smallest=1), data=st.data(), seed=st.integers(0, 2**16))
def test_top_c_keeps_exactly_the_most_confident(masked, data, seed):
    steps = data.draw(st.integers(1, int(masked.flatten(1).sum(dim=1).max())), label="num_inference_steps")
    scheduler = DraftAndReviseScheduler(steps, num_revisions=0, selection="top-c")
    generator = torch.Generator().manual_seed(seed)
    for _, before, step, (_, log_probs), after in run(scheduler, masked_codes(masked), generator):
        for row, undrafted in enumerate(is_masked(before)):
            kept = changed(before, after)[row]
            confidence = dict(zip(step.positions[row].tolist(), log_probs[row].tolist()))
            ranked = sorted(undrafted.nonzero().flatten().tolist(), key=confidence.get, reverse=True)
            assert set(ranked[: int(kept.sum())]) == set(kept.nonzero().flatten().tolist())


def test_top_c_50_keeps_a_uniform_choice_among_the_more_confident_half():
    images, positions = 4000, 9
    confidence = torch.linspace(0, -3, positions)[
        torch.randperm(positions, generator=torch.Generator().manual_seed(1))
    ]
    for steps in (1, 2, 4, 9):
        scheduler = DraftAndReviseScheduler(steps, num_revisions=0, selection="top-c-50%")
        sample = all_masked(images, 3, 3)
        scheduler.set_partitions(sample, MASK, torch.Generator().manual_seed(0))
        for timestep in range(steps):
            step = scheduler.get_step_input(sample, timestep)
            log_probs = confidence[step.positions]
            after = scheduler.step((torch.ones_like(step.uniforms).long(), log_probs), timestep, sample).prev_sample
            kept = changed(sample, after)
            undrafted = is_masked(sample)
            size, remaining = int(kept[0].sum()), int(undrafted[0].sum())
            pool_size = max((remaining + 1) // 2, size)
            ranked = (
                confidence.expand_as(undrafted).masked_fill(~undrafted, -torch.inf).argsort(dim=1, descending=True)
            )
            by_rank = kept.gather(1, ranked)  # (images, positions), the most confident first
            assert not by_rank[:, pool_size:].any()
            assert (by_rank.sum(dim=1) == size).all()
            expected = images * size / pool_size
            counts = by_rank[:, :pool_size].sum(dim=0).double()
            assert chi_square(counts, expected) < pool_size + 5 * (2 * pool_size) ** 0.5
            sample = after


@laws
@given(masked=ragged_masks(), selection=st.sampled_from(SELECTIONS), with_region=st.booleans(), data=st.data())
def test_a_row_of_a_batch_equals_the_single_run(masked, selection, with_region, data):
    """Also where other images have more positions: the steps they need beyond this one's leave it as it is."""
    region = masked | (torch.rand(masked.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    region = region if with_region else torch.ones_like(region)
    to_draft, to_revise = masked.flatten(1).sum(dim=1), region.flatten(1).sum(dim=1)
    most_draft, most_revise = int(to_draft.max()), int(to_revise.max())
    draft_steps = data.draw(st.integers(min(1, most_draft), most_draft), label="num_inference_steps")
    revise_steps = data.draw(st.integers(1, max(1, most_revise)), label="num_revise_steps")
    scheduler = DraftAndReviseScheduler(selection=selection)
    scheduler.set_timesteps(draft_steps, revise_steps, num_revisions=2 if most_revise else 0)
    sample, seeds = masked_codes(masked), range(len(masked))
    together = outcome(scheduler, sample, generators(*seeds), region if with_region else None)
    for row in seeds:
        one = slice(row, row + 1)
        revise_alone = min(revise_steps, int(to_revise[row]))
        scheduler.set_timesteps(min(draft_steps, int(to_draft[row])), max(1, revise_alone), 2 if revise_alone else 0)
        alone = outcome(scheduler, sample[one], generators(row), region[one] if with_region else None)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_first_image_of_one_generator_equals_the_single_run_and_the_second_differs(selection):
    scheduler = DraftAndReviseScheduler(4, selection=selection)
    together = outcome(scheduler, all_masked(2, 4, 4), torch.Generator().manual_seed(0))
    alone = outcome(scheduler, all_masked(1, 4, 4), torch.Generator().manual_seed(0))
    assert torch.equal(together[0], alone[0]) and not torch.equal(together[1], alone[0])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_draft_does_not_depend_on_the_revisions_after_it(selection):
    drafts = []
    for num_revisions, num_revise_steps in ((0, 1), (1, 2), (3, 5)):
        scheduler = DraftAndReviseScheduler(6, num_revise_steps, num_revisions, selection=selection)
        steps = list(run(scheduler, all_masked(2, 4, 4), generators(1, 2)))
        drafts.append(torch.stack([after for *_, after in steps[:6]]))
    assert torch.equal(drafts[0], drafts[1]) and torch.equal(drafts[0], drafts[2])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_region_of_everything_equals_none(selection):
    scheduler = DraftAndReviseScheduler(5, num_revise_steps=3, num_revisions=2, selection=selection)
    everything = torch.ones(2, 4, 4, dtype=torch.bool)
    without = [after for *_, after in run(scheduler, all_masked(2, 4, 4), generators(1, 2))]
    within = [after for *_, after in run(scheduler, all_masked(2, 4, 4), generators(1, 2), everything)]
    assert torch.equal(torch.stack(without), torch.stack(within))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_shapes_are_known_before_the_run(selection):
    def shapes(seed):
        """Of other positions, other codes and other predictions, but as many positions to draft."""
        generator = torch.Generator().manual_seed(seed)
        masked = torch.zeros(2, 16, dtype=torch.bool)
        for row, count in enumerate((11, 6)):
            masked[row, torch.randperm(16, generator=generator)[:count]] = True
        scheduler = DraftAndReviseScheduler(4, num_revise_steps=3, num_revisions=1, selection=selection)
        return [tuple(step.positions.shape) for _, _, step, _, _ in run(scheduler, masked_codes(masked.view(2, 4, 4)))]

    drafted = {"random": [2, 3, 3, 3], "top-c": [11, 9, 6, 3], "top-c-50%": [11, 9, 6, 3]}[selection]
    revised = [5, 5, 6]
    assert shapes(0) == shapes(1) == shapes(2) == [(2, n) for n in drafted + revised]


class NoHostRead(TorchDispatchMode):
    """Refuses every operation that would wait for an accelerator, to read a value or to learn a shape."""

    forbidden = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} waits for the device"
        indexed_by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert not indexed_by_mask, f"{name} by a mask waits for the device"
        return func(*args, **kwargs)


def test_the_mode_that_refuses_host_reads_does_so():
    for read in (lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item()):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostRead():
            read(torch.ones(3))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_reads_nothing_back(selection):
    masked = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    scheduler = DraftAndReviseScheduler(3, num_revise_steps=2, num_revisions=2, selection=selection)
    sample = masked_codes(masked)
    scheduler.set_partitions(sample, MASK, generators(1, 2))
    timesteps = scheduler.timesteps.tolist()  # on the CPU, so that reading one waits for nothing
    with NoHostRead():
        for timestep in timesteps:
            step = scheduler.get_step_input(sample, timestep)
            sample = scheduler.step(predict(step), timestep, sample).prev_sample
    assert not is_masked(sample).any()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_is_one_graph(selection):
    scheduler = DraftAndReviseScheduler(3, num_revise_steps=2, num_revisions=1, selection=selection)
    sample = all_masked(2, 4, 4)
    expected = [after for *_, after in run(scheduler, sample, generators(1, 2))]

    @torch.compile(backend="eager", fullgraph=True)
    def whole_step(sample, timestep):
        step = scheduler.get_step_input(sample, timestep)
        return scheduler.step(predict(step), timestep, sample).prev_sample

    for timestep in (0, 3):  # one of the draft, one of the revision
        before = sample if timestep == 0 else expected[timestep - 1]
        assert torch.equal(whole_step(before, timestep), expected[timestep])


# The interface of diffusers


def test_timesteps_count_through_the_draft_and_each_revision():
    scheduler = DraftAndReviseScheduler()
    assert scheduler.timesteps.tolist() == list(range(64 + 3 * 2)) and len(scheduler) == 70
    scheduler.set_timesteps(5, 3, 2, device="cpu")
    assert scheduler.timesteps.tolist() == list(range(11))
    assert [scheduler.is_draft(t) for t in scheduler.timesteps] == [True] * 5 + [False] * 6
    scheduler.set_timesteps(num_revisions=0)
    assert scheduler.num_inference_steps == 64 and len(scheduler) == 64
    assert scheduler.order == 1


def test_a_step_returns_prev_sample_or_a_tuple_and_takes_a_timestep_as_a_number_or_a_tensor():
    scheduler = DraftAndReviseScheduler(4, num_revisions=0)
    sample = all_masked(1, 2, 4)
    scheduler.set_partitions(sample, MASK, torch.Generator().manual_seed(0))
    step = scheduler.get_step_input(sample, scheduler.timesteps[2])
    output = predict(step)
    before = sample.clone()
    prev_sample = scheduler.step(output, scheduler.timesteps[2], sample).prev_sample
    (same,) = scheduler.step(output, 2, sample, generator=torch.Generator(), return_dict=False)
    assert torch.equal(prev_sample, same) and prev_sample.shape == sample.shape
    assert torch.equal(sample, before)  # never in place: a callback may hold on to it


def test_every_default_survives_saving(tmp_path):
    changed = dict(
        num_inference_steps=7,
        num_revise_steps=4,
        num_revisions=5,
        guidance_scale=1.4,
        temperature=0.7,
        draft_guidance_scale=1.1,
        draft_temperature=0.9,
        selection="top-c-50%",
        top_k=11,
        top_p=0.5,
    )
    for arguments in ({}, changed):
        scheduler = DraftAndReviseScheduler(**arguments)
        scheduler.save_config(tmp_path)
        for loaded in (
            DraftAndReviseScheduler.from_pretrained(tmp_path),
            DraftAndReviseScheduler.from_config(DraftAndReviseScheduler.load_config(tmp_path)),
        ):
            assert {name: loaded.config[name] for name in changed} == {
                name: scheduler.config[name] for name in changed
            }
            assert torch.equal(loaded.timesteps, scheduler.timesteps) and loaded.selection == scheduler.selection
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {name: saved[name] for name in changed} == changed
    assert set(saved) - set(changed) == {"_class_name", "_diffusers_version"}


def test_a_refused_call_leaves_the_run_as_it_is():
    scheduler = DraftAndReviseScheduler(4, num_revise_steps=2, num_revisions=1)
    sample = all_masked(2, 3, 3)
    expected = [after for *_, after in run(scheduler, sample, generators(1, 2))]
    for bad in (
        dict(num_inference_steps=-1),
        dict(num_revise_steps=0),
        dict(num_revisions=1.5),
        dict(num_inference_steps=5, selection="best"),
    ):
        with pytest.raises(ValueError, match=f"`{list(bad)[-1]}`"):
            scheduler.set_timesteps(**bad)
    with pytest.raises(ValueError, match="`generator`"):
        scheduler.set_partitions(sample, MASK, generators(1))
    for timestep, after in enumerate(expected):
        step = scheduler.get_step_input(sample, timestep)
        sample = scheduler.step(predict(step), timestep, sample).prev_sample
        assert torch.equal(sample, after)


def test_new_timesteps_need_new_partitions():
    scheduler = DraftAndReviseScheduler(4)
    sample = all_masked(1, 3, 3)
    with pytest.raises(ValueError, match="`set_partitions` must be called"):
        scheduler.get_step_input(sample, 0)
    scheduler.set_partitions(sample, MASK)
    step = scheduler.get_step_input(sample, 0)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="`set_partitions` must be called"):
        scheduler.step(predict(step), 0, sample)


def test_steps_must_fit_the_positions():
    half = torch.zeros(2, 4, 4, dtype=torch.bool)
    half[0, :2] = True
    for sample, region, steps, name, allowed in (
        (all_masked(1, 4, 4), None, (17, 1, 0), "num_inference_steps", "[1, 16]"),
        (all_masked(1, 4, 4), None, (0, 1, 0), "num_inference_steps", "[1, 16]"),
        (masked_codes(half), None, (9, 1, 0), "num_inference_steps", "[1, 8]"),
        (masked_codes(half & False), None, (1, 1, 0), "num_inference_steps", "[0, 0]"),
        (all_masked(1, 4, 4), None, (1, 17, 1), "num_revise_steps", "[1, 16]"),
        (masked_codes(half & False), half, (0, 9, 1), "num_revise_steps", "[1, 8]"),
    ):
        scheduler = DraftAndReviseScheduler()
        scheduler.set_timesteps(*steps)
        got = getattr(scheduler, name)
        with pytest.raises(ValueError, match=re.escape(f"`{name}` must lie in {allowed}") + f".*got {got}"):
            scheduler.set_partitions(sample, MASK, region=region)
    # without a revision its steps are not looked at
    scheduler.set_timesteps(0, 17, 0)
    scheduler.set_partitions(masked_codes(half & False), MASK)
