"""What a training starts from: models that fit together, names of the classes learned, averages where weights are."""

from types import SimpleNamespace

import pytest
import torch
import train_imagenet
from accelerate import Accelerator
from components import tiny_pipeline, tiny_vae
from datasets import ClassLabel, Dataset, Features

from rq_draft_revise.training import load_models
from rq_draft_revise.training_run import AveragedWeights, exported_weights


pytestmark = pytest.mark.usefixtures("no_trace", "one_process_on_the_cpu")


@pytest.fixture
def saved(tmp_path):
    tiny_pipeline("class").save_pretrained(tmp_path / "pipeline")
    tiny_vae(seed=1).save_pretrained(tmp_path / "other-vae")
    return tmp_path


def models(folder, vae=None, transformer_config=None):
    args = SimpleNamespace(
        pretrained_model_name_or_path=str(folder / "pipeline"),
        vae=None if vae is None else str(folder / vae),
        transformer_config=None if transformer_config is None else str(folder / transformer_config),
        model="contextual",
    )
    return load_models(args, Accelerator())


def test_a_transformer_goes_on_with_its_own_rqvae_and_begins_with_any(saved):
    models(saved)
    models(saved, vae="pipeline/vae")
    vae, transformer = models(saved, vae="other-vae", transformer_config="pipeline/transformer")
    assert torch.equal(transformer.codebook, vae.quantizer.codebook)
    with pytest.raises(
        ValueError, match="on the codes of another RQ-VAE .*`--transformer_config .*pipeline/transformer`"
    ):
        models(saved, vae="other-vae")


WNIDS = [f"n{i:08d}" for i in range(5)]


@pytest.mark.parametrize(
    "names, expected",
    [
        (None, {0: "class 0, alias 0", 4: "class 4, alias 4"}),  # numbers alone: those of the pipeline
        (WNIDS, {0: "class 0, alias 0", 4: "class 4, alias 4"}),  # all of ImageNet's folders: the usual names
        (WNIDS[2:], {0: WNIDS[2], 2: WNIDS[4]}),  # some of them: not the first names of the pipeline
        (["a", "b", "c", "d", "e"], {0: "a", 4: "e"}),
    ],
)
def test_names_are_of_the_labels_that_are_learned(saved, names, expected):
    features = None if names is None else Features(label=ClassLabel(names=names))
    dataset = Dataset.from_dict({"label": [0, 1]}, features=features)
    args = SimpleNamespace(
        pretrained_model_name_or_path=str(saved / "pipeline"), model="contextual", label_column="label"
    )
    known = {int(label): name for label, name in train_imagenet.class_names(args, dataset, 5).items()}
    assert known.items() >= expected.items() and len(known) == (5 if names is None else len(names))


def test_resumed_averages_are_where_the_weights_are():
    """accelerate reads a checkpoint into the memory of the CPU. The meta device stands for a GPU."""
    weights = [torch.nn.Parameter(torch.zeros(3, 3, device="meta"))]
    average = AveragedWeights(weights, 0.999)
    average.to("meta")
    average.load_state_dict(average.state_dict() | {"shadow_params": [torch.ones(3, 3)]})
    average.step(weights)
    average.copy_to(weights)
    assert average.shadow_params[0].device.type == "meta"


def test_after_a_validation_that_fails_the_weights_are_those_that_train():
    weight = torch.nn.Parameter(torch.ones(3))
    ema = AveragedWeights([weight], 0.5)
    with torch.no_grad():
        weight.fill_(2)
    with pytest.raises(ZeroDivisionError), exported_weights(ema, [weight]):
        assert weight.tolist() == [1, 1, 1]
        raise ZeroDivisionError
    assert weight.tolist() == [2, 2, 2]
