"""The code map: what every component of the package passes on, and the one place that checks it."""

import torch
import torch.nn as nn


def check_codes(codes: torch.Tensor, code_depth: int | None, codebook_size: int, name: str = "codes") -> None:
    """Refuse what is not a code map.

    A code map holds one stack of `code_depth` codes at each of `height * width` positions. A code lies in
    `[0, codebook_size)`; a position that has not been drafted holds `mask_token_id = codebook_size` in its whole
    stack.

    Args:
        codes (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map.
        code_depth (`int`, *optional*): Codes at each position, D; any number for `None`.
        codebook_size (`int`): Size of the codebook, K.
        name (`str`): The argument's name in the error message.

    Raises:
        `ValueError`: wrong type, dtype, rank or depth; codes outside `[0, codebook_size]`; a stack that is masked in
            part. Reading the values waits for the device: this belongs before a loop, never inside one.
    """
    if not isinstance(codes, torch.Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor of int64, got {type(codes).__name__}.")
    if codes.dtype != torch.int64:
        raise ValueError(f"`{name}` must have dtype torch.int64, got {codes.dtype}.")
    if codes.ndim != 4 or code_depth not in (None, codes.shape[-1]):
        depth = "code_depth" if code_depth is None else code_depth
        raise ValueError(f"`{name}` must have shape (batch_size, height, width, {depth}), got {tuple(codes.shape)}.")
    if codes.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(codes.shape)}.")
    low, high = (int(value) for value in codes.aminmax())
    if low < 0 or high > codebook_size:
        raise ValueError(
            f"`{name}` must lie in [0, {codebook_size}] ({codebook_size} is the mask), got values in [{low}, {high}]."
        )
    masked = codes == codebook_size
    partly = masked.any(dim=-1) & ~masked.all(dim=-1)
    if partly.any():
        raise ValueError(
            f"`{name}` must be masked in whole stacks, but {int(partly.sum())} position(s) hold the mask "
            f"{codebook_size} in only some of their {codes.shape[-1]} codes."
        )


def embed_codes(codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Vectors of codes.

    Args:
        codebook (`torch.Tensor` of shape `(num_codebooks, codebook_size + 1, dim)`): One codebook for all depths, or
            one a depth. The last row is zero, so that the mask embeds as nothing.
        codes (`torch.Tensor` of shape `(..., d)`, int64): Codes of the first d depths, in `[0, codebook_size]`.

    Returns:
        `torch.Tensor` of shape `(..., d, dim)`.
    """
    if codebook.shape[0] == 1:
        return codebook[0][codes]
    return codebook[torch.arange(codes.shape[-1], device=codes.device), codes]


def project_vectors(projection: nn.Linear, vectors: torch.Tensor) -> torch.Tensor:
    """How a stack enters a transformer: the sum over depths of its projected vectors.

    `Σ_d P(e_d) = D · P(mean_d e_d)`, as P is affine, at a D-th of the work.

    Args:
        projection (`torch.nn.Linear`): P, from the codebook's width to the transformer's.
        vectors (`torch.Tensor` of shape `(..., D, dim)`): Vectors of stacks, all depths.

    Returns:
        `torch.Tensor` of shape `(..., projection.out_features)`.
    """
    return vectors.shape[-2] * projection(vectors.mean(dim=-2))


class Codebook(nn.Module):
    """The RQ-VAE's frozen codebook, in which a transformer reads codes.

    A module of its own and not a buffer of the whole model, since offloading and device maps bring a module's tensors
    along when it is called, but leave a buffer of the root where it is.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_codebooks, codebook_size + 1, dim))

    def forward(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Vectors of codes: `(..., d)` of the first d depths -> `(..., d, dim)`, or `(...)` of one -> `(..., dim)`."""
        if depth is not None:
            return self.vectors[min(depth, self.vectors.shape[0] - 1)][codes]
        return embed_codes(self.vectors, codes)


def is_readable(value: torch.Tensor) -> bool:
    """Whether reading a tensor's values neither waits for a device nor breaks a graph."""
    return type(value) is torch.Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(name: str, value, shape: tuple[int | str, ...], floating: bool = False) -> None:
    """Refuse what is neither `None` nor a tensor of `shape`, int64 or floating-point; a size that is a name is any."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor or None, got {type(value).__name__}.")
    fits = value.ndim == len(shape) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits or not (value.is_floating_point() if floating else value.dtype == torch.int64):
        kind = "floating-point" if floating else "int64"
        raise ValueError(
            f"`{name}` must be {kind} of shape ({', '.join(map(str, shape))}), got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )


def check_ranges(**values: tuple[torch.Tensor | None, int | None]) -> None:
    """Refuse integers outside `[0, largest]`, given as `name=(tensor, largest)`, where they are readable.

    Raises:
        `ValueError`: names the argument, the values it holds and those allowed.
    """
    for name, (value, largest) in values.items():
        if value is not None and is_readable(value):
            low, high = (int(bound) for bound in value.aminmax())
            if low < 0 or high > largest:
                raise ValueError(f"`{name}` must lie in [0, {largest}], got values in [{low}, {high}].")
