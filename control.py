"""
The control: before each draw, move the state uphill on V, inside a ball.

    u_t = argmax V(h_t + u)   subject to   ||u / std||_2 <= radius * sqrt(n_embd)        (ascend)
    y_t ~ softmax(W (h_t + s u_t)),  s <= 1 the largest with KL(p_su || p_0) <= max_kl   (kl_ball)

approached by projected gradient ascent from u = 0. The default is one step: inside the ball u is then
not the argmax but the KL-regularised optimum for the Q of value.py, which is linear in u. Source:
Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective"
(arXiv 2406.05954), its control at test time.

    h, x    hidden, and (h - mean) / std: the coordinates of the ascent, those V was trained in
    u       the control signal, in the coordinates of h, as it is added before the head
    radius  1 is the typical distance of a state from the mean state
    beta    gain / step_size: one step is the KL-regularised optimum for Q(h, y) (see value.py)

Deviations from the paper, on purpose:
    1. The gradient is closed form (V has one hidden layer), without autograd.
    2. The ascent runs on the pre-activations: u never leaves the span of V's input weights, so once
       G = W1 W1^T is known a step costs one product of the hidden layer's width.
    3. A ball around the state; the paper relies on few steps and a small step size.
    4. A budget in nats a token on the distribution itself, the quantity a text feels.
    5. Only the state of the next token is controlled, not every position of the prompt.

But: one state at a time; the control does not plan over the draws to come, V has to know them.
"""
import math
from dataclasses import dataclass, replace

import torch

from model import InputError
from value import ValueNet


def ascend(value, hidden, steps, step_size, radius, target=math.inf):
    """
    hidden (B, n_embd) -> u (B, n_embd), float32: `steps` steps of projected gradient ascent on V.

    Plain gradient steps: where V is flatter than elsewhere, u is smaller and less KL is spent. A
    negative step_size descends. Where V has reached `target` the climb, or descent, ends. With
    z = W1 x + b1, G = W1 W1^T and u = std * (W1^T A), A (B, width):

        a = w2 * phi'(z + dz)      dV/dx = W1^T a
        A += step_size * a         dz = G A,   ||u / std||^2 = A . dz
    """
    z = value.preactivation(hidden)                            # (B, n_embd) -> (B, width)
    G = value.w1 @ value.w1.T                                  # (width, width)
    ball = radius * math.sqrt(hidden.size(-1))
    A, dz = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(steps):
        a = value.slope(z + dz)
        if target < math.inf:
            a = a * ((target - value.read(z + dz)) * step_size > 0)[:, None]
        A = A + step_size * a
        dz = dz + step_size * (a @ G)
        norm = (A * dz).sum(-1, keepdim=True).clamp(min=0).sqrt()
        shrink = (ball / norm.clamp(min=1e-30)).clamp(max=1)   # 1 inside the ball
        A, dz = A * shrink, dz * shrink
    return value.std * (A @ value.w1)                          # (B, width) -> (B, n_embd)


