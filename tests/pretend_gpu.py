"""
A pretended GPU: the CUDA path's logic, run on the CPU.

`Device` tensors say that they are on a GPU; a CPU tensor holds their numbers. `Pretend` is the mode
under which they compute, and it raises on what a real GPU would punish:

    tensors of two devices in one operation                                 always
    a CPU generator for numbers on the device                               always
    the host reads (item, bool, nonzero, a boolean mask, cpu, print)        within a captured step
    the host writes (torch.tensor(.., device), an index that is a list)     within a captured step
    the captured step does other operations than the step before it         at the end of a capture
    a buffer that the captured step uses has been let go since              at a replay

`Graph` stands for torch.cuda.CUDAGraph. To capture runs nothing, and results are garbage. To replay
runs the recorded operations, with the recorded numbers, on the same buffers; what Python does in a
step is not run again.
"""
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PLACE = torch.device("meta")        # the device that they name: every build of torch knows it
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.is_nonzero, aten.allclose, aten.repeat_interleave,
         aten.bincount, aten._linalg_check_errors, aten._to_cpu}
HELD = weakref.WeakValueDictionary()        # the Device tensors that the program still holds


class PunishedError(RuntimeError):
    """What a real GPU would answer with an error, or with other numbers."""


class Device(torch.Tensor):
    @staticmethod
    def __new__(cls, data):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device=PLACE, requires_grad=data.requires_grad)
        self.on_cpu = data
        HELD[id(self)] = self
        return self
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of Pretend")

    def __repr__(self):                                     # to print is to read
        return f"Device({self.cpu()})"

    def __format__(self, spec):
        return format(self.cpu(), spec)

    def tolist(self):
        return self.cpu().tolist()


def tensors_of(tree):
    """The tensors in the arguments or results of an operation"""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found = []
    for part in tree:
        found += tensors_of(part)
    return found


def replace(tree, kind, function):
    """The same with function(tensor) in the place of each tensor of that kind"""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: replace(part, kind, function) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([replace(part, kind, function) for part in tree])
    return tree


def off(tree):
    """The CPU tensors behind those of the device."""
    return replace(tree, Device, lambda tensor: tensor.on_cpu)


def garbage(tensor):
    """Memory for such a tensor, as it is before an operation fills it"""
    result = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return result.fill_(torch.nan if tensor.is_floating_point() else 1)


def described(operation):
    """What an operation is asked to do, but for the numbers in its tensors"""
    func, args, kwargs, _ = operation
    return func, str(replace((args, kwargs), torch.Tensor, lambda t: (t.dtype, t.shape, t.stride())))


def memory(tree):
    """The places in memory of CPU tensors"""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(tree)}


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
    def replay(self):
        held = memory([tensor.on_cpu for tensor in list(HELD.values())])
        if not self.uses <= held:
            raise PunishedError("a buffer that the captured step uses has been let go")
        for func, args, kwargs, results in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_of(results), tensors_of(again)):
                old.copy_(new)
        self.gpu.replays += 1


class Pretend(TorchDispatchMode):
    """`with Pretend() as gpu:`; gpu.begin() says that a step begins: one that ran comes before its capture."""
    def __init__(self):
        super().__init__()
        self.graph, self.operations, self.host, self.replays = None, [], Host(self), 0

    def begin(self):
        if self.graph is None:
            self.operations = []

    def __enter__(self):
        self.host.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.host.__exit__(*error)

    def capture(self, graph, pool=None):
        """In the place of torch.cuda.graph."""
        return Capture(self, graph)

    @classmethod
    def _should_skip_dynamo(cls):
        return False                        # torch would import its compiler, which takes seconds

    def ask(self, what):
        """The host reads or writes numbers of the device: never while a step is captured."""
        if self.graph is not None:
            raise PunishedError(f"{what}: the host is asked within a captured step")

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
            raise PunishedError(f"{func}: tensors on two devices")
        if (generator := kwargs.get("generator")) and generator.device != PLACE:
            raise PunishedError(f"{func}: a CPU generator for numbers on the device")
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index.dtype == torch.bool for index in tensors_of(args[1]))
        if packet in READS or masks or not here or len(ours) < len(tensors):
            self.ask(func)
        if place is not None:
            kwargs["device"] = torch.device("cpu")
        return self.run(func, off(args), off(kwargs), args, here)

    def run(self, func, args, kwargs, given, here):
        if func.is_view:
            return replace(func(*args, **kwargs), torch.Tensor, Device)
        results = None
        if self.graph is not None:
            results = replace(self.expected(func, args, kwargs), torch.Tensor, garbage)
        elif func._schema.is_mutable:
            func(*args, **kwargs)
        else:
            results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        if func._schema.is_mutable:
            return given[0]
        return replace(results, torch.Tensor, Device) if here else results

    def expected(self, func, args, kwargs):
        """The results of the operation of the step before that is now captured"""
        done = len(self.operations)
        if done == len(self.before) or described(self.before[done]) != described((func, args, kwargs, None)):
            raise PunishedError("the captured step is not the step that ran before it")
        return self.before[done][3]


class Capture:
    def __init__(self, gpu, graph):
        self.gpu, self.graph = gpu, graph
        graph.gpu = gpu

    def __enter__(self):
        gpu = self.gpu
        gpu.before, gpu.operations, gpu.graph = gpu.operations, [], self.graph

    def __exit__(self, kind, *_):
        gpu, operations = self.gpu, self.gpu.operations
        gpu.graph, gpu.operations = None, []
        if kind is None and len(operations) < len(gpu.before):
            raise PunishedError("the captured step is not the step that ran before it")
        uses, made = set(), set()
        for _, args, kwargs, results in operations:
            uses |= memory((args, kwargs)) - made
            made |= memory(results)
        self.graph.operations, self.graph.uses = operations, uses


class Host(TorchFunctionMode):
    """Numbers that Python sends to the device, which torch makes before a dispatch mode is asked."""
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or "cpu") == PLACE
        if func in (torch.tensor, torch.as_tensor) and there:
            self.gpu.ask(func.__name__)
            return Device(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.new_tensor and isinstance(args[0], Device):
            self.gpu.ask("new_tensor")
            return Device(args[0].on_cpu.new_tensor(*args[1:], **kwargs))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Device):
            args = (args[0], self.moved(args[1]), *args[2:])
        return func(*args, **kwargs)

    def moved(self, index):
        """An index with its lists on the device"""
        if isinstance(index, tuple):
            return tuple(self.moved(part) for part in index)
        if isinstance(index, list):
            self.gpu.ask(f"the list {index} as an index")
            return Device(torch.tensor(index))
        return index
