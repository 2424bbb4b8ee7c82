"""
The tests of the exercises (tests/handout.py has the table). A failure begins with the equation and
the two numbers. None needs more than the file it tests and those that come before it.

    python -m pytest tests/test_exercises.py -k targets
"""
import math

import pytest
import torch

import control
import model
import train_value
import value


def same(equation, got, expected, tolerance=1e-4):
    """Fail, in one line, unless got is expected: a relative tolerance, absolute below 1."""
    expected = torch.as_tensor(expected)
    shape = tuple(getattr(got, "shape", ())) if got is not None else "None"
    if shape != tuple(expected.shape):
        pytest.fail(f"{equation}: expected shape {tuple(expected.shape)}, got {shape}",
                    pytrace=False)
    error = (torch.as_tensor(got).double() - expected.double()).abs()
    wrong = ~(error <= tolerance * expected.double().abs().clamp(min=1))        # nan is wrong
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(f"{equation}: expected {expected[place].item():.4g}, got "
                    f"{torch.as_tensor(got)[place].item():.4g}" + f" at {place}" * bool(place),
                    pytrace=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------- 1, model.py: Cache.store

def tiny():
    torch.manual_seed(0)
    config = model.Config(n_vocab=40, n_positions=160, n_embd=16, n_layer=2, n_head=2, n_inner=32)
    return model.GPT(config).eval().requires_grad_(False)


def test_store_returns_what_it_was_given():
    cache = model.Cache(tiny(), batch=2, size=100)
    k, v = random(2, 2, 3, 8), random(2, 2, 3, 8, seed=1)
    cache.open(3)
    keys, values = cache.store(1, k, v)
    for name, got, given in (("keys", keys, k), ("values", values, v)):
        whole = torch.zeros(2, 2, 64, 8)                        # one window: 64 slots
        whole[:, :, :3] = given
        same(f"store returns {name}[layer, b, head, slot], slots below window", got, whole)
    same("store: other layers stay as they are", cache.keys[0], torch.zeros(2, 2, 100, 8))


def test_store_continues_each_row_where_it_ended():
    cache = model.Cache(tiny(), batch=2, size=100)
    k, new = random(2, 2, 3, 8), random(2, 2, 1, 8, seed=1)
    cache.open(3, torch.tensor([3, 1]))                         # row 1 holds one token
    cache.store(0, k, k)
    cache.open(1)
    keys, values = cache.store(0, new, -new)
    same("store: keys of row 0 at position 3 = k", keys[0, :, 3], new[0, :, 0])
    same("store: keys of row 1 at position 1 = k", keys[1, :, 1], new[1, :, 0])
    same("store: values of row 1 at position 1 = v", values[1, :, 1], -new[1, :, 0])
    same("store: keys of row 1 before it stay", keys[1, :, 0], k[1, :, 0])


def test_store_token_by_token_is_the_whole_text():
    gpt, tokens = tiny(), torch.arange(70)[None] * 7 % 40       # 70: beyond the first window of 64
    cache, whole = model.Cache(gpt, 1, 80), gpt(tokens)
    parts = [gpt(tokens[:, t:t + 1], cache) for t in range(70)]
    same("h_t with the cache = h_t without", torch.cat(parts, 1), whole)


# --------------------------------------------------------------------- 2, value.py: bellman_targets

VALUES, REWARDS = torch.tensor([[.1, .2, .4]]), torch.tensor([[0., 0., 1.]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_targets_one_step():
    same("lam 0: target_t = r_t + V(h_{t+1})", value.bellman_targets(VALUES, REWARDS, ALL, 0.0),
         [[.2, .4, 1.]])


def test_targets_monte_carlo():
    rewards = random(4, 7)
    same("lam 1: target_t = r_t + r_{t+1} + ..", value.bellman_targets(
        random(4, 7, seed=1), rewards, torch.ones(4, 7, dtype=torch.bool), 1.0),
         rewards.flip(1).cumsum(1).flip(1))


def test_targets_between():
    same("target_t = r_t + (1 - lam) V(h_{t+1}) + lam target_{t+1}, lam 0.25",
         value.bellman_targets(VALUES, REWARDS, ALL, 0.25), [[.2875, .55, 1.]])


def test_targets_end_with_the_text():
    values, rewards = random(3, 6), random(3, 6, seed=1)
    mask = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    got = value.bellman_targets(values, rewards, mask, 0.7)
    for row, length in enumerate([6, 3, 1]):
        one = slice(row, row + 1), slice(0, length)
        alone = value.bellman_targets(values[one], rewards[one], mask[one], 0.7)
        last = rewards[row, length - 1]
        same("target_t = r_t at the last token", alone[0, -1], last)
        same("nothing beyond the last token counts", got[one], alone)


# ---------------------------------------------------------------------------- 3, control.py: ascend

class Bowl:
    """V(h) = -|h - top|^2 / 2 in the coordinates of h, so g(h) = std^2 (top - h)."""
    def __init__(self, std, top):
        self.std, self.top = torch.tensor(std), torch.tensor(top)

    def gradient(self, hidden):
        return self.std ** 2 * (self.top - hidden)


def test_ascend_one_step():
    hidden = torch.tensor([[1., 2.]])
    same("u = step_size g(h)", control.ascend(
        Bowl([1., 1.], [3., 3.]), hidden, 1, 0.5, 10.0), [[1., .5]])


def test_ascend_climbs_from_where_it_is():
    hidden = torch.tensor([[1., 2.]])
    same("u <- u + step_size g(h + u), twice", control.ascend(
        Bowl([1., 1.], [3., 3.]), hidden, 2, 0.5, 10.0), [[1.5, .75]])
    same("u = 0 without a step", control.ascend(Bowl([1., 1.], [3., 3.]), hidden, 0, 0.5, 10.0),
         [[0., 0.]])


def test_ascend_descends():
    hidden = torch.tensor([[1., 2.]])
    same("u = step_size g(h), step_size -1", control.ascend(
        Bowl([1., 1.], [3., 3.]), hidden, 1, -1.0, 10.0), [[-2., -1.]])


def test_ascend_stays_in_the_ball():
    std = torch.tensor([1., 4.])
    u = control.ascend(Bowl([1., 4.], [30., 30.]), torch.zeros(1, 2), 1, 1.0, 2.0)
    same("||u / std|| = radius sqrt(n_embd)", (u / std).norm(), 2 * math.sqrt(2))
    same("P(u) keeps the direction of u = (30, 480)", u[0, 1] / u[0, 0], 16.0)
    hidden = torch.tensor([[0., 0.], [29.9, 30.]])              # far outside, inside
    u = control.ascend(Bowl([1., 4.], [30., 30.]), hidden, 1, 1.0, 2.0)
    same("P(u) = u inside the ball", u[1], [.1, 0.])
    many = control.ascend(Bowl([1., 4.], [30., 30.]), torch.zeros(1, 2), 5, 0.1, 2.0)
    same("P after each of 5 steps, too", (many / std).norm(), 2 * math.sqrt(2))


# --------------------------------------------------------------------------- 4, control.py: kl_ball

def kl(logits, delta, scale):
    """KL(softmax(logits + scale delta) || softmax(logits)), by the definition, in float64"""
    q = (logits.double() + scale[:, None] * delta.double()).log_softmax(-1)
    return (q.exp() * (q - logits.double().log_softmax(-1))).sum(-1)


@torch.no_grad()
def test_kl_ball_spends_the_budget():
    logits, delta = random(32, 50), 4 * random(32, 50, seed=1)
    for max_kl in (0.02, 0.3):
        spent = kl(logits, delta, control.kl_ball(logits, delta, max_kl))
        same("KL(softmax(logits + s delta) || softmax(logits)) = max_kl, within 2%", spent,
             torch.full((32,), max_kl * 0.99, dtype=torch.float64), 0.011 * max_kl)
        same("KL never above max_kl", spent.clamp(min=max_kl) - max_kl, torch.zeros(32), 1e-6)


def test_kl_ball_leaves_what_is_inside():
    logits, delta = random(4, 50), 0.01 * random(4, 50, seed=1)
    scale = control.kl_ball(logits, delta, 5.0)
    same("s <= 1, and s = 1 where KL(1) <= max_kl", scale, torch.ones(4), 0.01)
    same("s = 1 for delta = 0", control.kl_ball(logits, 0 * delta, 0.1), torch.ones(4), 0.01)


# ------------------------------------------------------------------------------ 5, control.py: draw

def test_draw_is_the_inverse_cdf():
    probs = torch.tensor([[.1, .2, .3, .4]]).repeat(5, 1)
    got = control.draw(probs, torch.tensor([[.05], [.15], [.35], [.65], [.999]]))
    same("y = the first token with CDF(y) > uniform", got, [0, 1, 2, 3, 3])


def test_draw_over_many_blocks():
    probs, uniforms = random(64, 1000).softmax(-1).double(), torch.rand(
        64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slow = (probs.cumsum(-1) <= uniforms * probs.sum(-1, keepdim=True)).sum(-1)
    same("y = the first token with CDF(y) > uniform, 1000 tokens",
         control.draw(probs, uniforms), slow)
    same("blocks of 100 draw the same", control.draw(probs, uniforms, block=100), slow)


def test_draw_never_takes_what_has_no_probability():
    probs = torch.zeros(3, 700)
    probs[:, [5, 300, 301]] = torch.tensor([.5, .25, .25])
    edge = torch.tensor([[0.], [.5], [1 - 2 ** -24]])
    same("p(y) > 0 of each y, uniforms 0, 0.5, nearly 1", control.draw(probs, edge), [5, 300, 301])


# --------------------------------------------------------------------- 6, train_value.py: whitening

def test_whitening_whitens():
    scores, W = random(500, 6) * torch.arange(1., 7.), random(40, 6, seed=1) + 3.0
    T = train_value.whitening(scores, W)
    centred = W - W.mean(0)
    M = scores.T @ scores / 500 + centred.T @ centred / 40
    same("T M T = 1, M = E[score score^T] + Var(W)", T @ M @ T, torch.eye(6), 1e-3)
    same("T = T^T", T, T.T.contiguous(), 1e-4)
    same("T > 0: its smallest eigenvalue, less what it is, M^-1/2", torch.linalg.eigvalsh(T)[0],
         1 / torch.linalg.eigvalsh(M)[-1].sqrt(), 1e-3)


def test_whitening_of_short_directions():
    axes, sizes = torch.linalg.qr(random(6, 6))[0], torch.tensor([1., 1., 1., 1., 1., 1e-4])
    scores, W = random(500, 6) * sizes @ axes, random(40, 6, seed=1) * sizes @ axes
    T, centred = train_value.whitening(scores, W).double(), (W - W.mean(0)).double()
    M = scores.double().T @ scores.double() / 500 + centred.T @ centred / 40
    same("T M T = 1, where one direction has 1e-8 of the others' variance: use float64", T @ M @ T,
         torch.eye(6), 0.02)


def test_whitening_of_directions_that_no_token_took():
    scores, W = random(500, 6) * torch.tensor([1., 1., 1., 1., 1., 0.]), random(40, 6, seed=1)
    W[:, 5] = 2.0                                               # no token differs there
    T = train_value.whitening(scores, W)
    if not T.isfinite().all():
        pytest.fail("T = M^-1/2, M without full rank: expected finite numbers, got nan or inf",
                    pytrace=False)
