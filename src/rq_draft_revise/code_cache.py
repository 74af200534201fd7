"""Images as the codes of a frozen RQ-VAE: encoded once, kept in memory or in a data set.

An image may have several *views*, of which training reads one at a time: random crops, codes drawn at random, and the
mirrored image of each.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .data import CODES_COLUMN, SkippedRows
from .decoded_images import decoded_rows, to_pixel_values
from .rqvae import RQVAEModel
from .waiting import wait_for_everyone
from .whole_files import whole_file


if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator


# Images whose codes are drawn at once: of 16, the probabilities of 4 x 16,384 codes a position are 0.25 GiB.
SOFT_BATCH_SIZE = 16

# A function from rows and numbers in [0, 1), both `(B,)`, to the codes `(B, h, w, D)` of one view of each.
ReadCodes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def encode(vae: RQVAEModel, pixel_values: torch.Tensor, tau: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Codes `(B, h, w, D)`, in float32 whatever the precision of the transformer: they are the targets of training.

    Args:
        tau (`float`, defaults to 0): Draw each code from softmax(-distance² / tau), with a generator seeded by `seed`.
            0 takes the nearest.
    """
    with torch.autocast(pixel_values.device.type, enabled=False):
        if tau == 0:
            return vae.encode(pixel_values).codes
        generator = torch.Generator(pixel_values.device).manual_seed(seed)
        parts = pixel_values.split(SOFT_BATCH_SIZE)
        return torch.cat([vae.soft_codes(part, tau, stochastic=True, generator=generator).codes for part in parts])


