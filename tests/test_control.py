"""
control.py against the plain way to say the same: projected gradient ascent in the coordinates of x
and by autograd, KL by torch.distributions in float64. Random nets, states and logits throughout.

    python -m pytest tests/test_control.py
"""
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl

from control import Controller, Rollout, ascend, kl_ball, kl_divergence, step_for_kl
from model import InputError
from test_value import random_net

SIZES = [(4, 3), (16, 8), (8, 40)]     # n_embd, width: V may have more directions than the state


def scene(seed):
    """A random net and 20 states, some of them far from the mean state."""
    value = random_net(seed, *SIZES[seed % len(SIZES)]).requires_grad_(False)
    value.w2 /= math.sqrt(len(value.w2))
    spread = torch.logspace(-1, 0.7, 20)[:, None]
    return value, value.mean + value.std * spread * torch.randn(20, len(value.mean))


def length(value, u):
    """u in units of the radius."""
    return (u / value.std).norm(dim=-1) / math.sqrt(u.size(-1))


def plain_ascent(value, hidden, steps, step_size, radius):
    """The definition: step along dV/dx, then back onto the ball where it was left."""
    x = (hidden - value.mean) / value.std
    v = torch.zeros_like(x)
    for _ in range(steps):
        a = value.w2 * (1 - torch.tanh((x + v) @ value.w1.T + value.b1) ** 2)
        v = v + step_size * a @ value.w1
        for row in v:
            row *= min(1.0, radius * math.sqrt(len(row)) / max(row.norm().item(), 1e-30))
    return value.std * v


def autograd_ascent(value, hidden, steps, step_size, radius):
    """The same, knowing V as a black box only."""
    u = torch.zeros_like(hidden)
    for _ in range(steps):
        u.requires_grad_()
        with torch.enable_grad():
            du, = torch.autograd.grad(value(hidden + u).sum(), u)
        u = u.detach() + step_size * value.std ** 2 * du     # d/dx = std d/dh, twice
        u = u * (radius / length(value, u).clamp(min=1e-30)).clamp(max=1)[:, None]
    return u


# --------------------------------------------------------------------------------------- the ascent

@pytest.mark.parametrize("radius", [0.03, 0.3, 1e3])
@pytest.mark.parametrize("steps, step_size", [(1, 0.5), (5, 0.3), (5, -0.3), (12, 1.0)])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_plain_and_the_autograd_loop(seed, steps, step_size, radius):
    value, hidden = scene(seed)
    u = ascend(value, hidden, steps, step_size, radius)
    assert u.abs().max() > 1e-3
    assert (u - plain_ascent(value, hidden, steps, step_size, radius)).abs().max() < 1e-5
    assert (u - autograd_ascent(value, hidden, steps, step_size, radius)).abs().max() < 1e-5


