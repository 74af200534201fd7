"""The depth transformer: from the context of a position to the D codes of its stack, one after the other."""

import torch
import torch.nn as nn

from .attention import DepthTransformerBlock
from .codes import Codebook


def filter_logits(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Set to -inf all but the `top_k` most probable codes, then all outside the smallest set of mass `top_p`.

    `(..., codebook_size)` -> same shape. The most probable code always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of all more probable codes
        top_p = max(top_p, torch.finfo(before.dtype).tiny)  # less may round to 0, which drops the most probable too
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _first_above(weights: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first positive weight whose cumulative sum exceeds `threshold`, and the sum before it.

    `(M, n)` and `(M,)` -> `(M,)` and `(M,)`. Rounding may put the threshold at or past the end; the last positive
    weight is taken then, never one of weight zero.
    """
    sums = weights.cumsum(dim=-1)
    reachable = torch.where(weights > 0, sums, -torch.ones_like(sums))
    limit = reachable.amax(dim=-1) * (1 - torch.finfo(sums.dtype).eps)
    threshold = torch.minimum(threshold, limit)
    index = (reachable > threshold.unsqueeze(-1)).to(torch.int32).argmax(dim=-1, keepdim=True)
    return index.squeeze(-1), (sums - weights).gather(-1, index).squeeze(-1)


def sample_codes(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample by inverting the cumulative distribution: one uniform number decides one code.

    The cumulative sum goes over ~√K groups first and then inside the one group that was hit: it reads the
    probabilities once, rounds less than one sum over K terms would, and needs no noise of size K. All in float32.

    Args:
        logits (`torch.Tensor` of shape `(M, codebook_size)`).
        uniforms (`torch.Tensor` of shape `(M,)`, float32): In `[0, 1)`.
        temperature (`float` or scalar tensor): Divides the logits; positive.
        top_k (`int`, *optional*), top_p (`float`, *optional*): See [`filter_logits`].

    Returns:
        codes `(M,)` int64 and their log-probabilities `(M,)` float32 under the distribution that was sampled.
    """
    logits = logits.float()
    # the largest is 0 from here on, so that no temperature makes infinities of which a softmax would make NaN
    logits = filter_logits((logits - logits.amax(dim=-1, keepdim=True)) / temperature, top_k, top_p)
    codebook_size = logits.shape[-1]
    weights = logits.exp()  # (M, K)
    group_size = max(1, int(codebook_size**0.5))
    padding = -codebook_size % group_size
    groups = nn.functional.pad(weights, (0, padding)).unflatten(-1, (-1, group_size))  # (M, G, K/G)
    mass = groups.sum(dim=-1)  # (M, G)
    threshold = uniforms.float() * mass.sum(dim=-1)
    group, before = _first_above(mass, threshold)
    inside = groups.gather(1, group[:, None, None].expand(-1, 1, group_size)).squeeze(1)  # (M, K/G)
    offset, _ = _first_above(inside, threshold - before)
    codes = group * group_size + offset
    log_probs = logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
    return codes, log_probs


class DepthTransformer(nn.Module):
    r"""Causal transformer over the codes of one stack, with the code head that all depths share.

    Inputs are `v_1 = PE_D(1) + h_n` and `v_d = PE_D(d) + P'(Σ_{d'<d} e(S_nd'))`; the head is LayerNorm and
    Linear(d→K). With D = 1 there is no P', and without blocks no PE_D either: that is the head of VQ-GAN's
    transformer. Positions are independent of each other given their contexts, so they form the batch.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        head_dim: int,
        code_depth: int,
        codebook_size: int,
        codebook_dim: int,
        shared_codebook: bool,
        dropout: float,
    ):
        super().__init__()
        self.code_depth = code_depth
        self.codebook = Codebook(1 if shared_codebook else code_depth, codebook_size, codebook_dim)
        self.position_embedding = None
        if code_depth > 1 or num_layers > 0:
            self.position_embedding = nn.Parameter(torch.empty(code_depth, dim))
        self.input_projection = nn.Linear(codebook_dim, dim) if code_depth > 1 else None
        self.blocks = nn.ModuleList(DepthTransformerBlock(dim, head_dim, dropout) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, codebook_size)
        self.gradient_checkpointing = False

    def forward(
        self,
        context: torch.Tensor,
        stacks: torch.Tensor | None = None,
        uniforms: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float | None = None,
        temperature: torch.Tensor | float = 1.0,
        top_k: int | list[int] | None = None,
        top_p: float | list[float] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Teacher forcing when `stacks` is given, sampling when `uniforms` is.

        Args:
            context (`torch.Tensor` of shape `(M, dim)`): Output of the spatial transformer at M positions. With a
                guidance scale `(2M, dim)`: the conditional contexts, then the unconditional ones.
            stacks (`torch.Tensor` of shape `(M, D)`, int64): The true codes.
            uniforms (`torch.Tensor` of shape `(M, D)`): One number in `[0, 1)` a code.
            guidance_scale, temperature, top_k, top_p: See [`ContextualRQTransformerModel.forward`]. Here the last two
                may be lists of D, one number a depth.

        Returns:
            logits `(M, D, codebook_size)`, or stacks `(M, D)` int64 and their log-probabilities `(M, D)` float32.
        """
        if uniforms is None:
            return self._logits(context, stacks)
        return self._sample(context, uniforms, guidance_scale, temperature, top_k, top_p)

    def _logits(self, context: torch.Tensor, stacks: torch.Tensor) -> torch.Tensor:
        hidden_states = context.unsqueeze(1)  # (M, 1, d)
        if self.code_depth > 1:
            partial_sums = self.codebook(stacks)[:, :-1].cumsum(dim=1)  # (M, D-1, C)
            hidden_states = torch.cat([hidden_states, self.input_projection(partial_sums)], dim=1)  # (M, D, d)
        if self.position_embedding is not None:
            hidden_states = hidden_states + self.position_embedding
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, _, _ = self._gradient_checkpointing_func(block, hidden_states, None, None, True)
            else:
                hidden_states, _, _ = block(hidden_states, is_causal=True)
        return self.head(self.norm_out(hidden_states))  # (M, D, K)

    def _sample(self, context, uniforms, guidance_scale, temperature, top_k, top_p):
        past = [(None, None)] * len(self.blocks)
        hidden_states, partial_sum = context.unsqueeze(1), 0.0  # (M, 1, d)
        stacks, log_probs = [], []
        for depth in range(self.code_depth):
            if self.position_embedding is not None:
                # a sum, not a view: a block that is compiled for all shapes takes the two for different inputs
                hidden_states = hidden_states + self.position_embedding[depth]
            for i, block in enumerate(self.blocks):
                hidden_states, *past[i] = block(hidden_states, *past[i])
            logits = self.head(self.norm_out(hidden_states.squeeze(1)))  # (M, K)
            if guidance_scale is not None:
                conditional, unconditional = logits.float().chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            k, p = (value[depth] if isinstance(value, (list, tuple)) else value for value in (top_k, top_p))
            codes, log_prob = sample_codes(logits, uniforms[:, depth], temperature, k, p)
            stacks.append(codes)
            log_probs.append(log_prob)
            if depth + 1 < self.code_depth:
                partial_sum = partial_sum + self.codebook(codes, depth)  # (M, C)
                hidden_states = self.input_projection(partial_sum).unsqueeze(1)  # (M, 1, d)
                if guidance_scale is not None:  # both halves go on with the same codes
                    hidden_states = torch.cat([hidden_states, hidden_states])
        return torch.stack(stacks, dim=-1), torch.stack(log_probs, dim=-1)
