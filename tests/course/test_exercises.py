"""
The tests of the exercises, in order of dependence (README.md here has the table). A failure is a
line: the equation, what it gives, and what the answer gave.

    python -m pytest tests/course -k targets
"""
import math

import torch

import control
import model
import train_value
import value


def same(equation, got, expected, tolerance=1e-4):
    """Fail, in one line, unless got is expected: a relative tolerance, absolute below 1."""
    __tracebackhide__ = True
    assert isinstance(got, torch.Tensor), f"{equation}: expected a tensor, got {got!r:.50}"
    expected = torch.as_tensor(expected).detach()
    shape, right = tuple(got.shape), tuple(expected.shape)
    assert shape == right, f"{equation}: expected shape {right}, got {shape}"
    got = got.detach()
    error = (got.double() - expected.double()).abs()
    wrong = ~(error <= tolerance * expected.double().abs().clamp(min=1))        # nan is wrong
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{equation}: expected {expected[place].item():.5g}, got "
                             f"{got[place].item():.5g} at {list(place)}")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unchanged(function, *inputs):
    """The function's result; its inputs must be as they were"""
    before = [item.clone() if isinstance(item, torch.Tensor) else None for item in inputs]
    result = function(*inputs)
    for i, item in enumerate(before):
        if item is not None:
            same(f"inputs stay as they are: number {i}", inputs[i], item, 0)
    return result


# --------------------------------------------------------------------- 1, value.py: bellman_targets

