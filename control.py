"""
The control: before each draw, push the state uphill inside a ball; and the loop that this closes.

    u <- P(u + step_size g(h_t + u)),  from u = 0                                   (ascend)
         g = value.gradient (value.py),  P the projection onto ||u / std|| <= radius sqrt(n_embd)
    y_t ~ softmax(W (h_t + s u)),  s <= 1 the largest with KL(p_su || p_0) <= max_kl (kl_ball)

Source: Kong et al. 2024 (arXiv 2406.05954). One step from u = 0 is the KL-regularised optimum for
the Q of value.py, with beta = 1 / step_size. Where this differs from the paper:
    1. g is learned from the draws; the paper differentiates V (here: gradient_head=False).
    2. One step, of the size that costs a chosen number of nats (step_for_kl); the paper takes tens
       of small ones, and limits u by their number.
    3. A ball around the state, and a budget in nats a token on the distribution itself.
    4. Only the state from which the next token is drawn is controlled, not those of the prompt.

Draws are an inverse CDF over one table of uniforms from a CPU generator: the same for every
control, device and batch, so texts with and without control form pairs.

Limitations: control does not plan over the draws to come (V has to know them); no beam search, no
top-k; rounding, in bfloat16 above all, may turn a draw.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Cache, InputError, read_prompts

def ascend(value, hidden, steps=1, step_size=1.0, radius=10.0):
    """
    hidden (B, n_embd) -> u (B, n_embd), float32: projected gradient ascent from u = 0.

    After each step, where ||u / std|| > radius sqrt(n_embd), u is scaled back to that length: at
    radius 1 a state's typical distance from the mean state. A negative step_size descends.
    """
    u = torch.zeros_like(hidden, dtype=torch.float32)
    for _ in range(steps):
        u = u + step_size * value.gradient(hidden + u)
        length = (u / value.std).norm(dim=-1, keepdim=True)                     # (B, 1)
        u = u * (radius * math.sqrt(u.size(-1)) / length).clamp(max=1)          # back onto the ball
    return u

def kl_divergence(log_q, log_p):
    """KL(q || p) in nats: log-probabilities (..., n_vocab) -> (...)"""
    return (log_q.exp() * (log_q - log_p)).sum(-1)

def kl_ball(logits, delta, max_kl, iterations=8):
    """
    logits, delta (B, n_vocab) -> scale (B,), nearly the largest s in [0, 1] with
    KL(softmax(logits + s delta) || softmax(logits)) <= max_kl: not above, seldom 2% below.

    KL(s) starts as s^2 Var_0(delta) / 2 and its slope is s Var_s(delta). So Newton's method solves
    sqrt(KL(s)) = sqrt(0.99 max_kl) inside a bracket; a fixed number of steps never waits for a GPU.
    """
    def variance(probs):
        mean = (probs * delta).sum(-1, keepdim=True)
        return (probs * (delta - mean) ** 2).sum(-1).clamp(min=1e-12)

    log_p, target = logits.log_softmax(-1), math.sqrt(0.99 * max_kl)
    s = (target * (2 / variance(log_p.exp())).sqrt()).clamp(max=1)              # (B,)
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(iterations):
        log_q = (log_p + s[:, None] * delta).log_softmax(-1)
        root = kl_divergence(log_q, log_p).clamp(min=1e-12).sqrt()
        inside = root ** 2 <= max_kl
        low, high = torch.where(inside, s, low), torch.where(inside, high, s)
        newton = (s - (root - target) * 2 * root / (s * variance(log_q.exp()))).clamp(max=1)
        s = torch.where((newton > low) & (newton <= high), newton, (low + high) / 2)
    return low

def draw(probs, uniform, block=256):
    """
    probs (B, n_vocab), uniform (B, 1) in [0, 1) -> tokens (B,): the first whose cumulative
    probability exceeds uniform times the total.

    In two levels, first the block of `block` tokens, then the token in it: 20 times faster than the
    CDF of a whole vocabulary. Sums are float64, and what is left of the uniform inside the block
    stays below the block's total, so no token without probability is ever drawn.
    """
    padded = F.pad(probs, (0, -probs.size(1) % block))                          # (B, n * block)
    blocks = padded.unflatten(1, (-1, block))                                   # (B, n, block)
    sums = blocks.sum(-1, dtype=torch.float64)                                  # (B, n)
    cdf = sums.cumsum(-1)
    target = uniform.double() * cdf[:, -1:]
    chosen = torch.searchsorted(cdf, target, right=True)                        # (B, 1)
    rest = (target - (cdf - sums).gather(1, chosen)).clamp(min=0)
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block))[:, 0]   # (B, block)
    inside = inside.cumsum(-1, dtype=torch.float64)
    rest = torch.minimum(rest, inside[:, -1:] * (1 - 2.0 ** -40))
    return chosen[:, 0] * block + torch.searchsorted(inside, rest, right=True)[:, 0]

# --------------------------------------------------------------------------------- the closed loop

@dataclass
class Rollout:
    """Drawn texts: fields are (N, T), past a text's end they mean nothing."""
    tokens: torch.Tensor          # y_t
    mask: torch.Tensor            # True up to and including the token that ends the text
    kl: torch.Tensor              # KL(p_u || p), nats, of the distributions y_t was drawn from
    logp: torch.Tensor            # log p(y_t), without control, nats
    logq: torch.Tensor            # log p_u(y_t), nats
    hidden: torch.Tensor          # h_t (N, T, n_embd), in the model's dtype; empty unless recorded
    score: torch.Tensor           # W[y_t] - E_{p_u}[W] (N, T, n_embd), likewise

