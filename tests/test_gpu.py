"""
The CUDA path without a GPU: that a step may be captured and replayed, on the device that
pretend_gpu.py plays. Then the source is broken on purpose, in ways that no CPU notices, and each
fault is caught.
"""
import functools
import sys
import types
from unittest import mock

import pytest
import torch

from model import Config
from tests.conftest import ROOT
from tests.pretend_gpu import Device, Graph, Pretend, off, to_device
from value import ValueNet

WINDOW = 4
PROMPTS = [[0], [0, 5, 6], [0, 7, 8]]   # the longest leaves one step in its window of the cache
N_TOKENS = 7                            # three windows
SEED = 1                                # of uniforms under which some texts end early
FILES = {"model": "model.py", "control": "control.py", "baselines": "tests/evidence/baselines.py"}


@pytest.fixture
def gpu(monkeypatch):
    pretend = Pretend()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", pretend.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return pretend


@functools.cache
def compiled(source, path):
    return compile(source, path, "exec")


def read_modules(broken=None, right=None, wrong=None):
    """-> the modules of FILES, made anew; with `wrong` in the place of `right` in one of them"""
    modules = types.SimpleNamespace()
    for name, path in FILES.items():
        source = (ROOT / path).read_text()
        if name == broken:
            assert source.count(right) == 1, f"{right!r} is no longer one place in {path}"
            source = source.replace(right, wrong)
        module = types.ModuleType(name)
        with mock.patch.dict(sys.modules, vars(modules)):           # they import each other
            exec(compiled(source, path), vars(module))
        setattr(modules, name, module)
    modules.model.Cache.WINDOW = WINDOW
    return modules


def random_model(modules, dtype):
    torch.manual_seed(0)
    model = modules.model.GPT(Config(20, 60, 8, 1, 2, 16, bos_id=0, eos_ids=[3, 9]))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.7)
    return model.to(dtype).eval().requires_grad_(False)


def random_net(gradient_head=True):
    torch.manual_seed(1)
    value = ValueNet(8, 4, gradient_head, reads_so_far=False)
    value.std.uniform_(0.5, 2)
    for weight in value.parameters():
        torch.nn.init.normal_(weight)
    return value.requires_grad_(False)


def uniforms(control):
    table = control.uniform_table(len(PROMPTS), N_TOKENS, SEED)
    table[0, 0] = 1 - 2.0 ** -24                                    # bfloat16 would round it to 1
    return table


def controllers(control, value, kind):
    """-> the controllers with which texts are drawn, one after the other"""
    def push(hidden):
        return control.ascend(value, hidden, 1, 0.5)

    def pull(hidden):
        return control.ascend(value, hidden, 1, -0.5)

    def climb(hidden):
        return control.ascend(value, hidden, 3, 0.2, radius=0.3)
    kinds = {"none": [None], "two": [push, pull], "three steps": [climb], "look-ahead": [None]}
    return kinds.get(kind, [push])


# What is drawn: {name: the kind of control, and settings of generate}
CASES = {
    "g": {},
    "V differentiated": {"kind": "V"},
    "no control": {"kind": "none"},
    "two controllers": {"kind": "two", "record": False},
    "three steps": {"kind": "three steps", "record": False},
    "look-ahead": {"kind": "look-ahead", "record": False},
    "a budget": {"max_kl": 0.05, "record": False},
    "temperature": {"temperature": 0.7, "top_p": 0.8},
    "bfloat16": {"dtype": torch.bfloat16},
}


def draw(modules, move=lambda module: module, kind="g", dtype=torch.float32, record=True, **how):
    """-> a Rollout a controller, of three texts in batches of two; `move` puts modules on a device"""
    control = modules.control
    model = move(random_model(modules, dtype))
    value = move(random_net(kind not in ("V", "look-ahead")))
    model(torch.ones(1, 3, dtype=torch.long, device=model.wte.weight.device))       # without a cache
    if kind == "look-ahead":
        how["make_sampler"] = functools.partial(modules.baselines.LookAhead, value=value, size=2.0,
                                                candidates=3)
    table = uniforms(control)
    return [control.generate(model, PROMPTS, table, controller, record=record, batch=2, **how)
            for controller in controllers(control, value, kind)]