VALUES = torch.tensor([[.1, .2, .4]])
REWARDS = torch.tensor([[0., 0., 1.]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_targets_one_step():
    got = unchanged(value.bellman_targets, VALUES.clone(), REWARDS.clone(), ALL.clone(), 0.0)
    same("lam 0: target_t = r_t + V_{t+1}", got, [[.2, .4, 1.]])


def test_targets_monte_carlo():
    rewards, mask = random(4, 7), torch.ones(4, 7, dtype=torch.bool)
    got = value.bellman_targets(random(4, 7, seed=1), rewards, mask, 1.0)
    same("lam 1: target_t = r_t + r_{t+1} + ..", got, rewards.flip(1).cumsum(1).flip(1))


def test_targets_between():
    got = value.bellman_targets(VALUES, REWARDS, ALL, 0.25)
    same("target_t = r_t + (1 - lam) V_{t+1} + lam target_{t+1}, lam 0.25", got, [[.2875, .55, 1.]])
    got = value.bellman_targets(VALUES, torch.tensor([[.5, -1., 1.]]), ALL, 0.25)
    same("rewards on the way count, too", got, [[.5375, -.45, 1.]])


def test_targets_end_with_the_text():
    lengths = torch.tensor([6, 3, 1])
    mask = torch.arange(6) < lengths[:, None]
    values = random(3, 6).masked_fill(~mask, 50.0)              # beyond the end: anything
    rewards = random(3, 6, seed=1).masked_fill(~mask, -70.0)
    got = unchanged(value.bellman_targets, values, rewards, mask, 0.7)
    for row, length in enumerate([6, 3, 1]):
        one = slice(row, row + 1), slice(0, length)
        alone = value.bellman_targets(values[one], rewards[one], mask[one], 0.7)
        same("target_t = r_t at the last token", got[row, length - 1], rewards[row, length - 1])
        same("nothing beyond the last token counts", got[one], alone)
        same("targets beyond the last token are 0", got[row, length:], torch.zeros(6 - length))


# ------------------------------------------------------------------------ 2, control.py: grad_log_p

def test_grad_log_p_is_the_gradient():
    W, h, token = random(30, 5), random(4, 5, seed=1), torch.tensor([0, 7, 7, 29])
    u = torch.zeros(4, 5, requires_grad=True)
    log_p = ((h + u) @ W.T).log_softmax(-1)
    expected, = torch.autograd.grad(log_p[torch.arange(4), token].sum(), u)
    got = unchanged(control.grad_log_p, W, token, log_p.exp().detach())
    same("grad_log_p(y) = gradient of log softmax(W (h + u))[y] in u, at u = 0", got, expected)


def test_grad_log_p_has_mean_0():
    W, p = random(6, 3) + 5, random(1, 6, seed=1).softmax(-1)
    every = control.grad_log_p(W, torch.arange(6), p.expand(6, 6))
    same("E_p[grad_log_p] = 0", p[0] @ every, torch.zeros(3))


def test_grad_log_p_of_one_certain_token():
    W, p = random(6, 3), torch.eye(6)[[2, 4]]
    got = control.grad_log_p(W, torch.tensor([2, 4]), p)
    same("grad_log_p(y) = 0 where p(y) = 1", got, torch.zeros(2, 3))


def test_grad_log_p_in_bfloat16():
    W, p = random(30, 5).bfloat16(), random(2, 30, seed=1).softmax(-1)
    got = control.grad_log_p(W, torch.tensor([3, 9]), p)
    same("W in bfloat16: W[y] - E_p[W]", got, W[[3, 9]].float() - p @ W.float(), 0.03)
    assert got.dtype == W.dtype, f"W's dtype: expected {W.dtype}, got {got.dtype}"


# ----------------------------------------------------------------- 3, train_value.py: bellman_loss

class Heads:
    """V and g as numbers, whatever the state; V = a + 2 r"""

    def __init__(self, a, g):
        self.a = a.requires_grad_()
        self.g = g.requires_grad_()

    def __call__(self, hidden, so_far=None):
        return self.a + 2 * so_far

    def gradient(self, hidden):
        return self.g


def loss_of(lam=0.8, ridge=0.5, plain=False):
    """The answer's loss and what the equations give, with their gradients in V and g"""
    hidden, draws = random(2, 4, 3), random(2, 4, 3, seed=1)
    so_far, rewards = random(2, 4, seed=2), random(2, 4, seed=3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rewards[~mask] = 9.0
    net = Heads(random(2, 4, seed=4), random(2, 4, 3, seed=5))
    before, train_value.RIDGE = train_value.RIDGE, ridge
    try:
        loss = train_value.bellman_loss(net, hidden, so_far, None if plain else draws,
                                        rewards, mask, lam)
    finally:
        train_value.RIDGE = before
    V = net.a + 2 * so_far
    target = value.bellman_targets(V.detach(), rewards, mask, lam)
    error = V - target
    if not plain:
        error = error + (net.g * draws).sum(-1)
    square = error.square() + (0 if plain else ridge * net.g.square().sum(-1))
    expected = square[mask].sum() / 6
    return net, loss, expected


def test_loss_without_ridge():
    for lam in (0.0, 0.8):
        _, loss, expected = loss_of(lam, ridge=0.0)
        same(f"loss = mean of (V + g . grad_log_p - target)^2, RIDGE 0, lam {lam}", loss, expected)


def test_loss_with_ridge():
    _, loss, expected = loss_of(ridge=0.5)
    same("loss = mean of (Q - target)^2 + RIDGE |g|^2, RIDGE 0.5", loss, expected)


def test_loss_of_a_net_without_g():
    _, loss, expected = loss_of(plain=True)
    same("loss = mean of (V - target)^2 without draws", loss, expected)


def test_loss_moves_v_and_g():
    net, loss, expected = loss_of()
    assert loss.requires_grad, "the loss must have a gradient: expected True, got False"
    expected = torch.autograd.grad(expected, [net.a, net.g])
    got = torch.autograd.grad(loss, [net.a, net.g], materialize_grads=True)
    same("d loss / dV = 2 (Q - target) / n: the target is a constant", got[0], expected[0])
    same("d loss / dg = 2 ((Q - target) grad_log_p + RIDGE g) / n", got[1], expected[1])


# -------------------------------------------------------------------- 4, value.py: ValueNet.forward

def net_of(reads_so_far=True):
    torch.manual_seed(0)
    net = value.ValueNet(5, width=7, reads_so_far=reads_so_far)
    net.mean.copy_(random(5))
    net.std.copy_(random(5, seed=1).abs() + 0.5)
    return net


def by_hand(net, hidden):
    """a(z), and b(z) if the net has it"""
    x = (hidden.double() - net.mean.double()) / net.std.double()
    f = (x @ net.body[0].weight.double().T + net.body[0].bias.double()).tanh()
    return (f @ net.value_head.weight.double().T + net.value_head.bias.double()).unbind(-1)


def test_forward_reads_the_reward_so_far():
    net, hidden, so_far = net_of(), random(2, 3, 5, seed=2), random(2, 3, seed=3)
    a, b = by_hand(net, hidden)
    got = unchanged(net, hidden, so_far)
    same("V(h, s) = a(z) + b(z) s", got, a + b * so_far.double())
    same("V(h, 0) = a(z)", net(hidden, torch.zeros(2, 3)), a)
    same("one state alone: V ()", net(hidden[0, 0], so_far[0, 0]), (a + b * so_far)[0, 0])


def test_forward_without_it():
    net, hidden = net_of(reads_so_far=False), random(2, 3, 5, seed=2)
    a, = by_hand(net, hidden)
    same("V(h) = a(z), so_far left out", net(hidden), a)
    same("V(h) = a(z), so_far not read", net(hidden, torch.full((2, 3), math.nan)), a)


def test_forward_after_training():
    net, hidden = net_of(), random(4, 5, seed=2).bfloat16()
    net.value_head.double()                                     # as train_value.unscale leaves it
    with torch.no_grad():
        net.value_head.bias[0] += 1e6
    a, b = by_hand(net, hidden)
    got = net(hidden, torch.ones(4, dtype=torch.float64))
    same("the head in float64: V - 1e6", got - 1e6, a + b - 1e6)


def test_forward_can_be_differentiated():
    net, hidden, so_far = net_of(), random(4, 5, seed=2).requires_grad_(), random(4)
    so_far.requires_grad_()
    V = net(hidden, so_far)
    assert V.requires_grad, "V must have a gradient: expected True, got False"
    got = torch.autograd.grad(V.sum(), [so_far, hidden, net.value_head.weight],
                              materialize_grads=True)
    a, b = by_hand(net, hidden)
    expected = torch.autograd.grad((a + b * so_far).sum(), [hidden, net.value_head.weight])
    same("dV/dr = b(z)", got[0], b)
    same("dV/dh", got[1], expected[0])
    same("dV/d(the head's weights)", got[2], expected[1])


# ---------------------------------------------------------------------------- 5, control.py: ascend

class Bowl:
    """g(h) = std^2 (top - h): uphill in the coordinates of x = h / std"""

    def __init__(self, std, top):
        self.std = torch.tensor(std)
        self.mean = torch.zeros_like(self.std)
        self.top = torch.tensor(top)

    def __call__(self, hidden, so_far=None):
        return hidden.sum(-1)               # V: g is learned beside it, and is not its slope

    def gradient(self, hidden):
        return self.std ** 2 * (self.top - hidden)


ROUND = Bowl([1., 1.], [3., 3.])
LONG = Bowl([1., 4.], [30., 30.])


def test_ascend_one_step():
    hidden = torch.tensor([[1., 2.], [3., 3.]])
    got = unchanged(control.ascend, ROUND, hidden, 1, 0.5, 10.0)
    same("u = step_size g(h)", got, [[1., .5], [0., 0.]])
    got = control.ascend(ROUND, hidden, 1, -1.0, 10.0)
    same("u = step_size g(h), step_size -1", got, [[-2., -1.], [0., 0.]])
    got = control.ascend(ROUND, hidden.bfloat16(), 1, 0.5, 10.0)
    assert got.dtype == torch.float32, f"u: expected float32, got {got.dtype}"


def test_ascend_climbs_from_where_it_is():
    hidden = torch.tensor([[1., 2.]])
    got = unchanged(control.ascend, ROUND, hidden, 2, 0.5, 10.0)
    same("u <- u + step_size g(h + u), twice", got, [[1.5, .75]])
    got = unchanged(control.ascend, ROUND, hidden, 3, 0.5, 10.0)
    same("u <- u + step_size g(h + u), three times", got, [[1.75, .875]])
    same("u = 0 without a step", control.ascend(ROUND, hidden, 0, 0.5, 10.0), [[0., 0.]])


def test_ascend_stays_in_the_ball():
    hidden = torch.tensor([[0., 0.], [29.9, 30.]])              # far outside the ball, and inside
    u = control.ascend(LONG, hidden, 1, 1.0, 2.0)
    same("||u / std|| = radius sqrt(n_embd)", (u / LONG.std)[0].norm(), 2 * math.sqrt(2))
    same("P(u) keeps the direction of u = (30, 480)", u[0, 1] / u[0, 0], 16.0)
    same("P(u) = u inside the ball", u[1], [.1, 0.])


def test_ascend_projects_after_each_step():
    # The first step leaves the ball; from its surface the second leads elsewhere than from outside.
    got = control.ascend(Bowl([1., 1.], [4., 3.]), torch.zeros(1, 2), 2, 2.0, 1.0)
    one = math.sqrt(2) * torch.tensor([.8, .6])
    two = 2 * (torch.tensor([4., 3.]) - one) + one
    same("u <- P(u + step_size g(h + u)), twice", got[0], two / two.norm() * math.sqrt(2))
    slope = Bowl([1., 1.], [30., 0.])
    right, up = torch.tensor([4., 0.]), torch.tensor([0., 4.])
    slope.gradient = lambda h: torch.where(h[:, :1] < 2, right, up)
    got = control.ascend(slope, torch.zeros(1, 2), 2, 1.0, 1.0)
    same("P after the first step, too: g is asked at h + P(u)", got, [[math.sqrt(2), 0.]])


def test_ascend_without_a_ball():
    got = control.ascend(LONG, torch.tensor([[0., 0.], [30., 30.]]), 1, 1.0, math.inf)
    same("radius inf: u = step_size g(h)", got, [[30., 480.], [0., 0.]])


# --------------------------------------------------------------------------- 6, control.py: kl_ball

def kl(logits, delta, scale):
    """KL(softmax(logits + scale delta) || softmax(logits)), by the definition, in float64"""
    q = (logits.double() + scale.double()[:, None] * delta.double()).log_softmax(-1)
    return (q.exp() * (q - logits.double().log_softmax(-1))).sum(-1)


def spends(logits, delta, max_kl):
    """Fail unless each row spends 95% to 100% of its budget"""
    scale = unchanged(control.kl_ball, logits, delta, max_kl)
    same("one s a row", scale, torch.as_tensor(scale).clamp(0, 1).reshape(-1)[:len(logits)])
    most = (kl(logits, delta, torch.ones(len(logits))) / max_kl).clamp(max=1)       # with s <= 1
    spent = kl(logits, delta, scale) / max_kl
    same("KL(s) <= max_kl: KL(s) / max_kl", spent, spent.clamp(max=1), 1e-3)
    same("KL(s) near max_kl: KL(s) / max_kl", spent, 0.975 * most, 0.026)


def test_kl_ball_spends_the_budget():
    for max_kl in (0.02, 0.3):
        spends(2 * random(32, 50), 3 * random(32, 50, seed=1), max_kl)


def test_kl_ball_of_confident_models():
    logits = torch.zeros(3, 50)
    logits[:, 0] = torch.tensor([8., 10., 12.])                 # one token has nearly all of p
    delta = torch.zeros(3, 50)
    delta[:, 1] = 20.0
    spends(logits, delta, 0.5)
    spends(logits.masked_fill(torch.arange(50) > 40, -1e9), delta, 0.5)         # cut by top_p


def test_kl_ball_leaves_what_is_inside():
    logits, delta = random(4, 50), 0.01 * random(4, 50, seed=1)
    same("s = 1 where KL(1) <= max_kl", control.kl_ball(logits, delta, 5.0), torch.ones(4), 0.01)
    same("s = 1 for delta = 0", control.kl_ball(logits, 0 * delta, 0.1), torch.ones(4), 0.01)


def test_kl_ball_of_each_row():
    logits = random(1, 50).repeat(3, 1)
    delta = torch.tensor([[.01], [3.], [30.]]) * random(1, 50, seed=1)
    got = control.kl_ball(logits, delta, 0.2)
    alone = [control.kl_ball(logits[i:i + 1], delta[i:i + 1], 0.2) for i in range(3)]
    same("each row's s is its own", got, torch.cat(alone), 0.01)
    same("a tenth of s for ten times delta", got[2] * 10, got[1].clamp(max=1), 0.03)


# ------------------------------------------------------------------------------ 7, control.py: draw

def inverse_cdf(probs, uniforms):
    """By the definition, in float64"""
    cdf = probs.double().cumsum(-1)
    return (cdf <= uniforms.double() * cdf[:, -1:]).sum(-1)


def test_draw_is_the_inverse_cdf():
    probs = torch.tensor([[.1, .2, .3, .4]]).repeat(5, 1)
    uniforms = torch.tensor([[.05], [.15], [.35], [.65], [.999]])
    got = unchanged(control.draw, probs, uniforms)
    same("y = the first token with CDF(y) > uniform", got, [0, 1, 2, 3, 3])
    assert got.dtype == torch.int64, f"tokens: expected int64, got {got.dtype}"
    scaled = probs * torch.arange(1., 6.)[:, None]
    same("y of scaled probs: uniform times a row's total", control.draw(scaled, uniforms), got)


def test_draw_of_each_row():
    probs = random(64, 1000).softmax(-1)
    uniforms = torch.rand(64, 1, generator=torch.Generator().manual_seed(2))
    got = control.draw(probs, uniforms)
    same("y = the first token with CDF(y) > uniform, 1000 tokens", got,
         inverse_cdf(probs, uniforms))


def test_draw_sums_in_float64():
    probs = random(1, 20000).exp()
    cdf = probs.double().cumsum(-1)[0]
    expected = torch.arange(200, 20000, 200)                    # uniforms just above CDF(y - 1)
    uniforms = (cdf[expected - 1] + 0.002 * probs[0, expected]) / cdf[-1]
    got = control.draw(probs.expand(len(expected), -1), uniforms[:, None])
    same("y = the first token with CDF(y) > uniform, 20000 tokens: use float64", got, expected)


def test_draw_never_takes_what_has_no_probability():
    probs = torch.zeros(4, 700)
    probs[:, [5, 300, 301]] = torch.tensor([.5, .25, .25])
    edge = torch.tensor([[0.], [.5], [.75], [1 - 2 ** -24]])
    got = control.draw(probs, edge)
    same("p(y) > 0 of each y; uniforms 0, 0.5, 0.75, nearly 1", got, [5, 300, 301, 301])


# --------------------------------------------------------------------- 8, train_value.py: whitening

def moments(scores, W):
    scores, W = scores.double(), W.double()
    centred = W - W.mean(0)
    return scores.T @ scores / len(scores) + centred.T @ centred / len(W)


def test_whitening_whitens():
    scores, W = random(60, 6) * torch.arange(1., 7.) + 1.0, random(40, 6, seed=1) + 3.0
    whiten = unchanged(train_value.whitening, scores, W).double()
    M = moments(scores, W)
    same("whiten M whiten = 1, M = E[x x^T] + Var(W), x: grad_log_p", whiten @ M @ whiten,
         torch.eye(6), 1e-3)
    same("whiten = whiten^T", whiten, whiten.T, 1e-4)
    least = 1 / torch.linalg.eigvalsh(M)[-1].sqrt()
    same("whiten > 0: its smallest eigenvalue", torch.linalg.eigvalsh(whiten)[0], least, 1e-3)


def test_whitening_of_short_directions():
    axes = torch.linalg.qr(random(6, 6))[0]
    sizes = torch.tensor([1., 1., 1., 1., 1., 1e-4])
    scores, W = random(500, 6) * sizes @ axes, random(40, 6, seed=1) * sizes @ axes
    whiten = train_value.whitening(scores, W).double()
    same("whiten M whiten = 1, where a direction has 1e-8 of the others' variance: use float64",
         whiten @ moments(scores, W) @ whiten, torch.eye(6), 0.02)


def test_whitening_of_directions_that_no_token_took():
    scores, W = random(500, 6), random(40, 6, seed=1)
    scores[:, 5] = 0.0
    W[:, 5] = 2.0                                               # no token differs there
    whiten = train_value.whitening(scores, W)
    finite = whiten.isfinite().double()
    same("M without full rank: finite numbers (1: yes)", finite, torch.ones(6, 6))
    largest = torch.linalg.eigvalsh(moments(scores, W))[-1]
    same("eigenvalues of M are at least 1e-10 of the largest", whiten[5, 5],
         1e5 / largest.sqrt(), 1e-2)


# ------------------------------------------------------------------------- 9, model.py: Cache.store

def tiny():
    torch.manual_seed(0)
    config = model.Config(n_vocab=40, n_positions=160, n_embd=16, n_layer=2, n_head=2, n_inner=32)
    return model.GPT(config).eval().requires_grad_(False)


def stored(cache, layer, k, v, lengths=None):
    cache.open(k.size(2), lengths)
    return unchanged(lambda k, v: cache.store(layer, k, v), k, v)


def test_store_returns_the_window():
    cache = model.Cache(tiny(), batch=2, size=100)
    k, v = random(2, 2, 3, 8), random(2, 2, 3, 8, seed=1)
    both = stored(cache, 1, k, v)
    for name, got, given in zip(("keys", "values"), both, (k, v)):
        whole = torch.zeros(2, 2, 64, 8)                        # one window: 64 slots
        whole[:, :, :3] = given
        same(f"{name}[b, head, slot] of the window", got, whole)
    same("other layers stay as they are: keys", cache.keys[0], torch.zeros(2, 2, 100, 8))
    same("other layers stay as they are: values", cache.values[0], torch.zeros(2, 2, 100, 8))


def test_store_continues_each_row_where_it_ended():
    cache = model.Cache(tiny(), batch=2, size=100)
    k, new = random(2, 2, 3, 8), random(2, 2, 2, 8, seed=1)
    stored(cache, 0, k, k, torch.tensor([3, 1]))                # row 1 holds one token
    keys, values = stored(cache, 0, new, -new)
    same("keys of row 0 at positions 3, 4 = k", keys[0, :, 3:5], new[0])
    same("keys of row 1 at positions 1, 2 = k", keys[1, :, 1:3], new[1])
    same("values of row 1 at positions 1, 2 = v", values[1, :, 1:3], -new[1])
    same("keys of row 0 before them stay", keys[0, :, :3], k[0])
    same("keys of row 1 before them stay", keys[1, :, :1], k[1, :, :1])


def test_store_token_by_token_is_the_whole_text():
    gpt, tokens = tiny(), torch.arange(70)[None] * 7 % 40       # 70: beyond the first window of 64
    cache, whole = model.Cache(gpt, 1, 80), gpt(tokens)
    parts = [gpt(tokens[:, :60], cache)]
    parts += [gpt(tokens[:, t:t + 1], cache) for t in range(60, 70)]
    same("h_t with the cache = h_t without", torch.cat(parts, 1), whole)