def steer(model, hidden, controller, temperature=1.0, max_kl=math.inf):
    """hidden (B, n_embd) -> log p and log p_u (B, n_vocab), without and with control"""
    u = torch.zeros_like(hidden) if controller is None else controller(hidden)
    # One reading of W for both. W u apart: in bfloat16 h + u would round a small u away.
    both = model.unembed(torch.stack([hidden, u.to(hidden.dtype)]))             # (2, B, n_vocab)
    logits, delta = both if temperature == 1 else both / temperature
    if max_kl < math.inf:
        delta = delta * kl_ball(logits, delta, max_kl)[:, None]
    return logits.log_softmax(-1), (logits + delta).log_softmax(-1)

class Sampler:
    """
    A batch of texts, drawn side by side; `steer` is hidden -> log p, log p_u, see above. `step` is
    all that happens. It reads nothing back from the device, every buffer it writes to is made once,
    and its Python numbers (step size, temperature, max_kl, the cache's window) stay the same within
    a window: so a GPU may capture and replay it (`advance`).
    """
    def __init__(self, model, batch, size, n_tokens, record, steer):
        W, n_embd = model.wte.weight, model.config.n_embd
        self.model, self.steer, self.record = model, steer, record
        self.cache = Cache(model, batch, size)
        self.ends = torch.tensor(model.config.eos_ids, dtype=torch.long, device=W.device)
        self.hidden = torch.zeros(batch, n_embd, dtype=W.dtype, device=W.device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=W.device)
        self.uniforms = torch.zeros(batch, n_tokens, device=W.device)
        self.t = torch.zeros(1, dtype=torch.long, device=W.device)
        kl, logp, logq = torch.zeros(3, batch, n_tokens, device=W.device)
        hidden, score = W.new_zeros(2, batch, n_tokens if record else 0, n_embd)
        self.out = Rollout(kl.long(), kl.bool(), kl, logp, logq, hidden, score)
        self.graphs = {}                                    # {window of the cache: CUDA graph}
        self.pool = torch.cuda.graph_pool_handle() if W.is_cuda else None

    def begin(self, prompts, uniforms):
        """Read the prompts [[token, ..], ..] and stand at their last states."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.hidden.device)
        rows = [torch.tensor(prompt, device=self.hidden.device) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)        # (B, T)
        self.uniforms.copy_(uniforms)
        self.alive.fill_(True)
        for buffer in (self.t, self.cache.lengths, self.out.mask):
            buffer.zero_()
        self.cache.used = 0
        hidden = self.model(tokens, self.cache, lengths)                        # (B, T, n_embd)
        self.hidden.copy_(hidden[self.cache.rows[:, 0], lengths - 1])

    def step(self):
        """h_t -> u_t -> y_t -> h_{t+1} for every row"""
        W, t = self.model.wte.weight, self.t
        log_p, log_q = self.steer(self.hidden)                                  # (B, n_vocab)
        probs = log_q.softmax(-1)            # exp(log_q), but five times faster on a CPU
        token = draw(probs, self.uniforms.index_select(1, t))                   # (B,)
        columns = {"tokens": token, "mask": self.alive, "kl": (probs * (log_q - log_p)).sum(-1),
                   "logp": log_p.gather(1, token[:, None])[:, 0],
                   "logq": log_q.gather(1, token[:, None])[:, 0]}
        if self.record:
            columns |= {"hidden": self.hidden, "score": W[token] - probs.to(W.dtype) @ W}
        for name, column in columns.items():
            getattr(self.out, name).index_copy_(1, t, column[:, None])
        self.alive &= (token[:, None] != self.ends).all(-1)
        self.hidden.copy_(self.model(token[:, None], self.cache)[:, 0])
        t += 1

    def advance(self):
        """A step. On a GPU the first of each window runs and is then captured; others replay it."""
        window = self.cache.used // Cache.WINDOW
        if window in self.graphs:
            self.graphs[window].replay()
            self.cache.used += 1
            return
        self.step()
        if self.hidden.is_cuda:
            self.cache.used -= 1                            # recorded as the same step, not run
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step()
            self.graphs[window] = graph

    def run(self, prompts, uniforms):
        """-> the sampler's own Rollout, which the next run writes over"""
        self.begin(prompts, uniforms)
        for t in range(uniforms.size(1)):
            if t % 16 == 0 and not self.alive.any():
                break
            self.advance()
        return self.out

