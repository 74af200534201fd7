"""Draft-and-Revise without any of the tricks: the oracle that the fast sampler is compared with.

In every step and for every depth it runs the whole model on the condition and on all positions, twice where there is
guidance, looks only at the positions of the block, and inverts the cumulative distribution in float64 over all K
codes.
"""

import torch


def naive_logits(transformer, codes, guess, depth, condition):
    """Logits of one depth at all positions, `(B, N, K)`; `guess` holds the codes of the depths before."""
    positions = torch.arange(transformer.num_positions).expand(codes.shape[0], -1)
    output = transformer(codes, positions=positions, labels=guess, **condition)
    return output.logits[:, :, depth]


def naive_stacks(transformer, codes, positions, uniforms, condition, null_condition, scale, temperature):
    """Stacks `(B, n, D)` at `positions` `(B, n)`, as `transformer(codes, positions, uniforms, ...)` samples them."""
    batch_size, num_positions = codes.shape[0], transformer.num_positions
    guess = codes.clamp(max=transformer.config.codebook_size - 1)
    for depth in range(transformer.config.code_depth):
        logits = naive_logits(transformer, codes, guess, depth, condition)
        if scale != 1:
            unconditional = naive_logits(transformer, codes, guess, depth, null_condition)
            logits = unconditional + scale * (logits - unconditional)
        cdf = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        u = torch.zeros(batch_size, num_positions, 1, dtype=torch.float64)
        u.scatter_(1, positions.unsqueeze(-1), uniforms[..., depth : depth + 1].double())
        drawn = torch.searchsorted(cdf, u * cdf[..., -1:], right=True).squeeze(-1)
        flat = guess.flatten(1, 2).clone()
        flat[..., depth] = drawn.clamp(max=cdf.shape[-1] - 1)
        guess = flat.view_as(codes)
    return guess.flatten(1, 2).gather(1, positions.unsqueeze(-1).expand(-1, -1, codes.shape[-1]))


@torch.no_grad()
def naive_draft_and_revise(transformer, scheduler, codes, condition, null_condition, generator):
    """A whole run from `codes`, with the defaults of `scheduler`, whose timesteps are set. Returns the codes."""
    config, mask = scheduler.config, transformer.mask_token_id
    scheduler.set_partitions(codes, mask, generator)
    for timestep in scheduler.timesteps:
        draft = scheduler.is_draft(timestep)
        step = scheduler.get_step_input(codes, timestep)
        stacks = naive_stacks(
            transformer,
            step.codes,
            step.positions,
            step.uniforms,
            condition,
            null_condition,
            scale=config.draft_guidance_scale if draft else config.guidance_scale,
            temperature=config.draft_temperature if draft else config.temperature,
        )
        flat = codes.flatten(1, 2).clone()
        for row in range(codes.shape[0]):
            flat[row, step.positions[row]] = stacks[row]
        codes = flat.view_as(codes)
    return codes
