"""RQ-VAE: images to stacks of codes and back (Lee et al., "Autoregressive Image Generation using Residual
Quantization", CVPR 2022; the first stage of Draft-and-Revise)."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .codes import check_codes, embed_codes
from .publishing import ModelCardMixin


# A code whose average count has decayed below this keeps its vector. float32 ends at 1e-38, and there the quotient of
# the averages would lead to zero.
FORGOTTEN = 1e-30


@dataclass
class RQVAEEncoderOutput(BaseOutput):
    """Output of [`RQVAEModel.encode`].

    (In every output class only the first field is without a default: accelerate rebuilds outputs from one dictionary.)

    Args:
        codes (`torch.Tensor` of shape `(batch_size, h, w, code_depth)`, int64): Codes in `[0, codebook_size)`.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, h, w)`): The encoder's output before
            quantization, from which [`RQVAEModel.update_codebook`] learns.
    """

    codes: torch.Tensor
    latents: torch.Tensor | None = None


@dataclass
class RQVAEOutput(BaseOutput):
    """Output of [`RQVAEModel.forward`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, H, W)`): Reconstruction, about in `[-1, 1]`.
        commitment_loss (`torch.Tensor`, scalar): Mean over depths and elements of `(z - sg[z^(d)])²`, unweighted.
        codes (`torch.Tensor` of shape `(batch_size, h, w, code_depth)`, int64): Codes in `[0, codebook_size)`.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, h, w)`): As in [`RQVAEEncoderOutput`].
    """

    sample: torch.Tensor
    commitment_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class SoftCodesOutput(BaseOutput):
    """Output of [`RQVAEModel.soft_codes`].

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, h, w, code_depth, codebook_size)`): softmax(-‖r - e‖²/τ).
        codes (`torch.Tensor` of shape `(batch_size, h, w, code_depth)`, int64): The codes whose vectors were
            subtracted from the residual on the way down: the nearest ones, or a draw from the probabilities.
    """

    probabilities: torch.Tensor
    codes: torch.Tensor | None = None


@dataclass
class CodebookUpdateOutput(BaseOutput):
    """What [`RQVAEModel.update_codebook`] saw and did; the same on every process.

    Args:
        usage (`torch.Tensor` of shape `(code_depth,)`): Share of the codebook that this batch used, by depth.
        perplexity (`torch.Tensor` of shape `(code_depth,)`): exp of the entropy of the codes, by depth.
        num_restarted (`torch.Tensor`, int64 scalar): Codes moved onto vectors of this batch.
        restarts (`torch.Tensor` of shape `(code_depth,)`, int64): The same by the depth at which those vectors are
            what is left to quantize. Codes of a shared codebook may move onto any depth's.
    """

    usage: torch.Tensor
    perplexity: torch.Tensor | None = None
    num_restarted: torch.Tensor | None = None
    restarts: torch.Tensor | None = None


class ResidualQuantizer(nn.Module):
    """Quantizes a vector D times, each time what the previous depths left over.

    With r_0 = z: `code_d = argmin_k ‖r_{d-1} - e_k‖²`, `r_d = r_{d-1} - e(code_d)`, `z^(d) = Σ_{i≤d} e(code_i)`.

    One tensor `codebook` of shape `(num_codebooks, codebook_size + 1, dim)` holds everything, where `num_codebooks` is
    1 if the depths share a codebook and D otherwise. Its last row is zero: `mask_token_id` embeds as nothing.

    The codebook learns by exponential moving averages in [`update`], never in `forward`, so that gradient accumulation
    and evaluation cannot disturb it. Distances and averages are float32 whatever the autocast.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        depth: int,
        shared_codebook: bool,
        ema_decay: float,
        restart_threshold: float,
    ):
        super().__init__()
        self.codebook_size, self.depth = codebook_size, depth
        self.ema_decay, self.restart_threshold = ema_decay, restart_threshold
        num_codebooks = 1 if shared_codebook else depth
        codebook = torch.randn(num_codebooks, codebook_size + 1, dim) / codebook_size
        codebook[:, -1] = 0
        self.register_buffer("codebook", codebook)
        # Counts of zero make the first update a restart: unused codes start on vectors of the first batch.
        self.register_buffer("ema_counts", torch.zeros(num_codebooks, codebook_size))
        self.register_buffer("ema_sums", torch.zeros(num_codebooks, codebook_size, dim))

    def _book(self, depth: int) -> int:
        return 0 if self.codebook.shape[0] == 1 else depth

    def distances(self, residual: torch.Tensor, depth: int) -> torch.Tensor:
        """Squared distances, float32, up to ‖r‖², which no argmin or softmax sees: `(n, dim)` -> `(n, K)`."""
        vectors = self.codebook[self._book(depth), :-1].float()
        with torch.autocast(residual.device.type, enabled=False):
            return vectors.square().sum(dim=-1) - 2 * residual.float() @ vectors.T

    def nearest(self, residual: torch.Tensor, depth: int) -> torch.Tensor:
        """Nearest code of each residual: `(n, dim)` -> `(n,)` int64."""
        return self.distances(residual, depth).argmin(dim=-1)

    def forward(
        self,
        latents: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        tau: float | None = None,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Three uses, by what is given, so that an offloading hook sees every reading of the codebook.

        Args:
            latents (`torch.Tensor` of shape `(..., dim)`): z, to be quantized.
            codes (`torch.Tensor` of shape `(..., d)`, int64): Codes of the first d depths, to be summed up.
            tau (`float`), stochastic (`bool`), generator (`torch.Generator`): As in [`RQVAEModel.soft_codes`].

        Returns:
            - of `latents`: quantized `(..., dim)` with the straight-through gradient, codes `(..., D)`, commitment
              loss (scalar): the mean over d of ‖z - sg[z^(d)]‖² (mean over elements), which asks of every prefix of
              the stack that it come close, not only of the whole.
            - of `codes`: z^(d) `(..., dim)`.
            - of `latents` and `tau`: probabilities `(..., D, codebook_size)` and codes `(..., D)`.
        """
        if codes is not None:
            return embed_codes(self.codebook, codes).sum(dim=-2)
        if tau is not None:
            return self._soft_codes(latents, tau, stochastic, generator)
        return self._quantize(latents)

    def _quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = latents.float()
        residual, quantized, codes, loss = z.detach(), torch.zeros_like(z), [], 0.0
        for depth in range(self.depth):
            code = self.nearest(residual.flatten(end_dim=-2), depth).view(z.shape[:-1])
            vector = self.codebook[self._book(depth), code].float()
            residual, quantized = residual - vector, quantized + vector
            codes.append(code)
            loss = loss + F.mse_loss(z, quantized)
        quantized = z + (quantized - z).detach()
        return quantized.to(latents.dtype), torch.stack(codes, dim=-1), loss / self.depth

    def _soft_codes(
        self, latents: torch.Tensor, tau: float, stochastic: bool, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual, probabilities, codes = latents.float().flatten(end_dim=-2), [], []
        for depth in range(self.depth):
            distances = self.distances(residual, depth)
            probabilities.append(torch.softmax(-distances / tau, dim=-1))
            if stochastic:
                device = generator.device if generator is not None else residual.device
                drawn = torch.multinomial(probabilities[-1].to(device), 1, generator=generator).squeeze(-1)
                codes.append(drawn.to(residual.device))
            else:
                codes.append(distances.argmin(dim=-1))
            residual = residual - self.codebook[self._book(depth), codes[-1]].float()
        shape = latents.shape[:-1]
        return torch.stack(probabilities, dim=1).unflatten(0, shape), torch.stack(codes, dim=1).unflatten(0, shape)

    @torch.no_grad()
    def update(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CodebookUpdateOutput:
        """One step of the moving averages, after all depths, over the vectors of all processes.

        A code is restarted when its average count falls under `restart_threshold` of an even share of the batch
        (`vectors / codebook_size`). An absolute bound would restart most of the codebook at small batches.

        Args:
            latents (list of `torch.Tensor` of shape `(n, dim)`): The vectors of one optimizer step on this process, a
                tensor a micro-batch; every process gives as many tensors.
            generator (`torch.Generator`, *optional*): Chooses the vectors that restarted codes move to.
        """
        rows, num_vectors = _rows_in_global_batch([batch.shape[0] for batch in latents], latents[0].device)
        residual, inputs, codes = torch.cat(latents).float(), [], []
        for depth in range(self.depth):
            inputs.append(residual)
            codes.append(self.nearest(residual, depth))
            residual = residual - self.codebook[self._book(depth), codes[-1]].float()

        counts_by_depth = torch.stack([torch.bincount(c, minlength=self.codebook_size) for c in codes]).float()
        sums = torch.zeros_like(self.ema_sums)
        for depth in range(self.depth):
            sums[self._book(depth)].index_add_(0, codes[depth], inputs[depth].to(sums.dtype))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_by_depth)
            dist.all_reduce(sums)
        shared = self.codebook.shape[0] == 1
        counts = counts_by_depth.sum(dim=0, keepdim=True) if shared else counts_by_depth

        self.ema_counts.lerp_(counts.to(self.ema_counts.dtype), 1 - self.ema_decay)
        self.ema_sums.lerp_(sums, 1 - self.ema_decay)
        seen = self.ema_counts > FORGOTTEN
        means = self.ema_sums / self.ema_counts.clamp(min=FORGOTTEN).unsqueeze(-1)
        self.codebook[:, :-1][seen] = means[seen]

        if shared:
            # One book, whose codes may move onto what is left at any depth.
            even_share = counts[0].sum() / self.codebook_size
            restarts = self._restart(0, torch.stack(inputs), rows, num_vectors, even_share, generator)
        else:
            restarts = torch.cat([
                self._restart(depth, inputs[depth][None], rows, num_vectors, counts[depth].sum() / self.codebook_size,
                              generator)
                for depth in range(self.depth)
            ])  # fmt: skip

        frequencies = counts_by_depth / counts_by_depth.sum(dim=-1, keepdim=True)
        return CodebookUpdateOutput(
            usage=(counts_by_depth > 0).float().mean(dim=-1),
            perplexity=torch.special.entr(frequencies).sum(dim=-1).exp(),
            num_restarted=restarts.sum(),
            restarts=restarts,
        )

    def _restart(
        self,
        book: int,
        pool: torch.Tensor,
        rows: torch.Tensor,
        num_vectors: int,
        even_share: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Move the unused codes of one codebook onto vectors of the global batch, whichever process has them, each
        with an even share as its new history.

        Args:
            pool (`torch.Tensor` of shape `(d, n, dim)`): What this process's vectors leave to d depths.
            rows (`torch.Tensor` of shape `(n,)`, int64), num_vectors (`int`): Of [`_rows_in_global_batch`].

        Returns:
            `(d,)` int64: how many codes moved onto vectors of each depth.
        """
        depths, num_own, dim = pool.shape
        unused = (self.ema_counts[book] < self.restart_threshold * even_share).nonzero().squeeze(-1)
        if unused.shape[0] == 0:  # in every process: their averages are equal to the bit
            return torch.zeros(depths, dtype=torch.int64, device=pool.device)
        device = generator.device if generator is not None else pool.device
        chosen = torch.randperm(depths * num_vectors, generator=generator, device=device)[: unused.shape[0]]
        chosen = chosen.to(pool.device)
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            dist.broadcast(chosen, src=0)  # generators need not agree

        place = torch.full((num_vectors,), -1, device=pool.device)  # of each row of the global batch in `pool`, or -1
        place[rows] = torch.arange(num_own, device=pool.device)
        depth, place = chosen // num_vectors, place[chosen % num_vectors]
        vectors = torch.where((place >= 0).unsqueeze(-1), pool[depth, place], 0.0).to(self.codebook.dtype)
        if distributed:
            dist.all_reduce(vectors)  # each row is zero in every process but one: the sum is exact

        unused = unused[: vectors.shape[0]]
        self.codebook[book, unused] = vectors
        self.ema_counts[book, unused] = even_share.to(self.ema_counts.dtype)
        self.ema_sums[book, unused] = vectors * even_share.to(vectors.dtype)
        return depth.bincount(minlength=depths)


def _rows_in_global_batch(sizes: list[int], device: torch.device) -> tuple[torch.Tensor, int]:
    """Where the vectors of this process lie among those of all, in the order that one process would have them in.

    That order is the first micro-batch of each process, then the second of each: the order of the training data.

    Args:
        sizes (`list[int]`): Vectors in each micro-batch of this process.

    Returns:
        The row of each vector, int64 `(sum(sizes),)`, and how many vectors all processes have.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.arange(sum(sizes), device=device), sum(sizes)
    own = torch.tensor(sizes, device=device)
    by_process = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(by_process, own)
    table = torch.stack(by_process, dim=1).cpu()  # (micro-batches, processes)
    starts = (table.flatten().cumsum(0) - table.flatten()).view_as(table)[:, dist.get_rank()]
    rows = torch.cat([start + torch.arange(size) for start, size in zip(starts.tolist(), sizes)])
    return rows.to(device), int(table.sum())


class RQVAEModel(ModelCardMixin, AutoencoderMixin, ModelMixin, ConfigMixin):
    r"""Residual-quantized variational autoencoder: an image becomes `h * w` stacks of `code_depth` codes.

    The network is VQGAN's, expressed by diffusers' own `Encoder` and `Decoder`; with `code_depth=1` this *is* VQGAN.
    The defaults are the published ImageNet model: 256×256 pixels, 8×8×4 codes, 104,402,051 parameters with the
    codebook counted once, its padding row included.

    Args:
        in_channels (`int`, defaults to 3), out_channels (`int`, defaults to 3): Channels of the image.
        block_out_channels (`tuple[int, ...]`): Channels of each level; each level but the last halves the resolution.
        down_block_types, up_block_types (`tuple[str, ...]`): diffusers' block of each level.
        layers_per_block (`int`, defaults to 2): Residual blocks a level; the decoder has one more.
        norm_num_groups (`int`, defaults to 32): Groups of each GroupNorm.
        mid_block_add_attention (`bool`, defaults to `True`): Attention between the two middle blocks.
        latent_channels (`int`, defaults to 256): Width of the latents and of the codebook's vectors.
        codebook_size (`int`, defaults to 16384): K.
        code_depth (`int`, defaults to 4): D.
        shared_codebook (`bool`, defaults to `True`): One codebook for all depths, or one each.
        commitment_weight (`float`, defaults to 0.25): Weight of the commitment loss; read by the trainer.
        ema_decay (`float`, defaults to 0.99): Decay of the codebook's moving averages.
        restart_threshold (`float`, defaults to 0.01): A code is restarted under this fraction of an even share.
        patch_size (`int`, defaults to 1): Pixel-unshuffle before the encoder and pixel-shuffle after the decoder; 1 in
            the paper's models, more makes a model for small machines.
        sample_size (`int`, defaults to 256): Height and width of the images that the model was trained on, in pixels.
        force_upcast (`bool`, defaults to `True`): Pipelines decode in float32 when the model is in float16, whose
            range the decoder's activations can leave.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention", "ResidualQuantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "quant_conv"]
    # `encode` and `decode` do not pass through `forward`, whose hook would bring in what is not listed here.
    _group_offload_block_modules = ["encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"]
    # A codebook in half precision moves near-ties; the quantizer computes in float32 anyway.
    _keep_in_fp32_modules = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 5 + ("AttnDownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 5,
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        latent_channels: int = 256,
        codebook_size: int = 16384,
        code_depth: int = 4,
        shared_codebook: bool = True,
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        restart_threshold: float = 0.01,
        patch_size: int = 1,
        sample_size: int = 256,
        force_upcast: bool = True,
    ):
        super().__init__()
        levels = len(block_out_channels)
        if len(down_block_types) != levels or len(up_block_types) != levels:
            raise ValueError(
                "`down_block_types` and `up_block_types` must name one block a level of `block_out_channels` "
                f"({levels}), got {len(down_block_types)} and {len(up_block_types)}."
            )
        for name, value in dict(
            codebook_size=codebook_size, code_depth=code_depth, latent_channels=latent_channels, patch_size=patch_size
        ).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {ema_decay}.")
        if not 0 <= restart_threshold < float("inf"):
            raise ValueError(f"`restart_threshold` must not be negative, got {restart_threshold}.")

        self.encoder = Encoder(
            in_channels=in_channels * patch_size**2,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel_size=1)
        self.quantizer = ResidualQuantizer(
            codebook_size, latent_channels, code_depth, shared_codebook, ema_decay, restart_threshold
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels * patch_size**2,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.use_slicing = False  # see `enable_slicing`: images are encoded and decoded one by one

    @property
    def spatial_scale_factor(self) -> int:
        """Pixels a position covers along each side: 32 for the published models."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def mask_token_id(self) -> int:
        """The code of an undrafted position, K; it embeds and decodes as the zero vector."""
        return self.config.codebook_size

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        channels, multiple = self.config.in_channels, self.spatial_scale_factor
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            got = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(f"`pixel_values` must be a floating-point torch.Tensor in [-1, 1], got {got}.")
        if (
            pixel_values.ndim != 4
            or pixel_values.shape[1] != channels
            or pixel_values.shape[2] % multiple
            or pixel_values.shape[3] % multiple
            or pixel_values.numel() == 0
        ):
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, {channels}, height, width) with height and width "
                f"multiples of {multiple}, got {tuple(pixel_values.shape)}."
            )
        if pixel_values.dtype != self.dtype and not torch.is_autocast_enabled(pixel_values.device.type):
            raise ValueError(f"`pixel_values` must have the model's dtype, {self.dtype}, got {pixel_values.dtype}.")

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self._check_pixels(pixel_values)
        hidden_states = F.pixel_unshuffle(pixel_values, self.config.patch_size)  # (B, 3p², H/p, W/p)
        return self._sliced(lambda images: self.quant_conv(self.encoder(images)), hidden_states)  # (B, C, h, w)

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        quantized = quantized.to(self.dtype)
        hidden_states = self._sliced(lambda latents: self.decoder(self.post_quant_conv(latents)), quantized)
        return F.pixel_shuffle(hidden_states, self.config.patch_size)  # (B, 3p², H/p, W/p) -> (B, 3, H, W)

    def _sliced(self, network: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """`network(batch)`, or one image after the other."""
        if not self.use_slicing or batch.shape[0] == 1:
            return network(batch)
        return torch.cat([network(one) for one in batch.split(1)])

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> RQVAEEncoderOutput | tuple:
        """Images to codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, in_channels, H, W)`): Pixels in `[-1, 1]`, H and W
                multiples of [`spatial_scale_factor`].
            return_dict (`bool`, defaults to `True`): A [`RQVAEEncoderOutput`], or the tuple `(codes, latents)`.

        Raises:
            `ValueError`: `pixel_values` of another dtype or shape.
        """
        latents = self._encode(pixel_values)
        codes = self.quantizer(latents.permute(0, 2, 3, 1))[1]
        return RQVAEEncoderOutput(codes=codes, latents=latents) if return_dict else (codes, latents)

    @apply_forward_hook
    def decode(self, codes: torch.Tensor, depth: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple:
        """Codes to images.

        Args:
            codes (`torch.Tensor` of shape `(batch_size, h, w, code_depth)`, int64): Codes; masked positions decode as
                the zero vector.
            depth (`int`, *optional*): Decode from the first `depth` codes of each stack alone; by default from all.
            return_dict (`bool`, defaults to `True`): A `DecoderOutput` with `sample` `(batch_size, out_channels, H,
                W)`, about in `[-1, 1]`, or a tuple of it.

        Raises:
            `ValueError`: `codes` is no code map of this model, or `depth` is not in `[1, code_depth]`.
        """
        sample = self._decode(self.embed_codes(codes, depth=depth))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def embed_codes(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """z^(depth): the sum of the vectors of the first `depth` codes of each stack (all by default).

        `(batch_size, h, w, code_depth)` int64 -> `(batch_size, latent_channels, h, w)`. Raises like [`decode`].
        """
        depth = self.config.code_depth if depth is None else depth
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= self.config.code_depth:
            raise ValueError(f"`depth` must be an integer in [1, {self.config.code_depth}], got {depth!r}.")
        if not torch.compiler.is_compiling():  # reading values would break the graph
            check_codes(codes, self.config.code_depth, self.config.codebook_size)
        return self.quantizer(codes=codes[..., :depth]).permute(0, 3, 1, 2)

    @apply_forward_hook
    def soft_codes(
        self,
        pixel_values: torch.Tensor,
        tau: float = 0.5,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SoftCodesOutput | tuple:
        """Probabilities of all codes given the residual, softmax(-‖r - e‖²/τ) (the RQ-VAE paper's eq. 11, τ = 0.5).

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, in_channels, H, W)`): Pixels in `[-1, 1]`.
            tau (`float`, defaults to 0.5): Temperature, positive.
            stochastic (`bool`, defaults to `False`): Draw each code instead of taking the nearest; the residual of the
                next depth follows the draw.
            generator (`torch.Generator`, *optional*): For the draws.
            return_dict (`bool`, defaults to `True`): A [`SoftCodesOutput`], or its fields as a tuple.

        Raises:
            `ValueError`: `tau` is not positive and finite; `pixel_values` of another dtype or shape.
        """
        if not isinstance(tau, Real) or isinstance(tau, bool) or not 0 < tau < float("inf"):
            raise ValueError(f"`tau` must be positive and finite, got {tau!r}.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or None, got {generator!r}.")
        latents = self._encode(pixel_values).permute(0, 2, 3, 1)  # (B, h, w, C)
        probabilities, codes = self.quantizer(latents, tau=tau, stochastic=stochastic, generator=generator)
        return SoftCodesOutput(probabilities=probabilities, codes=codes) if return_dict else (probabilities, codes)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> RQVAEOutput | tuple:
        """Reconstruct images through their codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, in_channels, H, W)`): Pixels in `[-1, 1]`.
            return_dict (`bool`, defaults to `True`): A [`RQVAEOutput`], or its fields as a tuple.
        """
        latents = self._encode(pixel_values)  # (B, C, h, w)
        quantized, codes, commitment_loss = self.quantizer(latents.permute(0, 2, 3, 1))  # (B, h, w, C), (B, h, w, D)
        sample = self._decode(quantized.permute(0, 3, 1, 2))  # (B, 3, H, W)
        if not return_dict:
            return sample, commitment_loss, codes, latents
        return RQVAEOutput(sample=sample, commitment_loss=commitment_loss, codes=codes, latents=latents)

    def update_codebook(
        self, latents: torch.Tensor | list[torch.Tensor], generator: torch.Generator | None = None
    ) -> CodebookUpdateOutput:
        """Let the codebook follow the encoder: one exponential-moving-average step with restarts of unused codes.

        Call it once after each optimizer step, on every process, with the latents of all micro-batches: gradient
        accumulation then equals the large batch exactly, and so do several processes up to the order of their sums.
        Restarted codes move onto vectors of the global batch, the same however it is split.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, h, w)`, or a list of them): As returned by
                `forward`; gradients are ignored.
            generator (`torch.Generator`, *optional*): Chooses the vectors that restarted codes move to. Of several
                processes the first one's choice counts.
        """
        batches = [latents] if isinstance(latents, torch.Tensor) else list(latents)
        if not batches:
            raise ValueError("`latents` must hold at least one tensor, got an empty list.")
        vectors = [batch.detach().permute(0, 2, 3, 1).flatten(end_dim=-2) for batch in batches]
        return self.quantizer.update(vectors, generator=generator)
