"""Which positions each step predicts, and which of the predictions it keeps: Algorithms 1 and 2 of the paper."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .codes import check_codes
from .sampling import check_generator, check_sampling, check_step_numbers, is_integer, stack_on_host


@dataclass
class DraftAndReviseSchedulerOutput(BaseOutput):
    """Output of [`DraftAndReviseScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map after the
            step, input of the next.
    """

    prev_sample: torch.Tensor


@dataclass
class StepInput(BaseOutput):
    """What the transformer is asked in one step; output of [`DraftAndReviseScheduler.get_step_input`].

    Args:
        codes (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map as the
            transformer sees it: the positions to predict are masked.
        positions (`torch.Tensor` of shape `(batch_size, n)`, int64): Row-major positions to predict. Images that have
            fewer than others in this step repeat a position; `step` ignores what is predicted there.
        uniforms (`torch.Tensor` of shape `(batch_size, n, code_depth)`, float32): In `[0, 1)`, one number a code.
    """

    codes: torch.Tensor
    positions: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None


class Block(NamedTuple):
    """The positions of one step, and what they are drawn with."""

    index: torch.Tensor  # (B, n), int64: `height * width`, one past the end, where an image has fewer than n
    positions: torch.Tensor  # (B, n), the same within the image
    uniforms: torch.Tensor  # (B, n, D)
    is_even: bool  # every image has n


class ConfidentDraft(NamedTuple):
    """What a draft by confidence goes by, step by step."""

    remaining: torch.Tensor  # (steps, B), int64: masked positions before the step
    most: list[int]  # the most of any image
    sizes: torch.Tensor  # (steps, B), int64: how many of them are kept
    keys: torch.Tensor  # (B, steps, N)
    uniforms: torch.Tensor  # (B, steps, N, D)


class DraftAndReviseScheduler(SchedulerMixin, ConfigMixin):
    r"""Draft-and-Revise sampling (sections 3.3 and 3.4): first every position is drafted once, block by block; then
    the whole image is revised `num_revisions` times, each time along a fresh partition into `num_revise_steps` blocks,
    where only the block at hand is masked and predicted anew from everything else.

    All that is random is drawn in [`set_partitions`], image by image from its own generator, so that a step is a
    function of its inputs, reads nothing back from the device, and an image does not depend on its batch.

    The arguments are the defaults that a pipeline saves with its models; each is an argument of the pipeline's call
    too.

    Args:
        num_inference_steps (`int`, defaults to 64): Steps of the draft, T_draft.
        num_revise_steps (`int`, defaults to 2): Steps of one revision, T_revise.
        num_revisions (`int`, defaults to 3): Revisions, M.
        guidance_scale (`float`, defaults to 1.0): Classifier-free guidance while revising; 1 means none.
        temperature (`float`, defaults to 0.8): Temperature while revising.
        draft_guidance_scale (`float`, defaults to 1.0): Classifier-free guidance while drafting.
        draft_temperature (`float`, defaults to 1.0): Temperature while drafting.
        selection (`str`, defaults to `"random"`): Which predictions a draft step keeps (supplement C). `"random"`: a
            block of a random partition, and only that block is predicted. `"top-c"`: all undrafted positions are
            predicted, and the most confident kept. `"top-c-50%"`: of those, the less confident half is dropped and the
            block chosen uniformly from the rest. Confidence is the log-probability of the stack.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Sample among the most probable codes of each depth.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 64,
        num_revise_steps: int = 2,
        num_revisions: int = 3,
        guidance_scale: float = 1.0,
        temperature: float = 0.8,
        draft_guidance_scale: float = 1.0,
        draft_temperature: float = 1.0,
        selection: str = "random",
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        check_sampling(
            guidance_scale, temperature, draft_guidance_scale, draft_temperature, selection, top_k=top_k, top_p=top_p
        )
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        num_revise_steps: int | None = None,
        num_revisions: int | None = None,
        selection: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Lay out a run: `timesteps` counts from 0 through the draft and then through each revision.

        Args:
            num_inference_steps (`int`, *optional*): Steps of the draft, 0 or more; `None` takes the saved default,
                here as below.
            num_revise_steps (`int`, *optional*): Steps of one revision, 1 or more.
            num_revisions (`int`, *optional*): Revisions, 0 or more.
            selection (`str`, *optional*): One of `"random"`, `"top-c"`, `"top-c-50%"`.
            device (`torch.device`, *optional*): Accepted for diffusers' sake. `timesteps` stay on the CPU, where
                reading them costs no wait for the device.

        Raises:
            `ValueError`: a number that is no integer or too small, or an unknown selection.
        """

        def default(name, value):
            return self.config[name] if value is None else value

        num_inference_steps = default("num_inference_steps", num_inference_steps)
        num_revise_steps = default("num_revise_steps", num_revise_steps)
        num_revisions = default("num_revisions", num_revisions)
        selection = default("selection", selection)
        check_step_numbers(num_inference_steps, num_revise_steps, num_revisions)
        check_sampling(selection=selection)
        # only now: a refused call leaves the run that is laid out as it is
        self.num_inference_steps, self.num_revise_steps = int(num_inference_steps), int(num_revise_steps)
        self.num_revisions, self.selection = int(num_revisions), selection
        self.timesteps = torch.arange(self.num_inference_steps + self.num_revisions * self.num_revise_steps)
        self._blocks = None

    def is_draft(self, timestep: int | torch.Tensor) -> bool:
        """Whether a timestep, an `int` or a scalar tensor, belongs to the draft rather than to a revision."""
        return self._index(timestep) < self.num_inference_steps

    def _index(self, timestep: int | torch.Tensor) -> int:
        """A timestep as an `int`, which costs no wait for the device: `timesteps` are on the CPU."""
        whole = is_integer(timestep)
        if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
            whole = timestep.dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
        if not whole or not 0 <= int(timestep) < len(self.timesteps):
            raise ValueError(f"`timestep` must be an integer in [0, {len(self.timesteps) - 1}], got {timestep!r}.")
        return int(timestep)

    def set_partitions(
        self,
        sample: torch.Tensor,
        mask_token_id: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        region: torch.Tensor | None = None,
    ) -> None:
        """Draw the partitions and the uniform numbers of the whole run.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map to start
                from; its masked positions are drafted.
            mask_token_id (`int`): The code of a masked position.
            generator (`torch.Generator` or a list of one an image, *optional*): The source of the numbers. One
                generator serves the images in their order.
            region (`torch.Tensor` of shape `(batch_size, height, width)`, bool, *optional*): The positions that are
                revised; all by default.

        Raises:
            `ValueError`: a sample that is no code map; fewer steps than are needed to draft (0), or more steps than
                positions; a list of generators of the wrong length; a region of the wrong shape, or one that leaves
                out a masked position.
        """
        if not is_integer(mask_token_id) or mask_token_id < 1:
            raise ValueError(f"`mask_token_id` must be an integer of at least 1, got {mask_token_id!r}.")
        check_codes(sample, code_depth=None, codebook_size=mask_token_id, name="sample")
        batch_size, height, width, code_depth = sample.shape
        num_positions = height * width
        masked = (sample[..., 0] == mask_token_id).flatten(1).cpu()
        if region is None:
            region = torch.ones_like(masked)
        elif not isinstance(region, torch.Tensor) or region.dtype != torch.bool or region.shape != sample.shape[:3]:
            got = f"{region.dtype} of {tuple(region.shape)}" if isinstance(region, torch.Tensor) else repr(region)
            raise ValueError(f"`region` must be bool of shape {(batch_size, height, width)}, got {got}.")
        region = region.cpu().view_as(masked)
        if (masked & ~region).any():
            raise ValueError("`region` must hold every masked position of `sample`.")
        most = int(masked.sum(dim=1).max())
        if self.num_inference_steps > most or (self.num_inference_steps == 0 and most):
            raise ValueError(
                f"`num_inference_steps` must lie in [{min(1, most)}, {most}], as there are {most} positions to draft, "
                f"got {self.num_inference_steps}."
            )
        most = int(region.sum(dim=1).max())
        if self.num_revisions and self.num_revise_steps > most:
            raise ValueError(
                f"`num_revise_steps` must lie in [1, {most}], as there are {most} positions to revise, "
                f"got {self.num_revise_steps}."
            )
        check_generator(generator, batch_size)

        # Everything random of an image comes from its own generator, phase by phase, so that a draft does not depend
        # on the revisions after it; the rest is done for all images at once, on the host, and sent to the device as a
        # whole.
        images = []
        for row in range(batch_size):
            source = generator[row] if isinstance(generator, (list, tuple)) else generator
            images.append(self._draw_image(int(masked[row].sum()), num_positions, code_depth, source))
        keys = [stack_on_host(phase) for phase in zip(*(image[0] for image in images), strict=True)]
        uniforms = [stack_on_host(phase) for phase in zip(*(image[1] for image in images), strict=True)]

        self.mask_token_id = mask_token_id
        self._shape, device = sample.shape, sample.device
        draft, sizes = self._cut(keys[0][:, 0] if keys[0].shape[1] else None, masked, self.num_inference_steps)
        revisions = [self._cut(phase[:, 0], region, self.num_revise_steps)[0] for phase in keys[1:]]
        phases = [draft, *revisions]
        self._confident = None
        if self.selection != "random":
            phases[0] = []  # which positions a step keeps depends on what is predicted
            if self.num_inference_steps:
                remaining = masked.sum(dim=1) - sizes.cumsum(dim=0) + sizes
                most = remaining.amax(dim=1).tolist()
                self._confident = ConfidentDraft(
                    remaining.to(device), most, sizes.to(device), keys[0].to(device), uniforms[0].to(device)
                )
        indices = [index for phase in phases for index in phase]
        drawn = [phase_uniforms[:, 0] for phase, phase_uniforms in zip(phases, uniforms, strict=True) for _ in phase]
        self._blocks = self._lay_out(indices, drawn, num_positions, device)

    @staticmethod
    def _lay_out(indices, drawn, num_positions: int, device: torch.device) -> list[Block]:
        """Blocks of the positions `(B, n)`, with the numbers `(B, N, D)` of their phase. Two copies to the device."""
        if not indices:
            return []
        shapes, sizes = [index.shape for index in indices], [index.numel() for index in indices]
        uniforms = torch.cat([
            phase.gather(1, index.clamp(max=num_positions - 1).unsqueeze(-1).expand(-1, -1, phase.shape[-1]))
            .flatten(0, 1) for phase, index in zip(drawn, indices, strict=True)
        ]).to(device)  # fmt: skip
        index = torch.cat([index.flatten() for index in indices]).to(device)
        parts = [whole.split(sizes) for whole in (index, index.clamp(max=num_positions - 1), uniforms)]
        return [
            Block(
                index.view(shape),
                positions.view(shape),
                uniforms.unflatten(0, shape),
                bool((on_host < num_positions).all()),
            )
            for index, positions, uniforms, shape, on_host in zip(*parts, shapes, indices, strict=True)
        ]

    def _draw_image(self, num_masked: int, num_positions: int, code_depth: int, generator: torch.Generator | None):
        """Keys `(draws, positions)` and uniforms `(draws, positions, code_depth)` of each phase of one image.

        An ordering of the positions by random keys, cut into blocks, is a uniformly random partition. Keys are drawn
        for all positions, so that a region covering the whole image gives what no region gives.
        """
        device = generator.device if generator is not None else "cpu"

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, device=device, dtype=torch.float32)

        # A confidence strategy predicts a position many times and needs fresh numbers each time. An image that is done
        # before others draws no more than it would alone.
        draft_steps = self.num_inference_steps
        draws = 1 if self.selection == "random" else min(draft_steps, num_masked)
        keys, uniforms = [uniform(draws, num_positions)], [uniform(draws, num_positions, code_depth)]
        if self.selection != "random":
            keys[0] = torch.nn.functional.pad(keys[0], (0, 0, 0, draft_steps - draws))
            uniforms[0] = torch.nn.functional.pad(uniforms[0], (0, 0, 0, 0, 0, draft_steps - draws))
        for _ in range(self.num_revisions):
            keys.append(uniform(1, num_positions))
            uniforms.append(uniform(1, num_positions, code_depth))
        return keys, uniforms

    @staticmethod
    def _cut(keys, positions, num_steps) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Positions in the order of their keys, in balanced blocks; too few positions leave the last ones empty.

        Args:
            keys (`torch.Tensor` of shape `(batch_size, num_positions)`).
            positions (`torch.Tensor` of shape `(batch_size, num_positions)`, bool): Those to cut.
            num_steps (`int`): Blocks.

        Returns:
            For each step the block `(batch_size, n)`, filled up with `num_positions`, one past the end, where `step`
            writes in vain; and how many positions of each image they hold, `(num_steps, batch_size)`.
        """
        if num_steps == 0:
            return [], torch.empty(0, positions.shape[0], dtype=torch.int64)
        count = positions.sum(dim=1)  # (B,)
        order = keys.masked_fill(~positions, torch.inf).argsort(dim=1, stable=True)  # (B, N)
        filled = torch.nn.functional.pad(order, (0, 1), value=positions.shape[1])  # (B, N + 1)
        steps = count.clamp(min=1, max=num_steps)
        bounds = torch.arange(num_steps + 1).unsqueeze(1).minimum(steps) * count // steps  # (steps + 1, B)
        sizes = bounds.diff(dim=0)  # (steps, B)
        blocks = []
        for start, size, longest in zip(bounds, sizes, sizes.amax(dim=1).tolist(), strict=False):
            offset = torch.arange(longest)
            index = (start.unsqueeze(1) + offset).masked_fill(offset >= size.unsqueeze(1), positions.shape[1])
            blocks.append(filled.gather(1, index))
        return blocks, sizes

    def _block(self, sample: torch.Tensor, timestep: int) -> Block:
        """What to predict in a step."""
        if self._blocks is None:
            raise ValueError("`set_partitions` must be called after `set_timesteps` and before the first step.")
        if not isinstance(sample, torch.Tensor) or sample.shape != self._shape or sample.dtype != torch.int64:
            got = f"{sample.dtype} of {tuple(sample.shape)}" if isinstance(sample, torch.Tensor) else repr(sample)
            raise ValueError(
                f"`sample` must be int64 of shape {tuple(self._shape)} as in `set_partitions`, got {got}."
            )
        if self._confident is None:
            return self._blocks[timestep]
        if timestep >= self.num_inference_steps:
            return self._blocks[timestep - self.num_inference_steps]
        # All that is still masked, in a number known beforehand: no shape depends on data.
        most = self._confident.most[timestep]
        masked = (sample[..., 0] == self.mask_token_id).flatten(1)
        positions = masked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        surplus = torch.arange(most, device=sample.device) >= self._confident.remaining[timestep].unsqueeze(1)
        drawn = self._confident.uniforms[:, timestep]  # (B, N, D)
        uniforms = drawn.gather(1, positions.unsqueeze(-1).expand(-1, -1, drawn.shape[-1]))
        return Block(positions.masked_fill(surplus, masked.shape[1]), positions, uniforms, is_even=False)

    def get_step_input(self, sample: torch.Tensor, timestep: int | torch.Tensor) -> StepInput:
        """What to ask of the transformer at `timestep`: see [`StepInput`].

        Args:
            sample (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map.
            timestep (`int` or scalar tensor): One of `timesteps`.
        """
        block = self._block(sample, self._index(timestep))
        codes = self._write(sample, block.index, self.mask_token_id, block.is_even)
        return StepInput(codes=codes, positions=block.positions, uniforms=block.uniforms)

    @staticmethod
    def _write(sample: torch.Tensor, index: torch.Tensor, stacks: torch.Tensor | int, is_even: bool) -> torch.Tensor:
        """`sample` with `stacks` `(B, n, D)`, or one code in all places, at `index` `(B, n)`; one past the end, where
        not `is_even`, is nowhere."""
        flat = sample.flatten(1, 2)
        index = index.unsqueeze(-1).expand(-1, -1, flat.shape[-1])
        if is_even:
            return flat.scatter(1, index, stacks).view(sample.shape)
        flat = torch.cat([flat, flat[:, :1]], dim=1)  # (B, N + 1, D)
        return flat.scatter(1, index, stacks)[:, :-1].reshape(sample.shape)

    def step(
        self,
        model_output: tuple[torch.Tensor, torch.Tensor],
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DraftAndReviseSchedulerOutput | tuple:
        """Keep some of the predicted stacks.

        Args:
            model_output (`tuple` of `torch.Tensor`): Stacks `(batch_size, n, code_depth)` int64 and their
                log-probabilities `(batch_size, n)`, predicted for [`get_step_input`] of the same `sample` and
                `timestep`.
            timestep (`int` or scalar tensor): One of `timesteps`.
            sample (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map before.
            generator (`torch.Generator`, *optional*): Accepted for diffusers' sake; all is drawn in `set_partitions`.
            return_dict (`bool`, defaults to `True`): A [`DraftAndReviseSchedulerOutput`], or a tuple of its field.

        Raises:
            `ValueError`: no partitions, a timestep that is none of `timesteps`, a sample or a model output of another
                dtype or shape than this step asks for.
        """
        timestep = self._index(timestep)
        index, _, _, is_even = self._block(sample, timestep)
        if not (
            isinstance(model_output, (tuple, list))
            and len(model_output) == 2
            and all(isinstance(tensor, torch.Tensor) for tensor in model_output)
        ):
            raise ValueError(f"`model_output` must be a tuple of stacks and log-probabilities, got {model_output!r}.")
        stacks, log_probs = model_output
        if (
            stacks.shape != (*index.shape, sample.shape[-1])
            or log_probs.shape != index.shape
            or stacks.dtype != sample.dtype
            or not log_probs.is_floating_point()
        ):
            raise ValueError(
                f"`model_output` must hold int64 stacks of shape {(*index.shape, sample.shape[-1])} and "
                f"floating-point log-probabilities of shape {tuple(index.shape)}, got {stacks.dtype} of "
                f"{tuple(stacks.shape)} and {log_probs.dtype} of {tuple(log_probs.shape)}."
            )
        if self._confident is not None and timestep < self.num_inference_steps:
            num_positions = sample.shape[1] * sample.shape[2]
            keep = self._most_confident(log_probs, index, timestep, num_positions)
            index = index.masked_fill(~keep, num_positions)
        prev_sample = self._write(sample, index, stacks, is_even)
        return DraftAndReviseSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _most_confident(self, log_probs, index, timestep: int, num_positions: int) -> torch.Tensor:
        """Which of the predicted positions a confidence strategy keeps: `(batch_size, n)` bool."""
        size = self._confident.sizes[timestep].unsqueeze(1)
        surplus = index == num_positions
        rank = log_probs.masked_fill(surplus, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        if self.selection == "top-c":
            return rank < size
        pool = torch.maximum((self._confident.remaining[timestep].unsqueeze(1) + 1) // 2, size)
        keys = self._confident.keys[:, timestep].gather(1, index.clamp(max=num_positions - 1))
        return keys.masked_fill(rank >= pool, torch.inf).argsort(dim=1, stable=True).argsort(dim=1) < size

    def __len__(self) -> int:
        return len(self.timesteps)