def encoded_rows(
    dataset: "datasets.Dataset",
    vae: RQVAEModel,
    image_column: str,
    resolution: int,
    rows: "range | list[int]",
    device: torch.device,
    batch_size: int = 64,
    num_draws: int = 1,
    random_flip: bool = False,
    random_crop: bool = False,
    tau: float = 0.0,
    seed: int = 0,
    first_row: int = 0,
    num_workers: int = 0,
    skipped: SkippedRows | None = None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Encode rows of a data set.

    Args:
        rows: Which ones, without repetition.
        num_draws (`int`, defaults to 1): Views of each image, apart from mirroring. Without `random_crop` and `tau`
            they would be the same.
        random_flip (`bool`, defaults to `False`): As many views more, of the mirrored image.
        random_crop (`bool`, defaults to `False`): A random square of the image, in each draw another.
        tau (`float`, defaults to 0): See [`encode`].
        seed (`int`, defaults to 0), first_row (`int`, defaults to 0): Crops are drawn from (seed, first_row + row,
            draw), so that a part of a larger data set that begins there is encoded as it would be in the whole.

    Yields:
        Rows, without those that cannot be read, and their codes `(rows, views, h, w, D)` on the CPU, uint16 where the
        codebook allows and int32 elsewhere.
    """
    batches = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    # One decoding serves all draws unless each has its own crop.
    num_decodings = num_draws if random_crop else 1

    def crop(row: int, draw: int) -> tuple[float, ...]:
        return tuple(np.random.default_rng([seed, first_row + row, draw]).random(2)) if random_crop else ()

    keys = [[(row, False, *crop(row, draw)) for row in batch] for batch in batches for draw in range(num_decodings)]
    decoded = decoded_rows(dataset, keys, image_column, resolution, device, num_workers, skipped, first_row)
    for batch in batches:
        plain, mirrored = [], []
        for draw in range(num_draws):
            if draw < num_decodings:
                images, indices = next(decoded)
                pixel_values = to_pixel_values(images)
            number = int(np.random.default_rng([seed, first_row + batch[0], draw]).integers(2**62))
            plain.append(encode(vae, pixel_values, tau, number))
            if random_flip:
                mirrored.append(encode(vae, pixel_values.flip(-1), tau, number + 1))
        codes = torch.stack(plain + mirrored, dim=1)
        readable = [i for i, row in enumerate(batch) if indices[i] == row]  # in the others another row stood in
        if readable:
            yield [batch[i] for i in readable], codes[readable].to(code_dtype(vae)).cpu()


def code_dtype(vae: RQVAEModel) -> torch.dtype:
    """What codes are stored as: two bytes where they fit."""
    return torch.uint16 if vae.config.codebook_size <= 2**16 else torch.int32


def fingerprint(dataset: "datasets.Dataset", vae: RQVAEModel, **settings) -> dict[str, str]:
    """What the codes of a data set depend on, as the metadata of their file."""
    return {"dataset": dataset._fingerprint, "vae": digest_of(vae)} | {k: str(v) for k, v in settings.items()}


def digest_of(vae: RQVAEModel) -> str:
    """SHA-256 of an RQ-VAE: its configuration and all its weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # no version, no path
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_codes(
    dataset: "datasets.Dataset",
    vae: RQVAEModel,
    path: str | Path,
    accelerator: "Accelerator",
    skipped: SkippedRows,
    image_column: str,
    resolution: int,
    batch_size: int = 64,
    num_workers: int = 0,
    **views,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a whole data set in memory, read from `path` if that has them, else encoded and written there.

    To be called by every process: each encodes its share.

    Args:
        views: `num_draws`, `random_flip`, `random_crop`, `tau` and `seed` of [`encoded_rows`].

    Returns:
        Rows that could be read, `(n,)` int64, and their codes `(n, views, h, w, D)`.
    """
    path = Path(path)
    metadata = fingerprint(dataset, vae, image_column=image_column, resolution=resolution, **views)

    def is_current() -> bool:
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            return file.metadata() == metadata

    reuse = is_current()
    wait_for_everyone(accelerator)  # nobody writes before all have looked
    if reuse:
        accelerator.print(f"reading the training codes from {path}")
    else:
        parts = [path.with_name(f"codes-{i}.partial") for i in range(accelerator.num_processes)]
        own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        encoded = encoded_rows(
            dataset, vae, image_column, resolution, own, accelerator.device, batch_size, num_workers=num_workers,
            skipped=skipped, **views,
        )  # fmt: skip
        rows, codes = [], []
        started = reported = time.monotonic()
        for batch_rows, batch_codes in encoded:
            rows += batch_rows
            codes.append(batch_codes)
            if time.monotonic() - reported > 30:
                reported = time.monotonic()
                rate = len(rows) / (reported - started)
                accelerator.print(f"encoded {len(rows):,} of {len(own):,} images, {rate:.1f}/s", flush=True)
        shape = (0,) if not codes else codes[0].shape[1:]
        codes = torch.cat(codes) if codes else torch.empty(0, *shape)
        save_file({"rows": torch.tensor(rows, dtype=torch.int64), "codes": codes}, parts[accelerator.process_index])
        wait_for_everyone(accelerator)
        if accelerator.is_main_process:
            shares = [load_file(part) for part in parts]
            shares = [share for share in shares if len(share["rows"])]
            if not shares:
                raise ValueError(f"`image_column` {image_column!r} has no readable image.")
            rows, order = torch.cat([share["rows"] for share in shares]).sort()
            codes = torch.from_numpy(torch.cat([share["codes"] for share in shares]).numpy()[order.numpy()])
            with whole_file(path) as aside:
                save_file({"rows": rows, "codes": codes}, aside, metadata=metadata)
            for part in parts:
                part.unlink()
        wait_for_everyone(accelerator)
    tensors = load_file(path)
    return tensors["rows"], tensors["codes"]


def codes_in_memory(codes: torch.Tensor) -> ReadCodes:
    """Read codes `(n, views, h, w, D)`: the view that a number in [0, 1) falls on."""
    num_views = codes.shape[1]
    return lambda rows, u: codes_at(codes, rows, (u * num_views).long())


def codes_at(codes: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
    """`codes[index]` as int64: indexed first and widened after, so that a cache stays at two bytes a code.

    By numpy, as torch 2.8 indexes no uint16.
    """
    return torch.from_numpy(codes.numpy()[tuple(one.numpy() for one in index)].astype(np.int64))


def codes_in_dataset(dataset: "datasets.Dataset") -> ReadCodes:
    """Read the column `codes` of a data set that `examples/encode_dataset.py` wrote, from the disk as it is needed."""
    stored = dataset.select_columns([CODES_COLUMN]).with_format("numpy")

    def read(rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        codes = np.asarray(stored[rows.tolist()][CODES_COLUMN])  # (B, views, h, w, D)
        views = (u.numpy() * codes.shape[1]).astype(np.int64)
        return torch.from_numpy(codes[np.arange(len(codes)), views].astype(np.int64))

    return read
