"""An accelerator that is not there: tensors that hold their data on the CPU and say `claimed:0`, under a GPU's rules.

    with claimed_device() as seen:
        pipe.to("claimed")
        pipe("a cat")
    assert not seen.waits

Inside, an operation on tensors of both devices is refused as a GPU would refuse it, float64 as Apple's would, and what
the host would have to wait for is counted: values read back, blocking copies, shapes that depend on data. Speed and
rounding are the CPU's. It is a backend in Python, torch's private one, so gradients and whole trainings run on it.
"""

import collections
import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


HAS_PLACE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # torch 2.11 and later
DEVICE = None
if HAS_PLACE:

    class Backend(backend_registration._DummyPrivateUse1Hook):
        def is_available(self):
            return ClaimedDevice.current is not None  # to everything else in this process it is not there

    class DeviceModule(backend_registration._DummyBackendModule):
        def is_available(self):
            return ClaimedDevice.current is not None

        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

        def synchronize(self, device=None):
            pass

    # once a process, and for good
    backend_registration._setup_privateuseone_for_python_backend("claimed", DeviceModule(), Backend())
    DEVICE = torch.device("claimed", 0)
SOURCES = Path(__file__).resolve().parents[1]

# Their results have a shape, or are a number, that the host has to read.
READS = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "masked_select", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Not even a scalar of the CPU may stand among their tensors.
STRICT = {"cat", "stack", "index_select", "gather", "scatter", "mm", "addmm", "bmm", "embedding", "index_copy_"}
STORAGE = {"_has_compatible_shallow_copy_type", "set_", "set_data"}


class ClaimedTensor(torch.Tensor):
    """A tensor of the claimed device; `held` has its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return ClaimedDevice.current.run(function, args, kwargs or {})

    def untyped_storage(self):
        return self.held.untyped_storage()  # addresses say which tensors share their memory

    def data_ptr(self):
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol):
        ClaimedDevice.current.wait("pickle")
        return self.held.__reduce_ex__(protocol)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of a device to numpy: use Tensor.cpu()")

    __array__ = numpy

    def tolist(self):
        ClaimedDevice.current.wait("tolist")
        return self.held.tolist()


class ClaimedDevice(TorchDispatchMode):
    """Runs every operation on the CPU and keeps the rules; `waits` counts by kind and line, `kernels` by name."""

    current = None

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def wait(self, kind: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(SOURCES / "src"))]
        self.waits[kind, f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"] += 1

    def run(self, function, args, kwargs):
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, ClaimedTensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        on_device = target == DEVICE.type or (bool(ours) and target != "cpu")
        if on_device and kwargs.get("generator") is not None and kwargs["generator"].device.type == "cpu":
            raise RuntimeError(f"{function}: a generator of the CPU for a tensor of the device")
        if ours:
            self._check(name, function, args, kwargs, tensors)
        moves = target is not None and (target == DEVICE.type) != isinstance(args[0] if args else None, ClaimedTensor)
        if name == "_to_copy" and moves and not kwargs.get("non_blocking"):
            self.wait(f"copy to {target}")
        if on_device and not function.is_view and name not in ("detach", "alias", "lift_fresh", "empty", "empty_like"):
            self.kernels[name] += 1

        def held(value):
            if isinstance(value, torch.device) and value.type == DEVICE.type:
                return torch.device("cpu")
            return value.held if isinstance(value, ClaimedTensor) else value

        result = function(
            *tree_map(held, args), **{k: v for k, v in tree_map(held, kwargs).items() if k != "pin_memory"}
        )
        if name == "_local_scalar_dense":
            return result
        # what an operation wrote in place comes back as the tensor that it was given
        given = [*args, *kwargs.values()]
        written = {
            id(held(value)): value
            for value, argument in zip(given, function._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        }

        def claimed(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, ClaimedTensor):
                return value
            if on_device and value.dtype == torch.float64:
                raise TypeError(f"{function}: float64, which not every device has")
            return written.get(id(value), ClaimedTensor(value) if on_device else value)

        return tree_map(claimed, result)

    def _check(self, name, function, args, kwargs, tensors) -> None:
        """Refuse tensors of both devices, and count waits."""
        others = [tensor for tensor in tensors if not isinstance(tensor, ClaimedTensor)]
        if name in READS:
            self.wait(name)
        elif name == "copy_":
            if others and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.wait("copy_")
        elif name in INDEXING:
            for index in [index for index in args[1] if index is not None]:
                if not isinstance(args[0], ClaimedTensor):
                    raise RuntimeError(f"{function}: a tensor of the CPU indexed by one of the device")
                if not isinstance(index, ClaimedTensor):
                    self.wait("index from the CPU")
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("boolean index")
        elif name in STORAGE or name == "_to_copy" or name.startswith("_foreach_copy_"):
            return
        elif [tensor for tensor in others if tensor.ndim > 0 or name in STRICT]:
            where = [(tuple(t.shape), "device" if isinstance(t, ClaimedTensor) else "CPU") for t in tensors]
            raise RuntimeError(f"{function}: tensors of both devices, {where}")


@contextlib.contextmanager
def claimed_device():
    """`claimed` may be named inside, and accelerate takes it; yields the [`ClaimedDevice`]. Skips where this torch has
    no place for it."""
    if not HAS_PLACE:
        pytest.skip("a device that is not there needs a torch with a place for it, as 2.11 has")
    patch = pytest.MonkeyPatch()
    patch.setenv("ACCELERATE_TORCH_DEVICE", str(DEVICE))
    patch.delenv("ACCELERATE_USE_CPU", raising=False)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with ClaimedDevice() as seen:
            ClaimedDevice.current = seen
            yield seen
    finally:
        ClaimedDevice.current = None
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        patch.undo()