def kl_divergence(log_p, log_q):
    """KL(p || q) in nats over the last axis; tokens without probability under p count nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def kl_ball(logits, delta, max_kl, iterations=10):
    """
    logits, delta (B, n_vocab) -> scale (B,), the largest s in [0, 1] with
    KL(softmax(logits + s delta) || softmax(logits)) <= max_kl, to within 2%.

    KL(s) = s E_s[delta] - log E_0[exp(s delta)] starts as s^2 Var_0(delta) / 2 and grows with slope
    s Var_s(delta): its root is close to linear, and Newton on it lands in a few steps. A bracket
    keeps it safe. It aims one percent low, so that the best s found lies inside the budget.
    """
    log_p = logits.log_softmax(-1)
    delta = torch.where(log_p > -torch.inf, delta, 0.0)
    p = log_p.exp()
    variance = (p * (delta - (p * delta).sum(-1, keepdim=True)) ** 2).sum(-1)
    s = (2 * max_kl / variance.clamp(min=1e-30)).sqrt().clamp(max=1)
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(iterations):
        log_q = (log_p + s[:, None] * delta).log_softmax(-1)
        q = log_q.exp()
        mean = (q * delta).sum(-1, keepdim=True)
        variance = (q * (delta - mean) ** 2).sum(-1)
        kl = kl_divergence(log_q, log_p)
        low, high = torch.where(kl <= max_kl, s, low), torch.where(kl <= max_kl, high, s)
        root = kl.clamp(min=0).sqrt()
        newton = s - (root - math.sqrt(0.99 * max_kl)) * 2 * root / (s * variance).clamp(min=1e-30)
        newton = newton.clamp(max=1)
        s = torch.where((newton > low) & (newton <= high), newton, (low + high) / 2)
    return low


@dataclass
class Controller:
    """How to steer: hidden (B, n_embd) -> u. `step_size` below 0 steers the other way."""
    value: ValueNet
    steps: int = 1
    step_size: float = 1.0
    radius: float = 1.0
    max_kl: float = math.inf      # nats a token
    target: float = math.inf      # of V: where to stop climbing

    def __call__(self, hidden):
        return ascend(self.value, hidden, self.steps, self.step_size, self.radius, self.target)


@dataclass
class Guided:
    """
    Value-guided decoding, for comparison: p_u(y) ~ p(y) exp(step_size * (V(h_{t+1}(y)) - V(h_t))), where
    the `candidates` most probable tokens are run through the model, so many forward passes more a token.

    Source: Yang and Klein 2021 (FUDGE, arXiv 2104.05218); Mudgal et al. 2023 (arXiv 2310.17022). They drop
    all other tokens; that alone costs nats, so here these stay, as leading to no gain.
    """
    value: ValueNet
    step_size: float = 1.0        # one over their temperature
    candidates: int = 20

    def __call__(self, model, cache, hidden, logits):
        """hidden (B, n_embd), its logits (B, n_vocab) and the cache before the draw -> controlled logits."""
        best, tokens, gains = self.look_ahead(model, cache, hidden, logits)
        return logits.scatter(1, tokens, best + self.step_size * gains)

    def look_ahead(self, model, cache, hidden, logits):
        """-> the candidates' logits, the candidates, V(h_{t+1}) - V(h_t) of each, all (B, candidates)."""
        best, tokens = logits.topk(self.candidates)
        gains, span, now = torch.zeros_like(best), cache.span, self.value(hidden)
        for i in range(self.candidates):
            gains[:, i] = self.value(model(tokens[:, i:i + 1], cache)[:, 0]) - now
            cache.lengths -= 1                                 # taken back; its slot is written again
            cache.span = span
        return best, tokens, gains * (tokens != model.config.eos_token_id)         # no state follows an end


@torch.no_grad()
def step_for_kl(model, control, rollout, nats, states=1024):
    """
    The step_size at which `control` costs `nats` a text on the states of an uncontrolled rollout.

    Bisection on the exact KL, averaged over so many of the states, times the tokens a text has: rare
    tokens, which drawn texts hardly show, count in full. What control changes of later states does not.
    """
    hidden = rollout.hidden[rollout.mask]
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:states]
    hidden, length = hidden[chosen.to(hidden.device)], rollout.mask.sum().item() / len(rollout.mask)
    log_p = model.unembed(hidden).log_softmax(-1)                          # (states, n_vocab)

    def cost(step_size):
        delta = model.unembed(replace(control, step_size=step_size)(hidden))
        return kl_divergence((log_p + delta).log_softmax(-1), log_p).mean().item() * length
    return bisect(cost, nats)


def bisect(cost, nats):
    """The largest dial > 0, to a thousandth, at which a rising cost(dial) stays below `nats`."""
    high = 2.0 ** -20
    while cost(high) < nats:
        high *= 2
        if high > 2 ** 30:
            raise InputError(f"no control costs {nats} nats a text: V is flat or the radius too small; does "
                             f"the reward vary?")
    low = high / 2
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < nats else (low, middle)
    return low
