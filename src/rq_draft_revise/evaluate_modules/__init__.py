"""The metrics as modules for `evaluate.load`: images in, a dictionary out, over any number of processes.

    import evaluate
    from rq_draft_revise.evaluate_modules import module_path

    fid = evaluate.load(module_path("fid"), inception_weights="weights-inception-2015-12-05-6726825d.pth")
    fid.add_batch(predictions=images)
    print(fid.compute(reference="statistics.npz"))

With several processes, each loads the module with `process_id`, `num_process` and a common `experiment_id`, and adds
its own images; process 0 gets the dictionary and the others None. A process without images calls `compute` all the
same: the others wait for it. The features are computed where the images are added, and only they go through evaluate's
files.

A `compute` that is refused loses no image: call it again with other arguments, or add more first. Of several
processes, process 0 alone calls it again.

Importing this needs `evaluate`, of the `eval` extra.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as ListOf
from PIL import Image
from torch import Tensor

from rq_draft_revise.features import FeatureNetwork, NetworkOutput, get_protocol, load_feature_network
from rq_draft_revise.images import to_rgb
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

    Floats are refused: how they are rounded is the protocol's, see [`~features.Protocol.to_uint8`]. PIL images of
    other modes become RGB by [`~images.to_rgb`]: alpha is dropped, 16 bits are scaled to 8.

    Returns:
        uint8 `(B, 3, H, W)`.

    Raises:
        `ValueError`: anything else, with the place of the image in the batch.
    """
    if images is None or isinstance(images, Image.Image):
        raise ValueError(f"`{name}` must be a batch of images, got {type(images).__name__}.")
    stacked = []
    for place, image in enumerate(images):
        if isinstance(image, Image.Image):
            try:
                image = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
            except ValueError as error:
                raise ValueError(f"`{name}` cannot be taken, image {place} of the batch: {error}") from error
        elif isinstance(image, np.ndarray) and image.ndim == 3:
            image = torch.from_numpy(image).permute(2, 0, 1)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
            kind = "None: the image is missing" if image is None else kind
            raise ValueError(
                f"`{name}` must be PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), got for image "
                f"{place} of the batch {kind}."
            )
        stacked.append(image)
    if len({image.shape for image in stacked}) != 1:
        raise ValueError(f"`{name}` must be of one size and not empty, got {[tuple(i.shape[1:]) for i in stacked]}.")
    return torch.stack(stacked)


class ImageMetric(evaluate.Metric):
    """What the modules have in common: images become columns of numbers as they are added.

    A subclass says what an image becomes (`_columns`, `_rows`), what `compute` may be given (`_options`), and what all
    images come to (`_compute`).
    """

    description = ""

    def __init__(self, *args, **kwargs):
        self.size: tuple[int, int] | None = None  # height and width of the images added here
        self.kept: Dataset | None = None  # rows of all processes that a refused `compute` has gathered
        super().__init__(*args, **kwargs)

    def _columns(self) -> dict[str, Any]:
        """Columns of numbers, one row an image, beside `id`."""
        raise NotImplementedError

    def _rows(self, predictions: Tensor, references: Any) -> dict[str, np.ndarray]:
        """The columns of a batch, of uint8 images `(B, 3, H, W)`."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of `compute`, checked, as `_compute` takes them."""
        return {}

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

        Raises:
            `ValueError`: images or `ids` that do not fit; none of the batch is added.
        """
        if self.writer is None and self.cache_file_name is not None:
            raise ValueError("`compute` has not come to an end: call it again before more images are added.")
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
            kwargs: Those of the module. Only process 0 looks at them.

        Raises:
            `ValueError`: what cannot be computed. The images added before stay, and can be computed again with other
                arguments. So do this call's `predictions` with several processes; with one they are taken back.
        """
        options = self._options(**kwargs) if self.process_id == 0 else {}  # before anything is added or gathered
        size, num_before = self.size, len(self)
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, ids=ids)
        num_own = len(self) - num_before
        if self.writer is None and self.cache_file_name is None and self.kept is None:
            if self.num_process == 1:
                raise ValueError("`predictions` must be given, or added before: there are no images.")
            # The others wait for this process's file, be it empty.
            self.selected_feature_format = self.features
            self._init_writer()
        try:
            scores = super().compute(**options)
        except BaseException:
            if self.num_process == 1:
                self.size = size
            if self.data is not None:
                self._keep(len(self.data) - (num_own if self.num_process == 1 else 0))
            raise
        self.data = self.kept = self.size = None
        return scores

    def _finalize(self) -> None:
        """All rows as `self.data`, those of a refused `compute` first."""
        if self.writer is None and self.cache_file_name is None and self.kept is not None:
            self.data, self.file_paths, self.filelocks = self.kept, [], []  # nothing was added since
            return
        super()._finalize()
        if self.kept is not None:
            self.data = concatenate_datasets([self.kept, self.data])

    def _keep(self, num_rows: int) -> None:
        """Copy the first rows of `self.data` into memory, and free the files for what is added next."""
        table, buffer = self.data.data.slice(0, num_rows), pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            for batch in table.to_batches():
                stream.write_batch(batch)
        self.kept = Dataset.from_buffer(buffer.getvalue()) if num_rows else None
        self.data = self.buf_writer = None
        for path, lock in reversed(list(zip(self.file_paths or [], self.filelocks or []))):
            os.remove(path)
            lock.release()
        self.file_paths = self.filelocks = None

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise ValueError("`predictions` must be added by at least one process: there are no images.")
        known = [i for i in ids if i >= 0]
        if len(known) != len(set(known)):
            raise ValueError(
                f"`ids` must be different for different images: {len(known) - len(set(known))} of {len(known)} were "
                "added more than once."
            )


