"""The pre-LayerNorm transformer block that the spatial and the depth transformer share."""

import torch
import torch.nn as nn
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn


class SelfAttentionProcessor:
    """Computes [`SelfAttention`] by diffusers' attention dispatch, so that `set_attention_backend` applies."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "SelfAttention",
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        is_causal: bool = False,
        slot: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))  # (B, L, H, d/H)
        attn_mask = None
        if slot is not None:
            past_key.index_copy_(1, slot, key.detach().to(past_key.dtype))
            past_value.index_copy_(1, slot, value.detach().to(past_value.dtype))
            key, value = past_key.to(key.dtype), past_value.to(value.dtype)  # (B, P, H, d/H)
            attn_mask = (torch.arange(key.shape[1], device=key.device) <= slot)[None, None, None]  # (1, 1, 1, P)
        elif past_key is not None:
            # (B, P+L, H, d/H); of one dtype, also where accelerate has made float32 of a condition's keys and values
            key = torch.cat([past_key.to(key.dtype), key], dim=1)
            value = torch.cat([past_value.to(value.dtype), value], dim=1)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # (B, L, H, d/H)
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)  # (B, L, d)
        return attn.to_out[1](attn.to_out[0](hidden_states)), key, value


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention whose queries may also look at keys and values computed before.

    Args:
        dim (`int`): Width d.
        head_dim (`int`): Width of one head; d must be a multiple of it.
        dropout (`float`): Dropout after the output projection.
    """

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]

    def __init__(self, dim: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.head_dim, self.use_bias = dim // head_dim, head_dim, True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        is_causal: bool = False,
        slot: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`TransformerBlock.forward`]."""
        return self.processor(self, hidden_states, past_key, past_value, is_causal, slot)


class TransformerBlock(nn.Module):
    """`x + Attention(LN(x))`, then `x + MLP(LN(x))` with a GELU and 4d hidden units: 12d² + 13d parameters."""

    def __init__(self, dim: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, head_dim, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, mult=4, activation_fn="gelu")
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        is_causal: bool = False,
        slot: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, dim)`).
            past_key, past_value (`torch.Tensor` of shape `(batch_size, past, heads, head_dim)`, *optional*): Keys and
                values of what stands before `hidden_states`, which all of these positions attend to.
            is_causal (`bool`): Whether a position sees only itself and those before it; not together with a past.
            slot (`torch.Tensor` of shape `(1,)`, int64, *optional*): The past is a cache of fixed size, and `length`
                is 1: the new key and value are written into it, in place, at this index, and the slots up to it are
                attended to.

        Returns:
            hidden states `(batch_size, length, dim)`, keys and values `(batch_size, past + length, heads, head_dim)`,
            or those of the cache with a slot.
        """
        attended, key, value = self.attn(self.norm1(hidden_states), past_key, past_value, is_causal, slot)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.dropout(self.ff(self.norm2(hidden_states)))
        return hidden_states, key, value


# Blocks of different shapes are different classes, each with a `forward` of its own: `compile_repeated_blocks`
# compiles each of them, and dynamo counts recompilations by function.
class SpatialTransformerBlock(TransformerBlock):
    """Sees the h·w positions of an image and the condition before them."""

    def forward(self, hidden_states, past_key=None, past_value=None, is_causal=False, slot=None):
        """See [`TransformerBlock.forward`]."""
        return super().forward(hidden_states, past_key, past_value, is_causal, slot)


class DepthTransformerBlock(TransformerBlock):
    """Sees the D codes of one stack."""

    def forward(self, hidden_states, past_key=None, past_value=None, is_causal=False):
        """See [`TransformerBlock.forward`]."""
        return super().forward(hidden_states, past_key, past_value, is_causal)
