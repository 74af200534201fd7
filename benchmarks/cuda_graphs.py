"""A function's kernels recorded once for each shape of its inputs, and replayed as a CUDA graph after that.

Against `torch.compile(mode="reduce-overhead")` there is nothing to trace or to generate and no guard to check at every
call: a replay costs the host a copy of each input that has changed. Against torch's own backend `cudagraphs` the
weights stay where they are, while that copies them into the graph's memory at each replay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class GraphedCall:
    """Calls `function` by replaying its graph.

    The function must do all its work on the device and never wait for it. Its results are overwritten by the next
    call, of whatever shape, since all graphs share their memory.

    Args:
        function (`Callable`): Takes and returns tensors and what holds them; other arguments are part of the shape.
        in_place (`tuple[str]`): Keyword arguments that it writes to, or that never move: they are not copied, and have
            to be at the same place at each call of a shape.
        recorder (`Callable`): Makes what records: from a function without arguments to its result and the function
            that computes it anew in the same memory.
    """

    def __init__(self, function: Callable, in_place: tuple[str, ...] = (), recorder: Callable | None = None):
        self.function, self.in_place = function, in_place
        self.recorder = CUDAGraphRecorder if recorder is None else recorder
        self.clear()

    def __call__(self, *args, **kwargs):
        fixed = {name: kwargs.pop(name) for name in self.in_place if name in kwargs}
        leaves, structure = tree_flatten((args, kwargs))
        shape = (
            structure,
            tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves),
            tuple((name, tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in fixed.items()),
        )
        if shape not in self._graphs:
            inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            own_args, own_kwargs = tree_unflatten(inputs, structure)
            result, replay = self._record(lambda: self.function(*own_args, **own_kwargs, **fixed))
            self._graphs[shape] = inputs, [None] * len(inputs), fixed, result, replay
        inputs, held, _, result, replay = self._graphs[shape]
        for i, (own, new) in enumerate(zip(inputs, leaves, strict=True)):
            # a tensor that came last time, unchanged, is there already; holding it keeps its place from others
            if isinstance(new, torch.Tensor) and not (held[i] is not None and same_values(held[i], new)):
                own.copy_(new)
                held[i] = (new, new._version)
        replay()
        for tensor in tree_leaves(result):
            torch.autograd.graph.increment_version(tensor)  # a replay writes without torch's knowing
        return result

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphs: dict[Any, tuple] = {}
        self._record = self.recorder()


def same_values(held: tuple[torch.Tensor, int], new: torch.Tensor) -> bool:
    """Whether `new` is the memory of the tensor held, as it was then; nothing is read."""
    tensor, version = held
    return (
        tensor.data_ptr() == new.data_ptr() and tensor.stride() == new.stride() and version == new._version
        and tensor._version == version
    )  # fmt: skip


class CUDAGraphRecorder:
    """Records what a function launches, all of it in one pool of memory."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable) -> tuple[Any, Callable]:
        # The first calls choose algorithms and allocate workspaces, which may not be done while recording.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return result, graph.replay