@pytest.mark.parametrize("step_size", [1e-3, 1.0, -1.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", range(6))
def test_the_ball_is_never_left(seed, step_size):
    value, hidden = scene(seed)
    for radius in (1e-6, 0.1, 1.0, 10.0):
        for steps in (1, 2, 30):
            reached = length(value, ascend(value, hidden, steps, step_size, radius))
            assert reached.max() <= radius * (1 + 1e-4)
    if abs(step_size) > 100:
        tight = length(value, ascend(value, hidden, 1, step_size, 0.1))
        gradient = value.gradient(hidden).norm(dim=-1)
        assert (tight[gradient > 0.01] >= 0.1 * (1 - 1e-4)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(12))
def test_a_small_step_moves_v_as_its_sign_says(seed, sign):
    value, hidden = scene(seed)
    moved = value(hidden + ascend(value, hidden, 1, sign * 0.02, 10.0))
    promised = 0.02 * value.gradient(hidden).square().sum(-1)               # to first order
    gain = sign * (moved - value(hidden))
    assert promised.max() > 1e-3
    assert (gain >= 0.5 * promised - 1e-5).all() and (gain <= 2 * promised + 1e-5).all()


def test_no_steps_or_no_ball_or_no_slope_is_no_control():
    value, hidden = scene(1)
    for steps, step_size, radius in ((0, 1.0, 1.0), (5, 1.0, 0.0), (5, -1.0, 0.0), (5, 0.0, 1.0)):
        assert torch.equal(ascend(value, hidden, steps, step_size, radius), torch.zeros(20, 16))
    value.w2.zero_()
    assert torch.equal(ascend(value, hidden, 5, 1.0, 1.0), torch.zeros(20, 16))


@pytest.mark.parametrize("radius", [1e30, 1e300, math.inf])
def test_without_a_ball(radius):
    value, hidden = scene(2)
    free = plain_ascent(value, hidden, 4, 0.5, 1e6)
    assert (ascend(value, hidden, 4, 0.5, radius) - free).abs().max() < 1e-5


def test_rows_do_not_see_each_other():
    value, hidden = scene(3)
    u = ascend(value, hidden, 5, 0.5, 0.2)
    alone = torch.cat([ascend(value, row[None], 5, 0.5, 0.2) for row in hidden])
    assert torch.allclose(u, alone, atol=1e-5)


def test_controller_hands_on_its_settings():
    value, hidden = scene(0)
    control = Controller(value, steps=3, step_size=-0.4, radius=0.2)
    assert torch.equal(control(hidden), ascend(value, hidden, 3, -0.4, 0.2))
    assert control.max_kl == math.inf


class Head:
    """What step_for_kl needs of a model."""
    def __init__(self, n_vocab, n_embd):
        self.weight = torch.randn(n_vocab, n_embd) / 3

    def unembed(self, hidden):
        return hidden @ self.weight.T


def rolled(hidden, mask):
    """And of a rollout."""
    return Rollout(**{**dict.fromkeys(Rollout.__dataclass_fields__), "hidden": hidden, "mask": mask})


@pytest.mark.parametrize("steps, radius, texts", [(1, 1e3, 1), (3, 1e3, 1), (1, 0.5, 1), (1, 1e3, 7)])
def test_step_for_kl(steps, radius, texts):
    """On 14 states, and on 98, which it takes in parts of 64."""
    value, hidden = scene(1)
    model, mask = Head(30, 16), torch.arange(4) < torch.tensor([4, 1, 2, 3, 4] * texts)[:, None]
    hidden = torch.cat([hidden * (1 + i) for i in range(texts)])
    rollout = rolled(hidden.view(5 * texts, 4, 16), mask)
    control = Controller(value, steps, radius=radius)
    step = step_for_kl(model, control, rollout, 0.3)
    real = rollout.hidden[mask]
    moved = real + ascend(value, real, steps, step, radius)
    pair = [Categorical(logits=model.unembed(h).double()) for h in (moved, real)]
    assert reference_kl(*pair).sum().item() / (5 * texts) == pytest.approx(0.3, rel=2e-3)
    assert control.step_size == 1.0                            # not touched


def test_step_for_kl_out_of_reach():
    value, hidden = scene(1)
    rollout = rolled(hidden.view(5, 4, 16), torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="radius"):
        step_for_kl(Head(30, 16), Controller(value, radius=1e-3), rollout, 5.0)
    value.w2.zero_()
    with pytest.raises(InputError, match="choose fewer --nats"):
        step_for_kl(Head(30, 16), Controller(value), rollout, 0.1)


# ------------------------------------------------------------------------------------------- the KL

def test_kl_by_hand_and_by_torch():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2))
    assert kl_divergence(q.log(), p.log()).item() == math.inf
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 50, 30, dtype=torch.float64)
    logits[:, ::2, 20:] = -torch.inf                                         # a common support
    expected = reference_kl(Categorical(logits=logits[0]), Categorical(logits=logits[1]))
    assert torch.allclose(kl_divergence(*logits.log_softmax(-1)), expected)


def logits_and_delta(n_vocab, size, seed=0):
    """(40, n_vocab) logits, flat and peaked, a third of them -inf in every second row; delta."""
    torch.manual_seed(seed)
    logits = torch.linspace(0.1, 6, 40)[:, None] * torch.randn(40, n_vocab)
    logits[::2, :n_vocab // 3] = -torch.inf
    return logits, size * torch.randn(40, n_vocab)


def exact_kl(logits, delta, scale):
    logits = logits.double()
    moved = logits + scale[:, None].double() * delta
    return reference_kl(Categorical(logits=moved), Categorical(logits=logits))


@pytest.mark.parametrize("max_kl", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("size", [1e-2, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("n_vocab", [3, 30, 3000])
def test_kl_ball_is_kept_and_used(n_vocab, size, max_kl):
    logits, delta = logits_and_delta(n_vocab, size)
    scale = kl_ball(logits, delta, max_kl)
    kl, whole = exact_kl(logits, delta, scale), exact_kl(logits, delta, torch.ones(40))
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (kl <= max_kl * 1.001 + 2e-7).all(), kl.max()      # float32 sees no less
    within = whole <= 0.99 * max_kl - 2e-7
    assert (scale[within] == 1).all()
    cut = scale < 1
    assert (kl[cut] >= 0.97 * max_kl - 2e-7).all(), (kl[cut] / max_kl).min()
    assert (cut | (whole <= 1.001 * max_kl + 2e-7)).all()


def test_kl_ball_cuts_and_spares():
    """So that neither branch of the test above is empty."""
    scales = torch.stack([kl_ball(*logits_and_delta(30, size), 0.1) for size in (0.01, 1.0)])
    assert (scales[0] == 1).all() and (scales[1] < 1).float().mean() > 0.5


def test_kl_ball_of_a_row_is_its_own():
    """However many iterations the rows beside it take."""
    logits, delta = logits_and_delta(30, 1.0)
    delta *= torch.logspace(-2, 2, 40)[:, None]
    alone = torch.cat([kl_ball(*row, 0.1) for row in zip(logits.split(1), delta.split(1))])
    assert torch.allclose(kl_ball(logits, delta, 0.1), alone, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_no_budget(size):
    logits, delta = logits_and_delta(30, size)
    assert exact_kl(logits, delta, kl_ball(logits, delta, 0.0)).max() < 1e-6


def test_delta_that_changes_nothing():
    logits = torch.randn(4, 30)
    for delta in (torch.zeros(4, 30), torch.full((4, 30), 7.0)):
        assert (kl_ball(logits, delta, 0.01) == 1).all()
