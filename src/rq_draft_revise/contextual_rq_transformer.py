"""Contextual RQ-Transformer: predicts whole code stacks from everything else that is known of an image."""

from dataclasses import dataclass

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .attention import SpatialTransformerBlock
from .code_transformer import CodeTransformerMixin, TeacherForcingOutput
from .codes import check_codes, check_ranges, check_tensor, is_readable, project_vectors
from .depth_transformer import DepthTransformer
from .publishing import ModelCardMixin
from .sampling import check_sampling


@dataclass
class StackSampleOutput(BaseOutput):
    """Sampled stacks.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, n)`, float32): Log-probability of each whole stack, the sum
            over its codes, under the distribution that was sampled.
        stacks (`torch.Tensor` of shape `(batch_size, n, code_depth)`, int64): Codes in `[0, codebook_size)`.
    """

    log_probs: torch.Tensor
    stacks: torch.Tensor | None = None


@dataclass
class PrefixOutput(BaseOutput):
    """The condition, ready for any number of sampling steps.

    Args:
        prefix_key_values (`torch.Tensor` of shape `(num_spatial_layers, 2, batch_size, prefix_length,
            num_attention_heads, attention_head_dim)`): Keys and values of the condition in each spatial block.
    """

    prefix_key_values: torch.Tensor


