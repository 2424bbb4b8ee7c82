"""
The CUDA path without a GPU: that a step may be captured and replayed, on the device that
pretend_gpu.py plays. Then the sampler's source is broken on purpose, and each fault is caught.
"""
import math
import types

import pytest
import torch
from tests.conftest import ROOT
from tests.pretend_gpu import Device, Graph, Pretend, off, to_device
from tests.test_control import PROMPTS, net, random_model

import control
import model
from control import Sampler, ascend, uniform_table
from value import ValueNet

TABLE = uniform_table(20, 20, 1)            # three windows of the cache, and texts that end early
WINDOW, TRUTH = 8, []


@pytest.fixture
def gpu(monkeypatch):
    pretend = Pretend()
    monkeypatch.setattr(model.Cache, "WINDOW", WINDOW)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", pretend.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return pretend


def drawn(gpu, module=control, head=True, steps=1, **how):
    """-> the columns of 20 texts, in two batches on the pretended GPU, up to each text's end"""
    value = net() if head else ValueNet(32, 16, gradient_head=False).requires_grad_(False)
    value, gpt = to_device(value), to_device(random_model(ends=(3,)))
    with gpu:
        rollout = module.generate(gpt, PROMPTS, TABLE, lambda hidden: module.ascend(
            value, hidden, steps, 0.5 / steps), batch=10, **how)
    assert all(isinstance(column, Device) for column in vars(rollout).values())
    columns = off(list(vars(rollout).values()))
    return [column[columns[1]] for column in columns if column.size(1)] + [columns[1]]


@pytest.mark.parametrize("how", [{}, {"max_kl": 0.05}, {"record": True}, {"temperature": 0.7},
                                 {"head": False}, {"steps": 3, "max_kl": 0.3, "record": True}])
def test_replayed_steps_are_eager_steps(gpu, how, monkeypatch):
    replayed = drawn(gpu, **how)
    assert gpu.replays > 30                                     # of 40 steps
    monkeypatch.setattr(Sampler, "advance", lambda self: self.step())
    for a, b in zip(replayed, drawn(gpu, **how)):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not replayed[-1].all()


def test_the_pretended_gpu_draws_what_the_cpu_draws(gpu):
    rollout = control.generate(random_model(ends=(3,)), PROMPTS, TABLE, lambda h: ascend(net(), h, 1, 0.5))
    torch.testing.assert_close(drawn(gpu)[0], rollout.tokens[rollout.mask])


FAULTS = {  # what is wrong: the line that is right, the line in its place
    "a number is read": ("t += 1", "t += int(self.alive.any() or True)"),
    "a size to be found": ("token = draw", "probs.nonzero(); token = draw"),
    "a branch on a number": ("max_kl < math.inf:", "max_kl < math.inf or (hidden > 9).any():"),
    "a boolean mask": ("self.alive &=", "self.hidden[self.alive]; self.alive &="),
    "drawn on the host": ("draw(probs, self.", "draw(probs.cpu(), self."),
    "an index on the wrong device": ("index_select(1, t)", "index_select(1, torch.tensor([0]))"),
    "a generator of the host": ("token = draw(probs, self.uniforms.index_select(1, t))",
                                "token = probs.multinomial(1, generator=torch.Generator())[:, 0]"),
    "a Python number that changes": (
        "self.uniforms.index_select(1, t)",
        "self.uniforms[:, self.cache.used - 5:][:, :1]"),      # 5: the longest prompt
    "a buffer made once, by the first step": (
        "t += 1", "self.one = getattr(self, 'one', None) or Kept(torch.ones_like(t)); t += 1"),
    "a fresh state": ("self.hidden.copy_(self.model(token[:, None], self.cache)[:, 0])",
                      "self.hidden = self.model(token[:, None], self.cache)[:, 0]"),
    "a fresh clock": ("        t += 1", "        self.t = t + 1"),
    "a fresh mask": ("self.alive &= ", "self.alive = self.alive & "),
    "fresh uniforms": ("self.uniforms.copy_(uniforms)",
                       "self.uniforms = uniforms.to(self.hidden.device)"),
    "one graph for all windows": ("self.cache.used // Cache.WINDOW", "0"),
    "replays that do not count": ("            self.cache.used += 1\n", ""),
    "fresh lengths": ("self.lengths += T if lengths is None else lengths",
                      "self.lengths = self.lengths + (T if lengths is None else lengths)"),
}


def broken(right, wrong):
    """control.py over model.py, with one line changed in one of the two."""
    modules, found = {}, 0
    for name in ("model", "control"):
        source = (ROOT / f"{name}.py").read_text()
        found += source.count(right)
        module = modules[name] = types.ModuleType(name)
        exec(source.replace(right, wrong), vars(module))
    modules["model"].Cache.WINDOW = WINDOW
    vars(modules["control"]).update(Cache=modules["model"].Cache, Kept=lambda tensor: [tensor])
    assert found == 1
    return modules["control"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(gpu, fault, monkeypatch):
    module, truth = broken(*FAULTS[fault]), TRUTH or drawn(gpu)
    TRUTH[:] = truth
    try:
        replayed = drawn(gpu, module)
    except RuntimeError as error:
        assert "captured step" in str(error) or "devices" in str(error) or "CPU gen" in str(error)
        return
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(truth, replayed))
    monkeypatch.setattr(module.Sampler, "advance", lambda self: self.step())
    for a, b in zip(truth, drawn(gpu, module)):                 # seen by nothing but the replay
        torch.testing.assert_close(a, b, atol=0, rtol=0)
