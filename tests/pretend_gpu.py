"""
A pretended GPU: the CUDA path's logic, run on the CPU.

`Device` tensors say that they are on a GPU; a CPU tensor holds their numbers. `Pretend` is the mode
under which they compute, and it raises on what a real GPU would punish:

    tensors of two devices in one operation                                 always
    a CPU generator for numbers on the device                               always
    the host reads (item, bool, nonzero, a boolean mask, cpu)               within a captured step
    the captured step does other operations than the step before it         at the end of a capture

`Graph` stands for torch.cuda.CUDAGraph. To capture runs nothing, and results are
garbage. To replay runs the recorded operations, with the recorded numbers, on the same buffers; what
Python does in a step is not run again.
"""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PLACE = torch.device("meta")        # the device that they name: every build of torch knows it
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2,
         aten.is_nonzero, aten.repeat_interleave, aten._to_cpu}


class Device(torch.Tensor):
    @staticmethod
    def __new__(cls, data):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device=PLACE, requires_grad=data.requires_grad)
        self.on_cpu = data
        return self
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of Pretend")

    def __repr__(self):
        return f"Device({self.on_cpu})"


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def off(tree):
    """The CPU tensors behind those of the device."""
    return tree_map_only(Device, lambda tensor: tensor.on_cpu, tree)


def on_meta(tree):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)


def garbage(tensor):
    """What memory holds that a captured operation has not filled yet."""
    result = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return result.fill_(torch.nan if tensor.is_floating_point() else 1)


def to_device(module):
    """The parameters and buffers of a module, moved."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = Device(weight.data)
        for name, buffer in part._buffers.items():
            part._buffers[name] = Device(buffer)
    return module


class Graph:
    def __init__(self):
        self.operations = []

    def replay(self):
        for func, args, kwargs, results in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(results, tensors_of(again)):
                old.copy_(new)
        self.gpu.replays += 1


class Pretend(TorchDispatchMode):
    """`with Pretend() as gpu:`; gpu.operations are those since the last `begin`."""
    def __init__(self):
        super().__init__()
        self.graph, self.operations, self.factories, self.replays = None, [], Factories(), 0

    def __enter__(self):
        self.factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.factories.__exit__(*error)

    def capture(self, graph, pool=None):
        """In the place of torch.cuda.graph."""
        return Capture(self, graph)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_of((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, Device)]
        place, packet = kwargs.get("device"), func.overloadpacket
        here = bool(ours) if place is None else torch.device(place) == PLACE
        moves = packet in (aten._to_copy, aten.copy_)
        if packet is aten._fused_sdp_choice:
            return 0                                            # plain products and a softmax
        if not here and not ours:
            return func(*args, **kwargs)
        if len(ours) < len(tensors) and not moves and any(
                t.dim() for t in tensors if not isinstance(t, Device)):
            raise RuntimeError(f"{func}: tensors on two devices")
        if (generator := kwargs.get("generator")) and generator.device != PLACE:
            raise RuntimeError(f"{func}: a CPU generator for numbers on the device")
        if self.graph is not None:
            masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
                t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None)
            if packet in READS or masks or not here or len(ours) < len(tensors):
                raise RuntimeError(f"{func}: the host is asked within a captured step")
        if place is not None:
            kwargs["device"] = torch.device("cpu")
        return self.run(func, off(args), off(kwargs), args, here)

    def run(self, func, args, kwargs, given, here):
        if func._schema.is_mutable:
            if self.graph is None:
                func(*args, **kwargs)
            self.operations.append((func, args, kwargs, []))
            return given[0]
        if func.is_view or self.graph is None:
            result = func(*args, **kwargs)
        else:
            result = tree_map_only(torch.Tensor, garbage, func(*on_meta(args), **on_meta(kwargs)))
        if not func.is_view:
            self.operations.append((func, args, kwargs, tensors_of(result)))
        return tree_map_only(torch.Tensor, Device, result) if here else result

class Capture:
    def __init__(self, gpu, graph):
        self.gpu, self.graph = gpu, graph

    def __enter__(self):
        self.before, self.gpu.operations = self.gpu.operations, []
        self.gpu.graph, self.graph.gpu = self.graph, self.gpu

    def __exit__(self, kind, *_):
        self.gpu.graph = None
        self.graph.operations, self.gpu.operations = self.gpu.operations, []
        if kind is not None:
            return
        if shapes(self.graph.operations) != shapes(self.before)[-len(self.graph.operations):]:
            raise RuntimeError("the captured step is not the step that ran before it")


def shapes(operations):
    return [(func, [(result.shape, result.dtype) for result in results])
            for func, _, _, results in operations]


class Factories(TorchFunctionMode):
    """torch.tensor(.., device) makes the numbers before a dispatch mode is asked."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == PLACE:
            return Device(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
