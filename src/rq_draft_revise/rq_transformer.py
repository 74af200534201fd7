"""RQ-Transformer: the autoregressive baseline, which predicts code stacks one after the other in row-major order."""

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
from .contextual_rq_transformer import check_step_sampling
from .depth_transformer import DepthTransformer
from .publishing import ModelCardMixin


@dataclass
class NextStackOutput(BaseOutput):
    """The stack at one position.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size,)`, float32): Log-probability of each whole stack, the sum over
            its codes, under the distribution that was sampled.
        stacks (`torch.Tensor` of shape `(batch_size, code_depth)`, int64): Codes in `[0, codebook_size)`.
        past_key_values (`torch.Tensor`): The cache that was given, with one more slot filled.
    """

    log_probs: torch.Tensor
    stacks: torch.Tensor | None = None
    past_key_values: torch.Tensor | None = None


@dataclass
class CacheOutput(BaseOutput):
    """What sampling starts from.

    Args:
        past_key_values (`torch.Tensor` of shape `(num_spatial_layers, 2, rows, prefix_length + height * width - 1,
            num_attention_heads, attention_head_dim)`): Keys and values in each spatial block, of all of the condition
            but its last token; the other slots are empty.
    """

    past_key_values: torch.Tensor


class RQTransformerModel(ModelCardMixin, CodeTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""RQ-Transformer (Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022).

    A causal *spatial* transformer reads the condition and then the stacks of the image in row-major order, where stack
    n enters as `PE_N(n) + Σ_d P(e(S_nd))`. Its output at the last token of the condition is the context of the first
    stack, its output at a stack the context of the next; the last stack is never read, nor is its position embedding.
    The causal *depth* transformer turns each context into D codes. The defaults are the LSUN church model of
    370,087,936 parameters.

    The condition is a prefix of at least one token: without a condition, one start token.

    With `code_depth=1, num_depth_layers=0, learned_code_embedding=True` this is VQ-GAN's transformer.

    Args:
        height (`int`, defaults to 8), width (`int`, defaults to 8): Positions of the code map.
        code_depth (`int`, defaults to 4): D.
        codebook_size (`int`, defaults to 16384): K.
        codebook_dim (`int`, defaults to 256): Width of the RQ-VAE's codebook vectors.
        shared_codebook (`bool`, defaults to `True`): Whether the RQ-VAE has one codebook for all depths.
        num_spatial_layers (`int`, defaults to 24), num_depth_layers (`int`, defaults to 4): Blocks. No depth blocks
            only where `code_depth` is 1.
        num_attention_heads (`int`, defaults to 16), attention_head_dim (`int`, defaults to 64): d is their product.
        dropout (`float`, defaults to 0.1): On the output of each attention and MLP while training.
        num_classes (`int`, *optional*): Class-conditional.
        text_vocab_size (`int`, *optional*): Text-conditional.
        max_text_length (`int`, defaults to 32): Tokens of a text.
        text_loss_weight (`float`, defaults to 0.1): Weight of the text loss; the image loss has the rest.
        null_condition (`bool`, defaults to `False`): Whether there is a null class `num_classes`, or a null token
            `text_vocab_size` that in all places of a row is the null text, for classifier-free guidance. The published
            models have none.
        learned_code_embedding (`bool`, defaults to `False`): Whether codes enter as vectors of the model's own instead
            of projected codebook vectors; only where `code_depth` is 1.

    Raises:
        `ValueError`: a number out of its range, two kinds of condition, or options that exclude each other.
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
        null_condition: bool = False,
        learned_code_embedding: bool = False,
    ):
        super().__init__()
        self._check_config()
        if null_condition and num_classes is None and text_vocab_size is None:
            raise ValueError("`null_condition` must be False for an unconditional model, got True.")
        if learned_code_embedding and code_depth > 1:
            raise ValueError(f"`learned_code_embedding` must be False with `code_depth` {code_depth}, got True.")

        dim = num_attention_heads * attention_head_dim
        self.code_embedding = nn.Embedding(codebook_size, dim) if learned_code_embedding else None
        self.input_projection = None if learned_code_embedding else nn.Linear(codebook_dim, dim)
        self.position_embedding = nn.Parameter(torch.empty(height * width, dim))
        self.condition_embedding = nn.Embedding((num_classes or text_vocab_size or 1) + null_condition, dim)
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
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def prefix_length(self) -> int:
        """Positions of the condition, P: `max_text_length` for a text, 1 for a class or the start token."""
        return 1 if self.config.text_vocab_size is None else self.config.max_text_length

    @property
    def null_condition_id(self) -> int | None:
        """The label or token that stands for "no condition"; `None` for a model that has none."""
        return (self.config.num_classes or self.config.text_vocab_size) if self.config.null_condition else None

    def forward(
        self,
        codes: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
        uniforms: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float | None = None,
        temperature: torch.Tensor | float = 1.0,
        top_k: int | list[int] | None = None,
        top_p: float | list[float] | None = None,
        return_dict: bool = True,
    ) -> TeacherForcingOutput | NextStackOutput | CacheOutput | tuple:
        r"""Three uses, by what is given.

        - `labels`: teacher forcing.
        - neither `labels` nor `uniforms`: a new cache, for `past_key_values` of later calls.
        - `uniforms`: sampling of the stack at one position, all positions before it having been sampled by calls with
          the same cache. It has a slot for everything that is ever read, so that its shape never changes: a compiled
          step serves all positions. **The call writes into it**, and the slots up to the present one are attended to.

        Args:
            codes (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The code map
                while sampling, of which only the stack before `position` is read. For a new cache only an
                unconditional model takes it, as the only thing that says how many rows there are.
            position (`torch.Tensor` of shape `(1,)`, int64, *optional*): The row-major position to sample.
            uniforms (`torch.Tensor` of shape `(batch_size, code_depth)`, *optional*): In `[0, 1)`, one number a code.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, int64, *optional*): Of a class-conditional model, in
                every call; in `[0, num_classes)`, or with a null condition `[0, num_classes]`.
            input_ids (`torch.Tensor` of shape `(batch_size, max_text_length)`, int64, *optional*): Of a
                text-conditional model, in every call; padded to full length.
            labels (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The true
                code map, input and target in one.
            past_key_values (`torch.Tensor`, *optional*): From [`CacheOutput`], then from [`NextStackOutput`].
            guidance_scale (`float` or scalar tensor, *optional*): Classifier-free guidance `ℓ = ℓ_u + s(ℓ_c - ℓ_u)`
                while sampling. The condition and the cache then have `2 * batch_size` rows: the conditions, then the
                null conditions.
            temperature (`float` or scalar tensor, defaults to 1): Of the sampling, positive. Scalar tensors spare a
                compiled step the recompilation.
            top_k (`int` or a list of one a depth, *optional*), top_p (`float` or a list of one a depth, *optional*):
                Sample among the most probable codes of each depth.
            return_dict (`bool`, defaults to `True`): An output class, or its fields as a tuple.

        Raises:
            `ValueError`: shapes that do not fit the model or each other, a condition missing or not known to the
                model, an argument that another use has, a temperature or the like that nothing can be sampled with. On
                the CPU also values out of range; on an accelerator reading them would wait for the device.
        """
        self._check_inputs(codes, position, uniforms, class_labels, input_ids, labels, past_key_values, guidance_scale)
        self.check_sampling(guidance_scale, temperature, top_k, top_p)
        if class_labels is not None:
            condition = class_labels.unsqueeze(1)  # (B, 1)
        elif input_ids is not None:
            condition = input_ids  # (B, P)
        else:
            code_map = codes if labels is None else labels
            condition = code_map.new_zeros(code_map.shape[0], 1)  # the start token
        prefix = self.condition_embedding(condition) + self.prefix_position_embedding  # (B, P, d)

        if labels is not None:
            return self._teach(prefix, labels.flatten(1, 2), input_ids, return_dict)
        if uniforms is None:
            past_key_values = self._new_cache(prefix)
            return CacheOutput(past_key_values) if return_dict else (past_key_values,)

        # What is read last: the stack before, and before the first stack the last token of the condition.
        before = (position - 1).clamp(min=0)  # (1,)
        stacks = codes.flatten(1, 2).index_select(1, before).clamp(max=self.config.codebook_size - 1)  # (B, 1, D)
        stacks = self._embed(stacks) + self.position_embedding.index_select(0, before)  # (B, 1, d)
        if guidance_scale is not None:
            stacks = torch.cat([stacks, stacks])  # (2B, 1, d)
        hidden_states = torch.where(position == 0, prefix[:, -1:], stacks)
        slot = position + self.prefix_length - 1
        for i, block in enumerate(self.blocks):
            cache = past_key_values[i]  # by index: autograd forbids to write into what iterating over a tensor gives
            hidden_states, _, _ = block(hidden_states, cache[0], cache[1], False, slot)
        stacks, log_probs = self.depth_transformer(
            hidden_states.squeeze(1),  # (B, d), or (2B, d) with guidance
            uniforms=uniforms,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        log_probs = log_probs.sum(dim=-1)
        if not return_dict:
            return log_probs, stacks, past_key_values
        return NextStackOutput(log_probs, stacks, past_key_values)

    def _teach(self, prefix: torch.Tensor, stacks: torch.Tensor, input_ids: torch.Tensor | None, return_dict: bool):
        """Logits and losses, from the embedded condition `(B, P, d)` and the true stacks `(B, N, D)`."""
        image = self._embed(stacks[:, :-1]) + self.position_embedding[:-1]  # (B, N-1, d)
        hidden_states = torch.cat([prefix, image], dim=1)  # (B, P+N-1, d)
        for block in self.blocks:
            hidden_states, _, _ = self._run(block, hidden_states, None, None, True)
        context = hidden_states[:, self.prefix_length - 1 :]  # (B, N, d)
        logits = self.depth_transformer(context.flatten(0, 1), stacks=stacks.flatten(0, 1))
        logits = logits.unflatten(0, stacks.shape[:2])  # (B, N, D, K)
        output = self._teacher_forcing(logits, stacks, hidden_states[:, : self.prefix_length - 1], input_ids)
        return output if return_dict else tuple(vars(output).values())

    def _embed(self, stacks: torch.Tensor) -> torch.Tensor:
        """Stacks `(B, n, D)` -> `(B, n, d)`, without their positions."""
        if self.code_embedding is not None:
            return self.code_embedding(stacks.squeeze(-1))
        return project_vectors(self.input_projection, self.depth_transformer.codebook(stacks))

    def _new_cache(self, prefix: torch.Tensor) -> torch.Tensor:
        """The cache after all but the last of the embedded condition `(B, P, d)`."""
        batch_size, known = prefix.shape[0], prefix.shape[1] - 1
        heads = (self.config.num_attention_heads, self.config.attention_head_dim)
        cache = prefix.new_zeros(len(self.blocks), 2, batch_size, known + self.num_positions, *heads)
        if known > 0:
            hidden_states = prefix[:, :-1]  # (B, P-1, d)
            for i, block in enumerate(self.blocks):
                hidden_states, cache[i, 0, :, :known], cache[i, 1, :, :known] = block(hidden_states, is_causal=True)
        return cache

    def _check_inputs(
        self, codes, position, uniforms, class_labels, input_ids, labels, past_key_values, guidance_scale
    ) -> None:
        """Combinations, types, shapes, and the ranges of what can be read without waiting for a device."""
        config = self.config
        expected = "class_labels" if config.num_classes is not None else "input_ids"
        conditional = config.num_classes is not None or config.text_vocab_size is not None
        conditions = dict(class_labels=class_labels, input_ids=input_ids)
        given = [name for name, value in conditions.items() if value is not None]
        if given != [expected] * conditional:
            needed = f"`{expected}` as its condition" if conditional else "no condition"
            raise ValueError(f"This model takes {needed}, got {given or 'none'}.")

        others = dict(
            codes=codes, position=position, uniforms=uniforms, labels=labels, past_key_values=past_key_values
        )
        given = [name for name, value in others.items() if value is not None]
        new_cache, sampling = ["codes"] * (not conditional), ["codes", "position", "uniforms", "past_key_values"]
        if given not in (["labels"], new_cache, sampling):
            raise ValueError(
                f"Beside the condition give `labels` (teacher forcing), {sampling} (sampling) or "
                f"{new_cache or 'nothing'} (a new cache), got {given or 'nothing'}."
            )
        if guidance_scale is not None and (given != sampling or not conditional):
            raise ValueError(
                f"`guidance_scale` must be None except in the sampling of a conditional model, got {guidance_scale}."
            )

        # The code map says how many images there are. Where there is none the condition may have any number of rows.
        stacks = ("batch_size", config.height, config.width, config.code_depth)
        for name in ("codes", "labels"):
            check_tensor(name, others[name], stacks)
        code_map = codes if labels is None else labels
        batch_size = "batch_size" if code_map is None else len(code_map)
        rows = batch_size if guidance_scale is None else 2 * batch_size
        slots = self.prefix_length + self.num_positions - 1
        heads = (config.num_attention_heads, config.attention_head_dim)
        check_tensor("position", position, (1,))
        check_tensor("uniforms", uniforms, (batch_size, config.code_depth), floating=True)
        check_tensor("class_labels", class_labels, (rows,))
        check_tensor("input_ids", input_ids, (rows, self.prefix_length))
        check_tensor("past_key_values", past_key_values, (len(self.blocks), 2, rows, slots, *heads), floating=True)

        if codes is not None and is_readable(codes):
            check_codes(codes, config.code_depth, config.codebook_size)
        check_ranges(
            **{
                "position": (position, self.num_positions - 1),
                expected: (conditions[expected], self.condition_embedding.num_embeddings - 1),
                "labels": (labels, config.codebook_size - 1),
            }
        )

    def check_sampling(self, guidance_scale, temperature, top_k, top_p) -> None:
        """Numbers of the sampling, depth by depth."""
        depths = self.config.code_depth
        for k, p in zip(per_depth("top_k", top_k, depths), per_depth("top_p", top_p, depths), strict=True):
            check_step_sampling(guidance_scale, temperature, k, p)


def per_depth(name: str, value, code_depth: int) -> list:
    """The numbers of all depths, given as one or as a list of `code_depth`, else a `ValueError` that says `name`."""
    if not isinstance(value, (list, tuple)):
        return [value] * code_depth
    if len(value) != code_depth:
        raise ValueError(f"`{name}` must be a number or a list of {code_depth}, one a depth, got {value!r}.")
    return list(value)