class ContextualRQTransformerModel(ModelCardMixin, CodeTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""Contextual RQ-Transformer (Lee et al., "Draft-and-Revise", NeurIPS 2022, section 3.2).

    A bidirectional *spatial* transformer reads the code map with its masked positions and the condition before it, and
    gives a context vector at each position; a causal *depth* transformer turns the contexts of the positions asked for
    into their D codes. The defaults are the ImageNet model of 371,111,168 parameters (Table 1) and its null class.

    The condition is a prefix that attends causally to itself alone, while image positions attend to everything: its
    keys and values never depend on the image, so they are computed once a prompt, and next-token loss on the text
    cannot leak.

    Args:
        height (`int`, defaults to 8), width (`int`, defaults to 8): Positions of the code map.
        code_depth (`int`, defaults to 4): D.
        codebook_size (`int`, defaults to 16384): K.
        codebook_dim (`int`, defaults to 256): Width of the RQ-VAE's codebook vectors.
        shared_codebook (`bool`, defaults to `True`): Whether the RQ-VAE has one codebook for all depths.
        num_spatial_layers (`int`, defaults to 24), num_depth_layers (`int`, defaults to 4): Blocks.
        num_attention_heads (`int`, defaults to 16), attention_head_dim (`int`, defaults to 64): d is their product.
        dropout (`float`, defaults to 0.1): On the output of each attention and MLP while training.
        num_classes (`int`, *optional*): Class-conditional; label `num_classes` is the null class.
        text_vocab_size (`int`, *optional*): Text-conditional; token `text_vocab_size`, which no tokenizer gives, in
            all places of a row is the null text.
        max_text_length (`int`, defaults to 32): Tokens of a text.
        text_loss_weight (`float`, defaults to 0.1): Weight of the text loss; the image loss has the rest.

    Raises:
        `ValueError`: a number out of its range, or two kinds of condition.
    """

    @register_to_config
    def __init__(
        self,
        height: int = 8,
        width: int = 8,
        code_depth: int = 4,
        codebook_size: int = 16384,
        codebook_dim: int = 256,
        shared_codebook: bool = True,
        num_spatial_layers: int = 24,
        num_depth_layers: int = 4,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        dropout: float = 0.1,
        num_classes: int | None = None,
        text_vocab_size: int | None = None,
        max_text_length: int = 32,
        text_loss_weight: float = 0.1,
    ):
        super().__init__()
        self._check_config()

        dim = num_attention_heads * attention_head_dim
        self.mask_embedding = nn.Parameter(torch.empty(codebook_dim))
        self.position_embedding = nn.Parameter(torch.empty(height * width, dim))
        self.input_projection = nn.Linear(codebook_dim, dim)

        self.condition_embedding = None
        if self.prefix_length:
            # the last row is the null condition
            self.condition_embedding = nn.Embedding((num_classes or text_vocab_size) + 1, dim)
            self.prefix_position_embedding = nn.Parameter(torch.empty(self.prefix_length, dim))
        if text_vocab_size is not None:
            self.text_norm_out = nn.LayerNorm(dim)
            self.text_head = nn.Linear(dim, text_vocab_size)

        self.blocks = nn.ModuleList(
            SpatialTransformerBlock(dim, attention_head_dim, dropout) for _ in range(num_spatial_layers)
        )
        self.depth_transformer = DepthTransformer(
            num_depth_layers,
            dim,
            attention_head_dim,
            code_depth,
            codebook_size,
            codebook_dim,
            shared_codebook,
            dropout,
        )
        self.gradient_checkpointing = False
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.02)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def prefix_length(self) -> int:
        """Positions of the condition: 1 for a class, `max_text_length` for a text, 0 for an unconditional model."""
        if self.config.text_vocab_size is not None:
            return self.config.max_text_length
        return 0 if self.config.num_classes is None else 1

    @property
    def null_condition_id(self) -> int | None:
        """The label or token that stands for "no condition"; `None` for an unconditional model."""
        num_classes = self.config.num_classes
        return self.config.text_vocab_size if num_classes is None else num_classes

    def forward(
        self,
        codes: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        uniforms: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prefix_key_values: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float | None = None,
        temperature: torch.Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        return_dict: bool = True,
    ) -> TeacherForcingOutput | StackSampleOutput | PrefixOutput | tuple:
        r"""Three uses, by what is given.

        - `labels`: teacher forcing. Only the positions asked for pay for depth blocks and head.
        - `uniforms`: sampling. The result is a function of codes, positions and uniforms alone.
        - no `codes`: the keys and values of the condition, for `prefix_key_values` of later calls.

        Args:
            codes (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The code map;
                masked stacks hold `mask_token_id`.
            positions (`torch.Tensor` of shape `(batch_size, n)`, int64, *optional*): Row-major positions to predict.
                By default all that are masked in `codes`, found by a call that waits for the device.
            uniforms (`torch.Tensor` of shape `(batch_size, n, code_depth)`, *optional*): In `[0, 1)`, one number a
                code.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, int64, *optional*): In `[0, num_classes]`, the last
                the null class.
            input_ids (`torch.Tensor` of shape `(batch_size, max_text_length)`, int64, *optional*): Text, padded to
                full length.
            labels (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The true
                code map.
            prefix_key_values (`torch.Tensor`, *optional*): From [`PrefixOutput`], instead of `class_labels` or
                `input_ids`.
            guidance_scale (`float` or scalar tensor, *optional*): Classifier-free guidance
                `ℓ = ℓ_u + s(ℓ_c - ℓ_u)` while sampling. The condition then has `2 * batch_size` rows: the conditions,
                then the null conditions.
            temperature (`float` or scalar tensor, defaults to 1): Of the sampling, positive. Scalar tensors spare a
                compiled step the recompilation.
            top_k (`int`, *optional*), top_p (`float`, *optional*): Sample among the most probable codes of each depth.
            return_dict (`bool`, defaults to `True`): An output class, or its fields as a tuple.

        Raises:
            `ValueError`: shapes that do not fit the model or each other, a condition missing or not known to the
                model, both or neither of `labels` and `uniforms`, a temperature or the like that nothing can be
                sampled with. On the CPU also values out of range; on an accelerator reading them would wait for the
                device.
        """
        self._check_inputs(
            codes, positions, uniforms, class_labels, input_ids, labels, prefix_key_values, guidance_scale
        )
        self._check_values(codes, positions, class_labels, input_ids, labels)
        check_step_sampling(guidance_scale, temperature, top_k, top_p)
        if codes is not None:
            index, shape = self._positions_to_index(codes, positions)  # (M,), leading shape of the result
            if uniforms is not None and tuple(uniforms.shape) != (*shape, self.config.code_depth):
                raise ValueError(
                    f"`uniforms` must have shape {(*shape, self.config.code_depth)}, as `positions` or the mask ask "
                    f"for, got {tuple(uniforms.shape)}."
                )
        prefix_states, past = None, [(None, None)] * len(self.blocks)
        if prefix_key_values is not None:
            past = [layer.unbind() for layer in prefix_key_values.unbind()]
        if class_labels is not None or input_ids is not None:
            condition = class_labels.unsqueeze(1) if class_labels is not None else input_ids  # (B, P)
            prefix_states, past = self._encode_prefix(condition)
        if codes is None:
            prefix_key_values = torch.stack([torch.stack(layer) for layer in past])
            return PrefixOutput(prefix_key_values) if return_dict else (prefix_key_values,)

        context = self._encode_codes(codes, past, guided=guidance_scale is not None)  # (B, N, d)
        if uniforms is not None:
            if guidance_scale is not None:
                index = torch.cat([index, index + codes.shape[0] * self.num_positions])
            stacks, log_probs = self.depth_transformer(
                context.flatten(0, 1).index_select(0, index),  # (M, d), or (2M, d) with guidance
                uniforms=uniforms.flatten(0, -2),
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            stacks, log_probs = stacks.unflatten(0, shape), log_probs.sum(dim=-1).unflatten(0, shape)
            return StackSampleOutput(log_probs, stacks) if return_dict else (log_probs, stacks)

        stacks = labels.flatten(0, 2).index_select(0, index)  # (M, D)
        logits = self.depth_transformer(context.flatten(0, 1).index_select(0, index), stacks=stacks)  # (M, D, K)
        text_states = None if prefix_states is None else prefix_states[:, :-1]
        output = self._teacher_forcing(logits.unflatten(0, shape), stacks, text_states, input_ids)
        return output if return_dict else tuple(vars(output).values())

    def _encode_prefix(self, condition: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Labels or tokens `(B, P)` -> hidden states `(B, P, d)`, and of each layer keys and values `(B, P, H, d/H)`.

        They stay apart where gradients are wanted: those of one layer in a tensor of all would be as large as that.
        """
        hidden_states = self.condition_embedding(condition) + self.prefix_position_embedding  # (B, P, d)
        key_values = []
        for block in self.blocks:
            hidden_states, key, value = self._run(block, hidden_states, None, None, True)
            key_values.append((key, value))
        return hidden_states, key_values

    def _encode_codes(
        self, codes: torch.Tensor, past: list[tuple[torch.Tensor | None, torch.Tensor | None]], guided: bool
    ) -> torch.Tensor:
        """Code map `(B, h, w, D)` after keys and values of each layer -> context `(B, N, d)`; guided `(2B, N, d)`."""
        codes = codes.flatten(1, 2)  # (B, N, D)
        masked = codes[..., :1] == self.mask_token_id  # (B, N, 1)
        known = project_vectors(self.input_projection, self.depth_transformer.codebook(codes))  # (B, N, d)
        hidden_states = (
            torch.where(masked, self.input_projection(self.mask_embedding), known) + self.position_embedding
        )
        if guided:
            hidden_states = torch.cat([hidden_states, hidden_states])  # (2B, N, d)
        for block, key_value in zip(self.blocks, past, strict=True):
            hidden_states, _, _ = self._run(block, hidden_states, *key_value)
        return hidden_states

    def _positions_to_index(
        self, codes: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Positions as indices into the flattened batch, `(M,)`, and the shape that M unflattens to."""
        batch_size = codes.shape[0]
        if positions is not None:
            first = torch.arange(batch_size, device=codes.device).unsqueeze(1) * self.num_positions
            return (first + positions).flatten(), tuple(positions.shape)
        masked = codes[..., 0].flatten(1) == self.mask_token_id  # (B, N)
        index = masked.flatten().nonzero().squeeze(-1)  # (M,)
        if index.shape[0] == 0:
            raise ValueError("`codes` must have masked positions where `positions` are not given, got none.")
        if index.shape[0] % batch_size == 0 and bool((masked.sum(dim=1) * batch_size == index.shape[0]).all()):
            return index, (batch_size, index.shape[0] // batch_size)
        return index, (index.shape[0],)

    def _check_inputs(
        self, codes, positions, uniforms, class_labels, input_ids, labels, prefix_key_values, guidance_scale
    ) -> None:
        """Combinations, types and shapes."""
        config = self.config
        conditions = dict(class_labels=class_labels, input_ids=input_ids, prefix_key_values=prefix_key_values)
        given = [name for name, value in conditions.items() if value is not None]

        # 1. A condition, of a model that has one
        allowed = []
        if config.num_classes is not None:
            allowed = ["class_labels", "prefix_key_values"]
        elif config.text_vocab_size is not None:
            allowed = ["input_ids", "prefix_key_values"]
        if allowed and (len(given) != 1 or given[0] not in allowed):
            raise ValueError(f"This model takes exactly one of {allowed}, got {given or 'none'}.")
        if not allowed and given:
            raise ValueError(f"This model is unconditional and takes no condition, got {given}.")
        if not allowed and guidance_scale is not None:
            raise ValueError(f"`guidance_scale` must be None for an unconditional model, got {guidance_scale}.")

        # 2. One of the three uses
        if codes is None and given not in (["class_labels"], ["input_ids"]):
            raise ValueError("`codes` may be left out only where `class_labels` or `input_ids` is given.")
        if codes is not None and (labels is None) == (uniforms is None):
            raise ValueError(
                "Give exactly one of `labels` (teacher forcing) and `uniforms` (sampling), "
                f"got {'both' if labels is not None else 'neither'}."
            )
        if labels is not None and guidance_scale is not None:
            raise ValueError(f"`guidance_scale` is for sampling and must be None with `labels`, got {guidance_scale}.")

        # 3. Shapes; that of `uniforms` depends on the positions
        stacks = (config.height, config.width, config.code_depth)
        check_tensor("codes", codes, ("batch_size", *stacks))
        batch_size = "batch_size" if codes is None else codes.shape[0]
        check_tensor("labels", labels, (batch_size, *stacks))
        check_tensor("positions", positions, (batch_size, "n"))
        check_tensor("class_labels", class_labels, ("batch_size",))
        check_tensor("input_ids", input_ids, ("batch_size", self.prefix_length))
        heads = (config.num_attention_heads, config.attention_head_dim)
        prefix_shape = (len(self.blocks), 2, "batch_size", self.prefix_length, *heads)
        check_tensor("prefix_key_values", prefix_key_values, prefix_shape, floating=True)
        if uniforms is not None and not (isinstance(uniforms, torch.Tensor) and uniforms.is_floating_point()):
            got = uniforms.dtype if isinstance(uniforms, torch.Tensor) else type(uniforms).__name__
            raise ValueError(f"`uniforms` must be a tensor of floating-point numbers in [0, 1), got {got}.")
        if codes is not None and given:
            size = conditions[given[0]].shape[2 if given[0] == "prefix_key_values" else 0]
            rows, reason = batch_size, "the batch"
            if guidance_scale is not None:
                rows, reason = 2 * batch_size, "twice the batch, for `guidance_scale`"
            if size != rows:
                raise ValueError(f"`{given[0]}` must have {rows} rows ({reason}), got {size}.")

    def _check_values(self, codes, positions, class_labels, input_ids, labels) -> None:
        """Ranges of what can be read without waiting for a device."""
        if codes is not None and is_readable(codes):
            check_codes(codes, self.config.code_depth, self.config.codebook_size)
        check_ranges(
            positions=(positions, self.num_positions - 1),
            class_labels=(class_labels, self.null_condition_id),
            input_ids=(input_ids, self.null_condition_id),
            labels=(labels, self.config.codebook_size - 1),
        )


def check_step_sampling(guidance_scale, temperature, top_k, top_p) -> None:
    """Numbers of a sampling step; of scalar tensors only those that can be read without waiting for a device."""
    if torch.compiler.is_compiling():
        return
    numbers = dict(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    if guidance_scale is None:
        del numbers["guidance_scale"]
    for name, value in list(numbers.items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"`{name}` must be a number or a scalar tensor, got {value.dtype} of {tuple(value.shape)}."
            )
        if is_readable(value):
            numbers[name] = float(value)
        else:
            del numbers[name]
    check_sampling(**numbers)
