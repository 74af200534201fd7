"""The metrics as modules for `evaluate.load`: images in, a dictionary out, over any number of processes.

    import evaluate
    from rq_draft_revise.evaluate_modules import module_path

    fid = evaluate.load(module_path("fid"), inception_weights="weights-inception-2015-12-05-6726825d.pth")
    fid.add_batch(predictions=images)
    print(fid.compute(reference="statistics.npz"))

With several processes, each loads the module with `process_id`, `num_process` and a common `experiment_id`, and adds
its own images; process 0 gets the dictionary and the others None. The features are computed where the images are
added, and only they go through evaluate's files.

Importing this needs `evaluate`, of the `eval` extra.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from PIL import Image
from torch import Tensor

from rq_draft_revise.features import FeatureNetwork, NetworkOutput, get_protocol, load_feature_network
from rq_draft_revise.metrics import ReferenceStatistics, check_num_samples


if not hasattr(evaluate, "Metric"):
    raise ImportError(
        f"`import evaluate` found {evaluate.__file__}, not Hugging Face's library: a script run from the folder of "
        "examples/evaluate.py has that first on its path."
    )

MODULES = ("clip_score", "fid", "inception_score", "precision_recall", "reconstruction")

CITATION = """\
@inproceedings{lee2022draft,
  title     = {Draft-and-Revise: Effective Image Generation with Contextual {RQ}-Transformer},
  author    = {Lee, Doyup and Kim, Chiheon and Kim, Saehoon and Cho, Minsu and Han, Wook-Shin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}
"""


def module_path(name: str) -> str:
    """The local path that `evaluate.load` takes, of `name` in `MODULES`."""
    if name not in MODULES:
        raise ValueError(f"`name` must be one of {MODULES}, got {name!r}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def stack_images(images: Any, name: str = "predictions") -> Tensor:
    """PIL images, uint8 arrays `(H, W, 3)` or uint8 tensors `(3, H, W)`, or a batch of the latter; all of one size.

    Floats are refused: how they are rounded is the protocol's, see [`~features.Protocol.to_uint8`].

    Returns:
        uint8 `(B, 3, H, W)`.
    """
    stacked = []
    for image in images:
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        elif isinstance(image, np.ndarray) and image.ndim == 3:
            image = torch.from_numpy(image).permute(2, 0, 1)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
            raise ValueError(
                f"`{name}` must be PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), got {kind}."
            )
        stacked.append(image)
    if len({image.shape for image in stacked}) != 1:
        raise ValueError(f"`{name}` must be of one size and not empty, got {[tuple(i.shape[1:]) for i in stacked]}.")
    return torch.stack(stacked)


class ImageMetric(evaluate.Metric):
    """What the modules have in common: images become columns of numbers as they are added.

    A subclass says what an image becomes (`_columns`, `_rows`) and what all of them come to (`_compute`).
    """

    description = ""

    def _columns(self) -> dict[str, Any]:
        """Columns of numbers, one row an image, beside `id`."""
        raise NotImplementedError

    def _rows(self, predictions: Tensor, references: Any) -> dict[str, np.ndarray]:
        """The columns of a batch, of uint8 images `(B, 3, H, W)`."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=CITATION,
            inputs_description="",
            features=Features({"id": Value("int64"), **self._columns()}),
        )

    def add_batch(self, *, predictions=None, references=None, ids: Sequence[int] | None = None) -> None:
        """Add a batch of images.

        Args:
            predictions: PIL images, uint8 arrays `(H, W, 3)` or uint8 tensors `(3, H, W)`.
            references: What belongs to them, image by image: originals or captions. Only of some modules.
            ids: An integer an image, different for different images of the run, over all processes. With them, an
                image that two processes have both added is refused by `compute`; samplers that fill up the last batch
                by repeating images do that. By default nothing is known of repetitions.
        """
        images = stack_images(predictions)
        ids = [-1] * len(images) if ids is None else [int(i) for i in ids]
        if len(ids) != len(images):
            raise ValueError(f"`ids` must be one an image, got {len(ids)} for {len(images)} images.")
        columns = self._rows(images, references)
        columns = {name: [row.tolist() for row in np.asarray(column)] for name, column in columns.items()}
        super().add_batch(id=ids, **columns)

    def add(self, *, prediction=None, reference=None, id: int | None = None) -> None:
        """Add one image: see `add_batch`."""
        references = None if reference is None else [reference]
        self.add_batch(predictions=[prediction], references=references, ids=None if id is None else [id])

    def compute(self, *, predictions=None, references=None, ids=None, **kwargs) -> dict[str, Any] | None:
        """The metric of all images added so far, in process 0; None in the others.

        Args:
            predictions, references, ids: Added first, where they are given.
            kwargs: Those of the module.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, ids=ids)
        return super().compute(**kwargs)

    def _check_ids(self, ids: Sequence[int]) -> None:
        known = [i for i in ids if i >= 0]
        if len(known) != len(set(known)):
            raise ValueError(
                f"`ids` must be different for different images: {len(known) - len(set(known))} of {len(known)} were "
                "added more than once."
            )


class FeatureMetric(ImageMetric):
    """A metric of the features or logits of a network, given at `evaluate.load`.

    Args:
        network: A `FeatureNetwork`, any callable from uint8 `(B, 3, H, W)` to `(B, F)`, or what
            `load_feature_network` takes: `"inception"` (the default), a classifier's folder, a TorchScript file.
        protocol: A name of `features.PROTOCOLS`.
        inception_weights: Path of Inception's weights.
        device: Where the network runs.
    """

    column = "features"

    def __init__(
        self, *args, network="inception", protocol="torch-fidelity", inception_weights=None, device="cpu", **kwargs
    ):
        self.protocol = get_protocol(protocol)
        if isinstance(network, str):
            network = load_feature_network(network, protocol, inception_weights, device)
        elif not isinstance(network, FeatureNetwork):
            network = FeatureNetwork(network, getattr(network, "__name__", type(network).__name__), device)
        self.network: FeatureNetwork = network
        self.resolution: int | None = None
        super().__init__(*args, **kwargs)

    def _columns(self) -> dict[str, Any]:
        return {self.column: ListOf(Value("float32"))}

    def _rows(self, predictions: Tensor, references: Any) -> dict[str, np.ndarray]:
        resolution = predictions.shape[-1]
        if self.resolution not in (None, resolution):
            raise ValueError(f"`predictions` must all be of one size, got {resolution} after {self.resolution}.")
        self.resolution = resolution
        output: NetworkOutput = self.network(predictions)
        values = getattr(output, self.column)
        if values is None:
            raise ValueError(f"The network {self.network.name!r} returns no {self.column}, which this metric needs.")
        return {self.column: values.numpy()}

    def _gather(self, id: Sequence[int], values: Sequence[Sequence[float]], allow_few_samples: bool) -> Tensor:
        """All features, after the checks that every metric has."""
        self._check_ids(id)
        check_num_samples(len(values), allow_few_samples, "predictions")
        return torch.tensor(np.asarray(values, dtype=np.float32))

    def _load_reference(self, reference: Any, trust_reference: bool) -> ReferenceStatistics:
        if not isinstance(reference, ReferenceStatistics):
            if reference is None:
                raise ValueError("`reference` must be given: statistics by examples/compute_statistics.py, or ADM's.")
            reference = ReferenceStatistics.load(reference)
        reference.check_comparable(
            self.resolution, self.protocol.name, self.network.name, self.network.sha256, trust_reference
        )
        return reference