def texts(rollouts):
    """Masks, and tokens up to each text's end, on the CPU"""
    masks = [off(rollout.mask) for rollout in rollouts]
    return masks + [off(rollout.tokens)[mask] for rollout, mask in zip(rollouts, masks)]


def columns(rollouts):
    """All that means something, on the CPU"""
    return [off(column)[off(rollout.mask)] for rollout in rollouts
            for column in vars(rollout).values() if column.size(1)]


RIGHT = read_modules()


@functools.cache
def texts_on_a_cpu(case):
    return texts(draw(RIGHT, **CASES[case]))


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


def check_draws(rollout, kind="g", dtype=torch.float32, record=True, **how):
    """What was drawn is what the recorded states say: for types in which devices round differently"""
    if not record:
        return
    mask = off(rollout.mask)
    hidden = off(rollout.hidden)[mask]
    controller = controllers(RIGHT.control, random_net(kind != "V"), kind)[0]
    model = random_model(RIGHT, dtype)
    log_p, log_q = RIGHT.control.controlled_log_probs(model, hidden, controller, **how)
    uniform = uniforms(RIGHT.control)[mask][:, None]
    token = (log_q.exp().double().cumsum(-1) <= uniform).sum(-1)
    assert torch.equal(off(rollout.tokens)[mask], token)
    kl = RIGHT.control.kl_divergence(log_q, log_p)
    assert (off(rollout.kl)[mask] - kl).abs().max() < 1e-5
    W = model.wte.weight.float()
    grad_log_p = off(rollout.grad_log_p)[mask] - (W[token] - log_q.exp() @ W)
    assert grad_log_p.abs().max() < 20 * torch.finfo(dtype).eps


def check(gpu, modules, case):
    """An error where a GPU would fail, or draw other texts; -> the number of replays"""
    Sampler, how = modules.control.Sampler, CASES[case]
    step = Sampler.step

    def marked(sampler):
        gpu.begin()
        step(sampler)
    Sampler.step = marked
    with gpu:
        replayed = draw(modules, to_device, **how)
        replays = gpu.replays
    for rollout in replayed:
        assert all(isinstance(column, Device) for column in vars(rollout).values())
        check_draws(rollout, **how)
    if case != "bfloat16":
        assert same(texts_on_a_cpu(case), texts(replayed)), "not what a CPU draws"
    with gpu:
        Sampler.step_or_replay = marked
        eager = draw(modules, to_device, **how)
    assert same(columns(replayed), columns(eager)), "a replayed step is not an eager one"
    return replays


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_eager_steps(gpu, case):
    assert check(gpu, read_modules(), case) >= 6                            # of 14 steps
    mask = texts_on_a_cpu(case)[0]
    assert not mask.all() and mask[:, -1].any()                             # some end, not all


