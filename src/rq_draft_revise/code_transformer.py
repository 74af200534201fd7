"""What the two transformers over codes have in common: the codebook, teacher forcing, and how blocks are run."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput


@dataclass
class TeacherForcingOutput(BaseOutput):
    """Teacher forcing.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, n, code_depth, codebook_size)`): At the n positions of each
            image, of an [`RQTransformerModel`] all; `(sum of n, code_depth, codebook_size)` where images have
            different numbers of masked positions.
        loss (`torch.Tensor`, scalar): `image_loss`, or with text its weighted mean with `text_loss`.
        image_loss (`torch.Tensor`, scalar): Mean negative log-likelihood (nats) of the codes at the positions.
        text_loss (`torch.Tensor`, scalar): Mean negative log-likelihood of each next text token.
        text_logits (`torch.Tensor` of shape `(batch_size, max_text_length - 1, text_vocab_size)`).
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None


class CodeTransformerMixin(AttentionMixin):
    """Of a model with `blocks`, a `depth_transformer` and, of a text, `text_norm_out` and `text_head`. Before
    `ModelMixin`."""

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["SpatialTransformerBlock", "DepthTransformerBlock"]
    _repeated_blocks = ["SpatialTransformerBlock", "DepthTransformerBlock"]
    _skip_layerwise_casting_patterns = ["codebook", "norm", "embedding"]

    def _check_config(self) -> None:
        """Refuse, with a `ValueError`, sizes that no model has, two kinds of condition, or a weight out of range."""
        config = self.config
        for name in ("height", "width", "code_depth", "codebook_size", "codebook_dim", "num_spatial_layers",
                     "num_attention_heads", "attention_head_dim", "num_classes", "text_vocab_size",
                     "max_text_length"):  # fmt: skip
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {config[name]}.")
        if config.num_depth_layers < (config.code_depth > 1):
            raise ValueError(
                f"`num_depth_layers` must be at least {int(config.code_depth > 1)} with `code_depth` "
                f"{config.code_depth}, got {config.num_depth_layers}."
            )
        if config.num_classes is not None and config.text_vocab_size is not None:
            raise ValueError(
                f"Give `num_classes` or `text_vocab_size`, not both: got {config.num_classes} and "
                f"{config.text_vocab_size}."
            )
        if not 0 <= config.text_loss_weight <= 1:
            raise ValueError(f"`text_loss_weight` must lie in [0, 1], got {config.text_loss_weight}.")

    def compile_repeated_blocks(self, *args, dynamic: bool | None = True, **kwargs) -> None:
        """As in diffusers, but by default for all shapes at once: sampling calls a block with many (batch, guidance,
        cached codes), and torch gives up after compiling a function eight times."""
        super().compile_repeated_blocks(*args, dynamic=dynamic, **kwargs)

    @property
    def mask_token_id(self) -> int:
        """The code of a masked position, K."""
        return self.config.codebook_size

    @property
    def num_positions(self) -> int:
        """N = height · width."""
        return self.config.height * self.config.width

    @property
    def codebook(self) -> torch.Tensor:
        """The RQ-VAE's codebook, `(num_codebooks, codebook_size + 1, codebook_dim)`; zeros until [`set_codebook`]."""
        return self.depth_transformer.codebook.vectors

    def set_codebook(self, codebook: torch.Tensor) -> None:
        """Copy the RQ-VAE's codebook `(num_codebooks, codebook_size + 1, codebook_dim)`, in which codes are read."""
        if codebook.shape != self.codebook.shape:
            raise ValueError(f"`codebook` must have shape {tuple(self.codebook.shape)}, got {tuple(codebook.shape)}.")
        self.codebook.copy_(codebook)

    def _run(self, block, *inputs):
        """A block, computed again in the backward pass where gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _teacher_forcing(self, logits, stacks, text_states, input_ids) -> TeacherForcingOutput:
        """Losses of logits `(..., D, K)` at stacks `(..., D)`, and of the text from states `(B, P-1, d)`."""
        loss = image_loss = F.cross_entropy(logits.flatten(0, -2).float(), stacks.flatten())
        text_loss = text_logits = None
        if input_ids is not None:
            text_logits = self.text_head(self.text_norm_out(text_states))  # (B, P-1, V)
            text_loss = next_token_loss(text_logits, input_ids, self.null_condition_id)
            loss = (1 - self.config.text_loss_weight) * image_loss + self.config.text_loss_weight * text_loss
        return TeacherForcingOutput(logits, loss, image_loss, text_loss, text_logits)


def next_token_loss(logits: torch.Tensor, input_ids: torch.Tensor, null_condition_id: int | None) -> torch.Tensor:
    """Mean negative log-likelihood of each next token, over the rows that hold a text; 0 where none does.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length - 1, text_vocab_size)`).
        input_ids (`torch.Tensor` of shape `(batch_size, length)`, int64): Rows of `null_condition_id` are left out.
    """
    targets = input_ids[:, 1:]
    if null_condition_id is not None:
        targets = targets.masked_fill(targets == null_condition_id, -100)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return losses / (targets != -100).sum().clamp(min=1)