def named_network(network: Callable[[Tensor], Any], device: torch.device | str = "cpu") -> FeatureNetwork:
    """A callable as a `FeatureNetwork` that statistics of another one are not taken for.

    Its name is its attribute `name`, or that of a function or of a module's class; its digest its attribute `sha256`,
    or that of a module's weights.

    Raises:
        `ValueError`: nothing tells it from others: a lambda, a partial or a module without weights, and no attribute.
    """
    name, own = getattr(network, "name", None), True
    if not isinstance(name, str):
        own = inspect.isfunction(network) and network.__name__ != "<lambda>"
        name = getattr(network, "__name__", type(network).__name__)
    wrapped = FeatureNetwork(network, name, device, getattr(network, "sha256", None))
    if not own and wrapped.sha256 is None:
        raise ValueError(
            f"`network` must have a name of its own, by which statistics of other networks are refused, got {name!r}: "
            "give `features.FeatureNetwork(network, name)`, a function made by `def`, or a network with an attribute "
            "`name` or `sha256`."
        )
    return wrapped


class FeatureMetric(ImageMetric):
    """A metric of the features or logits of a network, given at `evaluate.load`.

    Args:
        network: A `FeatureNetwork`, a callable from uint8 `(B, 3, H, W)` to `(B, F)` that `named_network` takes, or
            what `load_feature_network` takes: `"inception"` (the default), a classifier's folder, a TorchScript file.
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
            network = named_network(network, device)
        self.network: FeatureNetwork = network
        super().__init__(*args, **kwargs)

    def _columns(self) -> dict[str, Any]:
        # The sizes go with the rows: another process may have added others.
        return {"height": Value("int64"), "width": Value("int64"), self.column: ListOf(Value("float32"))}

    def _rows(self, predictions: Tensor, references: Any) -> dict[str, np.ndarray]:
        size = tuple(predictions.shape[2:])
        if self.size not in (None, size):
            raise ValueError(f"`predictions` must all be of one size (height, width), got {size} after {self.size}.")
        output: NetworkOutput = self.network(predictions)
        values = getattr(output, self.column)
        if values is None:
            raise ValueError(f"The network {self.network.name!r} returns no {self.column}, which this metric needs.")
        self.size = size
        height, width = (np.full(len(predictions), side) for side in size)
        return {"height": height, "width": width, self.column: values.numpy()}

    def _options(self, allow_few_samples: bool = False) -> dict[str, Any]:
        return {"allow_few_samples": allow_few_samples}

    def _gather(
        self,
        id: Sequence[int],
        height: Sequence[int],
        width: Sequence[int],
        values: Sequence[Sequence[float]],
        allow_few_samples: bool,
        reference: ReferenceStatistics | None = None,
        trust_reference: bool = False,
    ) -> Tensor:
        """All features, after the checks that every metric has."""
        self._check_ids(id)
        sizes = sorted(set(zip(height, width)))
        if len(sizes) > 1:
            raise ValueError(f"`predictions` must all be of one size (height, width), got {sizes}.")
        if reference is not None:
            self._check_comparable(reference, sizes[0], trust_reference)
        check_num_samples(len(values), allow_few_samples, "predictions")
        return torch.tensor(np.asarray(values, dtype=np.float32))

    def _load_reference(self, reference: Any, trust_reference: bool) -> ReferenceStatistics:
        """The reference, after the checks that need no images."""
        if not isinstance(reference, ReferenceStatistics):
            if reference is None:
                raise ValueError("`reference` must be given: statistics by examples/compute_statistics.py, or ADM's.")
            reference = ReferenceStatistics.load(reference)
        self._check_comparable(reference, self.size, trust_reference)
        return reference

    def _check_comparable(self, reference: ReferenceStatistics, size: tuple[int, int] | None, trust: bool) -> None:
        reference.check_comparable(size, self.protocol.name, self.network.name, self.network.sha256, trust)