# What breaks only a GPU: (name, file, the place that is right, what stands there instead, case)
STEP = "probs = log_q.exp()"
UNIFORM = "self.uniforms.index_select(1, t)"
CALLED = "controller(hidden)]))"
FREE = "logits, delta = model.unembed(hidden)"
ENDS = "torch.tensor(model.config.eos_ids, dtype=torch.long, device=weight.device)"
START = "        self.uniforms.copy_(uniforms)"
FAULTS = [
    # the host reads
    ("a number", "control", "self.t += 1", "self.t += int(self.alive.any() or True)", "g"),
    ("a condition", "control", "max_kl < math.inf:", "max_kl < math.inf or (hidden > 99).any():", "g"),
    ("a size to be found", "control", STEP, STEP + "; probs.nonzero()", "g"),
    ("a boolean mask", "control", "self.alive &=", "self.hidden[self.alive]; self.alive &=", "g"),
    ("a draw on the host", "control", "draw(probs, self", "draw(probs.cpu(), self", "g"),
    ("print", "control", STEP, STEP + "; print(probs, file=open('/dev/null', 'w'))", "g"),
    ("repr", "control", STEP, STEP + "; repr(self.hidden)", "g"),
    ("a format", "control", STEP, STEP + "; f'{probs.sum():.2f}'", "g"),
    ("a list", "control", STEP, STEP + "; self.alive.tolist()", "g"),
    ("max of a row", "control", STEP, STEP + "; max(self.alive)", "g"),
    ("allclose", "control", STEP, STEP + "; torch.allclose(probs, probs)", "g"),
    ("an assertion", "control", STEP, STEP + "; assert (probs >= 0).all()", "g"),
    ("a slice to a tensor", "control", STEP, STEP + "; probs[:, :t]", "g"),
    ("a read without control", "control", FREE, FREE + " + 0 * hidden.sum().item()", "no control"),
    ("a read in the budget", "control", "inside = root", "root.max().item(); inside = root", "a budget"),
    ("a read in the nucleus", "control", "p, order =", "logits.max().item(); p, order =", "temperature"),
    ("a read in ascend", "control", "length = (u", "u.max().item(); length = (u", "three steps"),
    ("a read in the cache", "model", "self.used += T", "self.lengths.max().item(); self.used += T", "g"),
    ("a read in look-ahead", "baselines", "change = torch", "here.max().item(); change = torch",
     "look-ahead"),
    # the host writes
    ("torch.tensor in a step", "control", STEP, STEP + " * torch.tensor(1.0, device=t.device)", "g"),
    ("torch.as_tensor", "control", STEP, STEP + " * torch.as_tensor([1.0], device=t.device)", "g"),
    ("new_tensor", "control", STEP, STEP + " * log_q.new_tensor([1.0])", "g"),
    ("torch.tensor in ascend", "control", "longest = radius",
     "longest = torch.tensor(1.0, device=u.device) * radius", "three steps"),
    ("a list as an index", "control", "self.eos_ids).all(-1)",
     "self.eos_ids)[:, list(range(len(self.eos_ids)))].all(-1)", "g"),
    ("a list as an index in a store", "baselines", "change[:, self.eos_ids]",
     "change[:, self.eos_ids.numel() * [3] and self.model.config.eos_ids]", "look-ahead"),
    ("numbers of the host", "control", STEP, STEP + " * torch.ones(1).to(t.device)", "g"),
    # two devices
    ("an index on the host", "control", UNIFORM,
     "self.uniforms.index_select(1, torch.tensor([self.cache.used - 3]))", "g"),
    ("a generator of the host", "control", "token = draw(probs, " + UNIFORM + ")",
     "torch.bernoulli(probs, generator=torch.Generator()); token = draw(probs, " + UNIFORM + ")", "g"),
    ("u on the host", "control", FREE,
     FREE + " + model.unembed(torch.zeros(hidden.shape))", "no control"),
    ("positions on the host", "model", "positions = torch.arange(T, device=tokens.device)",
     "positions = torch.arange(T)", "g"),
    ("slots on the host", "model", "torch.arange(self.window, device=self.rows.device)",
     "torch.arange(self.window)", "g"),
    ("the cache's rows on the host", "model", "torch.arange(batch, device=W.device)",
     "torch.arange(batch)", "g"),
    ("ends on the host", "control", ENDS, ENDS.replace(", device=weight.device", ""), "g"),
    # what Python does in a step is not done again
    ("a Python number that changes", "control", UNIFORM, "self.uniforms[:, self.cache.used - 3:][:, :1]",
     "g"),
    ("a count in Python", "control", "u = torch.zeros_like(hidden, dtype=torch.float32)",
     "calls = vars(value).setdefault('calls', []); calls.append(0); u = 0 * (hidden + len(calls))", "g"),
    ("a buffer made by the first step", "control", "self.t += 1",
     "self.one = getattr(self, 'one', None) or [torch.ones_like(t)]; self.t += 1", "g"),
    ("a branch on the first step", "control", "self.t += 1",
     "self.seen = hasattr(self, 'seen') or probs.sum(); self.t += 1", "g"),
    ("a fresh state", "control", "self.hidden.copy_(self.model(token[:, None], self.cache)[:, 0])",
     "self.hidden = self.model(token[:, None], self.cache)[:, 0]", "g"),
    ("a fresh clock", "control", "        self.t += 1", "        self.t = t + 1", "g"),
    ("a fresh mask", "control", "self.alive &= ", "self.alive = self.alive & ", "g"),
    ("fresh lengths", "model", "self.lengths += (T if lengths is None else lengths)",
     "self.lengths = self.lengths + (T if lengths is None else lengths)", "g"),
    ("one graph for all windows", "control", "self.cache.used // Cache.WINDOW", "0", "g"),
    ("a graph under the next window", "control", "self.graphs[window] = graph",
     "self.graphs[self.cache.used // Cache.WINDOW] = graph", "g"),
    ("replays that do not count", "control", "            self.cache.used += 1\n", "", "g"),
    ("a capture that counts", "control", "            self.cache.used -= 1 ", "            pass ", "g"),
    ("a captured step that is thrown away", "control", "self.step()\n            self.graphs",
     "self.step()\n            graph.replay()\n            self.graphs", "g"),
    # a buffer that a graph uses is let go
    ("fresh uniforms", "control", START, "        self.uniforms = uniforms.to(device)", "g"),
    ("fresh ends", "control", START,
     START + "\n        self.eos_ids = torch.tensor(self.model.config.eos_ids, device=device)", "g"),
    ("fresh rows", "control", START, START + "\n        self.cache.rows = self.cache.rows + 0", "g"),
    ("a fresh cache", "control", START, START + "\n        self.cache.keys = self.cache.keys + 0", "g"),
    ("a fresh record", "control", START, START + "\n        self.out.kl = self.out.kl + 0", "g"),
    ("a sampler kept for another controller", "control", "    whole = Rollout",
     "    sampler = model.__dict__.setdefault('kept', sampler)\n"
     "    sampler.settings = controller, temperature, top_p, max_kl\n    whole = Rollout",
     "two controllers"),
    # types that differ where the model is not float32
    ("uniforms in the model's type", "control", "weight.new_zeros(batch, n_tokens, dtype=torch.float32)",
     "weight.new_zeros(batch, n_tokens)", "bfloat16"),
    ("probabilities in W's type", "control", STEP, STEP + ".to(W.dtype).float()", "bfloat16"),
    ("logits in the model's type", "model", "W.dtype), W).float()", "W.dtype), W)", "bfloat16"),
    ("a float product with W", "control", "probs.to(W.dtype) @ W", "probs @ W", "bfloat16"),
    ("KL in the model's type", "control", "kl=weight.new_zeros(N, T, dtype=torch.float32)",
     "kl=weight.new_zeros(N, T)", "bfloat16"),
    ("a cache of floats", "model", "self.keys = W.new_zeros", "self.keys = W.float().new_zeros", "bfloat16"),
    ("h + u rounded", "control", "torch.stack([hidden, " + CALLED,
     "torch.stack([hidden, (hidden + controller(hidden)).to(hidden.dtype) - hidden]))",
     "bfloat16"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_that_breaks_only_a_gpu_is_caught(gpu, fault):
    name, file, right, wrong, case = fault
    modules = read_modules(file, right, wrong)
    if case != "bfloat16":
        assert same(texts_on_a_cpu(case), texts(draw(modules, **CASES[case])))
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check(gpu, modules, case)
