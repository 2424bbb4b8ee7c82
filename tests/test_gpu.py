"""
The CUDA path without a GPU: that a step may be captured and replayed, on the device that
pretend_gpu.py plays. Then the source is broken on purpose, in ways that no CPU notices, and each
fault is caught.
"""
import math
import types

import pytest
import torch

from model import GPT, Config
from tests.conftest import ROOT
from tests.pretend_gpu import Device, Graph, Pretend, off, to_device
from value import ValueNet

WINDOW = 4
LENGTHS = [1, 2, 3, 1, 2]           # of the prompts: the longest leaves one step in its window
N_TOKENS = 10                       # four windows of the cache, and texts that end early


@pytest.fixture
def gpu(monkeypatch):
    pretend = Pretend()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", pretend.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return pretend


def read_modules(file=None, right=None, wrong=None):
    """-> control.py over model.py, made anew; with one place changed in `file`, if one is named"""
    modules = {}
    for name in ("model", "control"):
        source = (ROOT / f"{name}.py").read_text()
        if name == file:
            assert source.count(right) == 1, f"{right!r} is no longer one place in {file}.py"
            source = source.replace(right, wrong)
        modules[name] = types.ModuleType(name)
        exec(compile(source, f"{name}.py", "exec"), vars(modules[name]))
    modules["model"].Cache.WINDOW = WINDOW
    modules["control"].Cache = modules["model"].Cache
    modules["control"].GPT = modules["model"].GPT
    return modules["control"]


RIGHT = read_modules()


def random_net(gradient_head):
    torch.manual_seed(1)
    value = ValueNet(8, 4, gradient_head, reads_so_far=False)
    value.std.uniform_(0.5, 2)
    for weight in value.parameters():
        torch.nn.init.normal_(weight)
    return value.requires_grad_(False)


def random_model(control, dtype):
    torch.manual_seed(0)
    model = control.GPT(Config(20, 60, 8, 1, 2, 16, bos_id=0, eos_ids=[3]))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.7)
    return model.to(dtype).eval().requires_grad_(False)


def controllers(control, place, kind="g"):
    """-> the controllers with which texts are drawn, one after the other"""
    value = place(random_net(gradient_head=kind != "V"))
    steps = 3 if kind == "steps" else 1
    push = lambda hidden: control.ascend(value, hidden, steps, 0.5 / steps)             # noqa: E731
    pull = lambda hidden: control.ascend(value, hidden, steps, -0.5 / steps)            # noqa: E731
    return {"none": [None], "two": [push, pull]}.get(kind, [push])


def draw(control, place, kind="g", dtype=torch.float32, **how):
    """-> a Rollout a controller, each of 5 texts in batches of 2; and the model"""
    model = place(random_model(control, dtype))
    prompts = [list(range(length)) for length in LENGTHS]
    table = control.uniform_table(len(prompts), N_TOKENS, 2)
    how = {"record": True, **how}
    rollouts = [control.generate(model, prompts, table, controller, batch=2, **how)
                for controller in controllers(control, place, kind)]
    hidden = model(table.new_ones(1, 3).long() if place is on_cpu else Device(torch.ones(1, 3).long()))
    return rollouts, hidden                                                 # a pass without a cache


def on_cpu(module):
    return module


def columns(rollout):
    """What means something, on the CPU: entries up to each text's end"""
    mask = off(rollout.mask)
    return [mask] + [off(column)[mask] for column in vars(rollout).values() if column.size(1)]


def check_draws(control, rollout, kind="g", dtype=torch.float32, record=True, **how):
    """Each token is the one that its uniform chooses in the CDF of the state that was recorded."""
    if not record:
        return
    model = random_model(RIGHT, dtype)
    controller = controllers(RIGHT, on_cpu, kind)[0]
    mask = off(rollout.mask)
    log_p, log_q = RIGHT.controlled_log_probs(model, off(rollout.hidden)[mask], controller, **how)
    probs = log_q.exp()
    uniform = RIGHT.uniform_table(len(LENGTHS), N_TOKENS, 2)[mask][:, None]
    truth = (probs.double().cumsum(-1) <= uniform.double()).sum(-1)
    assert torch.equal(off(rollout.tokens)[mask], truth)
    kl = (probs * (log_q - log_p)).sum(-1)
    assert (off(rollout.kl)[mask] - kl).abs().max() < 1e-3


def check(gpu, control, **how):
    """An error where a GPU would fail, or draw what it should not."""
    step = control.Sampler.step

    def marked(sampler):
        gpu.begin()
        step(sampler)
    control.Sampler.step = marked
    with gpu:
        replayed, _ = draw(control, to_device, **how)
        replays = gpu.replays
        control.Sampler.step_or_replay = marked
        eager, _ = draw(control, to_device, **how)
    for one, other in zip(replayed, eager):
        assert all(isinstance(column, Device) for column in vars(one).values())
        assert all(map(torch.equal, columns(one), columns(other))), "replayed and eager differ"
    check_draws(control, replayed[0], **how)
    return replays


CASES = {
    "g": {},
    "without control": {"kind": "none"},
    "V differentiated": {"kind": "V"},
    "steps": {"kind": "steps", "record": False},
    "two controllers": {"kind": "two"},
    "a budget": {"max_kl": 0.05},
    "temperature": {"temperature": 0.7, "top_p": 0.8},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_eager_steps(gpu, case):
    assert check(gpu, read_modules(), **CASES[case]) > 10


def test_the_pretended_gpu_draws_what_the_cpu_draws(gpu):
    with gpu:
        there, _ = draw(read_modules(), to_device, record=False)
    here, _ = draw(RIGHT, on_cpu)
    assert all(map(torch.equal, columns(there[0])[:2], columns(here[0])[:2]))       # mask and tokens
    assert not here[0].mask.all() and here[0].mask.any(0).all()         # some end, not all