def uniform_table(samples, n_tokens, seed):
    """(samples, n_tokens) uniforms in [0, 1); a row depends on the seed and its number alone"""
    rows = [np.random.default_rng([seed, i]).random(n_tokens, np.float32) for i in range(samples)]
    return torch.from_numpy(np.stack(rows))

@torch.no_grad()
def generate(model, prompts, uniforms, controller=None, temperature=1.0, max_kl=math.inf,
             record=False, batch=128, progress=None):
    """
    N prompts [[token, ..], ..] and uniforms (N, T) -> a Rollout of N texts of at most T tokens.

    controller: hidden (B, n_embd) -> u (B, n_embd); None is u = 0, to the bit. max_kl is in nats a
    token. `record` keeps the states and scores for training. `progress(done, N)` is called after
    each batch. InputError if a text would be longer than the model's context.
    """
    (N, T), longest = uniforms.shape, max(map(len, prompts))
    if longest + T > model.config.n_positions:
        raise InputError(f"a prompt of {longest} tokens and {T} more exceed the model's context of "
                         f"{model.config.n_positions}; shorten the prompt or lower --tokens")
    batch, parts = min(batch, N), []
    sampler = Sampler(model, batch, longest + T, T, record, steer=lambda hidden: steer(
        model, hidden, controller, temperature, max_kl))
    for start in range(0, N, batch):
        rows = [i % N for i in range(start, start + batch)]          # the last batch is filled up
        out = sampler.run([prompts[i] for i in rows], uniforms[rows])
        parts.append([column[:N - start].clone() for column in vars(out).values()])
        if progress:
            progress(min(start + batch, N), N)
    return Rollout(*map(torch.cat, zip(*parts)))

@torch.no_grad()
def step_for_kl(model, control, rollout, nats, states=512):
    """
    The step_size > 0 at which control(hidden, step_size) -> u costs `nats` a text, to a thousandth.

    Searched on the exact KL of `states` of the rollout's, times the tokens a text has. What
    control changes of later states is left out. InputError if no step costs so much.
    """
    hidden, length = rollout.hidden[rollout.mask], rollout.mask.sum(1).float().mean()
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:states]
    hidden = hidden[chosen.to(hidden.device)]                                   # (states, n_embd)
    log_p = model.unembed(hidden).log_softmax(-1)
    low, high, step = 0.0, math.inf, 1.0
    for i in range(50):
        delta = model.unembed(control(hidden, step))
        spent = (kl_divergence((log_p + delta).log_softmax(-1), log_p).mean() * length).item()
        if abs(spent - nats) < 0.001 * nats:
            return step
        low, high = (step, high) if spent < nats else (low, step)
        step *= math.sqrt(nats / max(spent, 1e-30))                 # KL grows as step^2; where it
        if not low < step < high or i % 3 == 2:                     # does not, halve the bracket
            step = (low + min(high, 4 * low + 1e-6)) / 2
    raise InputError(f"no step of control costs {nats:g} nats a text: V is flat; choose a reward "
                     f"that varies more, or more rollouts")
