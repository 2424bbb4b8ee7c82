"""
The whole method on the tiny language, whose exact optimum is known (tests/toy/grammar.py): share of the
largest gain that any controller has at the same KL. Also what a student may change.
"""
import functools
import math

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from exact import Exact

import train_value
import value as value_module
from control import ascend, generate, read_prompts, step_for_kl, uniform_table
from model import load
from value import ValueNet, load_reward

TOY, T, TEXTS = ROOT / "tests" / "toy", 32, 3000
MODEL, TOKENIZER = load(TOY)
PROMPTS = read_prompts(MODEL, TOKENIZER, TOY)
REWARD = load_reward("sentiment")


def roll_out(samples, seed, controller=None, record=False):
    rows = [PROMPTS[i % len(PROMPTS)] for i in range(samples)]
    return rows, generate(MODEL, rows, uniform_table(samples, T, seed), controller, record=record)


def rewards_of(rows, rollout, step_rewards=False, reward=REWARD):
    return train_value.partial_rewards(reward, TOKENIZER, rows, rollout, step_rewards)


@functools.lru_cache(None)
def learned_from():
    """Rollouts to learn from with step rewards, uncontrolled rewards, and the exact frontier."""
    rows, rollout = roll_out(3000, seed=1, record=True)
    test_rows, free = roll_out(TEXTS, seed=1000)
    return (rows, rollout, rewards_of(rows, rollout, True), rewards_of(test_rows, free)[:, -1],
            Exact(MODEL, TOKENIZER, PROMPTS, rollout, T))


def fit(method="q", scale=1.0, offset=0.0):
    rows, rollout, partial, *_ = learned_from()
    settings = dict(train_value.METHODS[method])
    if not settings.pop("step_rewards"):
        partial = rewards_of(rows, rollout, False, lambda texts: REWARD(texts) * scale + offset)
    else:
        partial = partial * scale + offset
    return train_value.train(MODEL, rollout, partial.diff(dim=1).float(), **settings, seed=1)


def gain_of(value, nats=0.3, radius=10.0, steps=1):
    """-> gain in reward, and its share of the largest gain at the same KL"""
    _, rollout, _, free, exact = learned_from()
    step = step_for_kl(MODEL, lambda h, size: ascend(value, h, steps, size, radius), rollout, nats)
    rows, steered = roll_out(TEXTS, 1000, lambda h: ascend(value, h, steps, step, radius))
    gain = (rewards_of(rows, steered)[:, -1] - free).mean().item()
    return gain, gain / exact.best((steered.kl * steered.mask).sum(1).mean().item())


def test_the_default_is_near_the_exact_optimum():
    value = fit()
    for nats, share in ((0.1, .93), (0.3, .93), (0.8, .9)):
        assert gain_of(value, nats)[1] > share, nats


@pytest.mark.parametrize("body", [
    lambda n, w: nn.Sequential(nn.Linear(n, w), nn.SiLU()),
    lambda n, w: nn.Sequential(nn.Linear(n, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh())],
    ids=["SiLU", "two layers"])
def test_a_student_may_change_the_net(monkeypatch, body):
    original = ValueNet.__init__

    def changed(self, n_embd, width=64, gradient_head=True):
        original(self, n_embd, width, gradient_head)
        self.body = body(n_embd, width)
    monkeypatch.setattr(value_module.ValueNet, "__init__", changed)
    assert gain_of(fit())[1] > .85
    assert gain_of(fit("plain"))[0] > .1                        # V differentiated: any net, by autograd


@pytest.mark.parametrize("method", ["plain", "paper"])
def test_values_alone_steer_uphill(method):
    radius = math.inf if method == "paper" else 10.0
    gain, share = gain_of(fit(method), radius=radius)
    assert gain > .15 and share < .9                            # and why there is a gradient head


@pytest.mark.parametrize("scale, offset", [(1, 100), (1000, 0), (0.001, -20)])
def test_offset_and_scale_of_the_reward_change_nothing(scale, offset):
    h = learned_from()[1].hidden[:20, 0]
    one, other = fit(), fit(scale=scale, offset=offset)
    torch.testing.assert_close(other.gradient(h), scale * one.gradient(h), rtol=0.05,
                               atol=0.05 * scale * one.gradient(h).abs().max().item())
    plain, moved = fit("plain"), fit("plain", scale, offset)
    torch.testing.assert_close(moved(h), scale * plain(h) + offset, rtol=0.05, atol=0.05 * scale)


def test_step_rewards_add_up_to_the_reward_of_the_text():
    rows, rollout, partial, *_ = learned_from()
    whole = REWARD([TOKENIZER.decode(row + tokens[mask].tolist())
                    for row, tokens, mask in zip(rows, rollout.tokens, rollout.mask)])
    start = REWARD([TOKENIZER.decode(row) for row in rows])
    torch.testing.assert_close(partial.diff(dim=1).sum(1), whole - start)
    lengths = rollout.mask.sum(1, keepdim=True)
    torch.testing.assert_close(partial.gather(1, lengths)[:, 0], whole)


def test_the_exact_values_are_what_uncontrolled_texts_earn():
    free, exact = learned_from()[3:]
    assert exact.grammatical > .99
    assert abs(free.mean() - exact.value) < 4 * free.std() / math.sqrt(TEXTS)
