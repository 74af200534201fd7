"""Two processes learn one codebook: real processes, real collectives."""

import pytest
import torch
import torch.distributed as dist
from components import run_in_two_processes, tiny_vae


STEPS = 5
SCENARIOS = {
    "restarts": {"restart_threshold": 0.5},
    "restarts, separate codebooks": {"restart_threshold": 0.5, "shared_codebook": False},
    "more codes than vectors": {"codebook_size": 300},
    "no restarts": {"restart_threshold": 0.0},
    "no restarts, separate codebooks": {"restart_threshold": 0.0, "shared_codebook": False},
}


def latents_of(rank: int, step: int) -> torch.Tensor:
    """Every process has its own vectors, and the last batch of an epoch is not the same size everywhere."""
    size = 3 - rank if step == STEPS - 1 else 3
    return torch.randn(size, 16, 4, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def learn(folder: str) -> None:
    """In each of two processes."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # processes need not agree on their random numbers
    history = {}
    for name, config in SCENARIOS.items():
        vae = tiny_vae(**config)
        history[name] = []
        for step in range(STEPS):
            # What restarts move onto is chosen by the first process; the others' generators need not agree with it.
            generator = torch.Generator().manual_seed(step + 10 * rank)
            output = vae.update_codebook(latents_of(rank, step), generator=generator)
            state = {key: tensor.clone() for key, tensor in vae.quantizer.state_dict().items()}
            history[name].append({**state, **output})
    torch.save(history, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """For each of two processes and each scenario, buffers and report after every update."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_two_processes("import sys\nfrom test_codebook_processes import learn\n\nlearn(sys.argv[1])\n", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_hold_bit_identical_codebooks_after_every_update(histories, name):
    first, second = (history[name] for history in histories)
    previous = tiny_vae(**SCENARIOS[name]).quantizer.codebook
    for step in range(STEPS):
        for key, tensor in first[step].items():
            assert torch.equal(tensor, second[step][key]), f"{key} differs after update {step}"
        assert not torch.equal(first[step]["codebook"], previous), "an update that changes nothing proves nothing"
        previous = first[step]["codebook"]
    restarted = sum(int(report["num_restarted"]) for report in first)
    assert restarted == 0 if name.startswith("no restarts") else restarted > STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_learn_what_one_learns_from_all_their_data(histories, name):
    """Restarts included: they move onto the same vectors, whichever process has them."""
    vae = tiny_vae(**SCENARIOS[name])
    for step in range(STEPS):
        latents = [latents_of(rank, step) for rank in range(2)]
        output = vae.update_codebook(latents, generator=torch.Generator().manual_seed(step))
        report = histories[0][name][step]
        for key, tensor in {**vae.quantizer.state_dict(), **output}.items():
            torch.testing.assert_close(report[key], tensor, rtol=1e-4, atol=1e-6)
