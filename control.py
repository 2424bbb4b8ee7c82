"""
The control: before each draw, move the state uphill on A, inside a ball; and the loop it closes.

    u_t = argmax A(h_t + u)   subject to   ||u / std||_2 <= radius * sqrt(n_embd)        (ascend)
    y_t ~ softmax(W (h_t + s u_t)),  s <= 1 the largest with KL(p_su || p_0) <= max_kl   (kl_ball)

approached by projected gradient ascent from u = 0; A is V itself or its `lift` (value.py). The default
is one step: inside the ball u is then not the argmax but the KL-regularised optimum for the Q of value.py,
which is linear in u. Source:
Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective"
(arXiv 2406.05954), its control at test time.

    h, x    hidden, and (h - mean) / std: the coordinates of the ascent, those V was trained in
    u       the control signal, in the coordinates of h, as it is added before the head
    radius  1 is the typical distance of a state from the mean state
    beta    1 / step_size: one step is the KL-regularised optimum for Q(h, y) (see value.py)

Deviations from the paper, on purpose:
    1. The gradient is closed form (V has one hidden layer), without autograd.
    2. The ascent runs in the span of V's input weights, which u never leaves: a step costs two products of
       the hidden layer's width, whatever that of the state; and so does W u, once W times a basis is known.
    3. A ball around the state; the paper relies on few steps and a small step size.
    4. A budget in nats a token on the distribution itself, the quantity a text feels; likewise a target
       that V of the draw need not exceed.
    5. Only the state of the next token is controlled, not every position of the prompt.

The loop is `Sampler.step`: read the state, find the control, draw a token, move the state on. One
function for every device: eager on the CPU, on a GPU captured as a CUDA graph and replayed, so nothing
in it reads a tensor back to the host. Draws are an inverse CDF over one table of uniforms,
(samples, tokens), from a CPU generator: the same on every device, in every batch, under every control
(but for rounding, which moves a draw now and then, in bfloat16 more often).

But: one state at a time; the control does not plan over the draws to come, V has to know them. No
speculative decoding, no beam search.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model import Cache, InputError, give_back, product
from value import ValueNet


def ascend(value, hidden, steps, step_size, radius):
    """
    hidden (B, n_embd) -> u (B, n_embd), float32: `steps` steps of projected gradient ascent.

    Plain gradient steps: where A is flatter than elsewhere, u is smaller and less KL is spent. A negative
    step_size descends. u stays in the span of A's input weights: u = std * Q e, Q from `span`.
    """
    Q, R = span(value)
    return climb(value, hidden, R, steps, step_size, radius) @ (value.std * Q.T)  # (B, k) -> (B, n_embd)


def span(value):
    """-> Q (n_embd, k) with Q^T Q = 1, a basis of all that A reads of x, and R (k, width): W1^T = Q R."""
    w1 = value.climbed.w1
    if len(w1) < w1.size(1):
        return torch.linalg.qr(w1.T)
    return torch.eye(w1.size(1), device=w1.device), w1.T       # it reads all


def climb(value, hidden, R, steps, step_size, radius):
    """
    The ascent in that basis -> e (B, k). With A's own z = W1 x + b1,

        z(x + Q e) = z + R^T e      dA/de = R a,  a = w2 * phi'(z)      ||Q e|| = ||e||
    """
    climbed = value.climbed
    z, up = climbed.preactivation(hidden), step_size * R.T     # (B, n_embd) -> (B, width)
    e, ball = z.new_zeros(len(z), len(R)), radius * math.sqrt(hidden.size(-1))
    for _ in range(steps):
        a = climbed.slope(z + e @ R)                           # (B, width)
        e = torch.renorm(e + a @ up, 2, 0, ball)               # rows longer than that, back onto the ball
    return e


def kl_divergence(log_p, log_q):
    """KL(p || q) in nats over the last axis; tokens without probability under p count nothing."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)


def log_normaliser(logits, probs):
    """
    logits, their softmax probs (B, n_vocab) -> log sum exp(logits) (B,), which is logits - log(probs) at
    any token; at the likeliest nothing underflows. torch's softmax is one pass, its logsumexp five.
    """
    return logits.amax(-1) - probs.amax(-1).log()


def kl_ball(logits, delta, max_kl, iterations=10):
    """
    logits, delta (B, n_vocab) -> scale (B,), the largest s in [0, 1] with
    KL(softmax(logits + s delta) || softmax(logits)) <= max_kl, to within 2% of max_kl.

    KL(s) = s E_s[delta] - log E_0[exp(s delta)] starts as s^2 Var_0(delta) / 2 and grows with slope
    s Var_s(delta): its root is close to linear, and Newton on it lands in a few steps. A bracket
    keeps it safe. It aims one percent low; each row keeps the first s inside the budget and within 2% of
    it. (Where one token has all but e^-15 of the probability and delta is huge, ten iterations may end far
    below.)
    """
    log_p = logits.log_softmax(-1).clamp_(min=-1e30)           # finite, so that 0 * log 0 = 0
    q = log_p.exp()
    room = q * delta                                           # of the vocabulary's size: for every iteration
    delta = delta - room.sum(-1, keepdim=True)
    variance = torch.mul(q, delta, out=room).mul_(delta).sum(-1)
    s = (2 * max_kl / variance.clamp(min=1e-30)).sqrt().clamp(max=1)
    low, high, done = torch.zeros_like(s), torch.ones_like(s), s < 0
    for _ in range(iterations):
        torch.log_softmax(torch.addcmul(log_p, s[:, None], delta, out=q), -1, out=room)
        torch.exp(room, out=q)
        kl = room.sub_(log_p).mul_(q).sum(-1)
        mean = torch.mul(q, delta, out=room).sum(-1)
        variance = room.mul_(delta).sum(-1) - mean ** 2
        inside = kl <= max_kl
        low, high = torch.where(inside & ~done, s, low), torch.where(inside, high, s)
        done |= inside & ((kl >= 0.98 * max_kl) | (s == 1))
        if s.is_cpu and done.all():                            # of a GPU the host does not ask
            break
        root = kl.clamp(min=0).sqrt()
        newton = s - (root - math.sqrt(0.99 * max_kl)) * 2 * root / (s * variance).clamp(min=1e-30)
        newton = newton.clamp(max=1)
        s = torch.where((newton > low) & (newton <= high), newton, (low + high) / 2)
    return low


def target_ball(logits, delta, worth, rise, iterations=12):
    """
    logits, delta, worth (B, n_vocab), rise (B,) -> scale (B,), the largest s in [0, 1], to 1 / 4096, with
    E_s[worth] - E_0[worth] <= rise under p_s = softmax(logits + s delta), found by bisection: for one step
    delta is a multiple of worth, and E_s[worth] grows with s. (For several it need not: then some such s.)
    """
    low, high, room = torch.zeros_like(rise), torch.ones_like(rise), torch.empty_like(logits)

    def expected(s):
        torch.softmax(torch.addcmul(logits, s[:, None], delta, out=room), -1, out=room)
        return room.mul_(worth).sum(-1)

    start, s = expected(low), high
    for _ in range(iterations + 1):
        inside = expected(s) - start <= rise
        low, high = torch.where(inside, s, low), torch.where(inside, high, s)
        s = (low + high) / 2
    return low


@dataclass
class Controller:
    """How to steer: hidden (B, n_embd) -> u. `step_size` below 0 steers the other way."""
    value: ValueNet
    steps: int = 1
    step_size: float = 1.0
    radius: float = 10.0          # far out: the budget in nats is what bounds a step
    max_kl: float = math.inf      # nats a token
    target: float = math.inf      # of V: no more control than reaches it, see target_ball
    excitation: float = 0.0       # above 0: a random control instead, of standard deviations up to it, in x

    def climb(self, hidden, R):
        """hidden (B, n_embd) -> e (B, k), see `climb`."""
        return climb(self.value, hidden, R, self.steps, self.step_size, self.radius)

    def __call__(self, hidden):
        """hidden (B, n_embd) -> u (B, n_embd), float32. A subclass may choose u otherwise."""
        if self.excitation:
            size = self.excitation * torch.rand(len(hidden), 1, device=hidden.device)
            return size * self.value.std * torch.randn(hidden.shape, device=hidden.device)
        return ascend(self.value, hidden, self.steps, self.step_size, self.radius)


# ------------------------------------------------------------------------------------ the closed loop

@dataclass
class Decoding:
    """What is left of the model's distribution before a token is drawn from it."""
    temperature: float = 1.0      # 0: the most probable token
    top_k: int | None = None      # keep the k most probable tokens
    top_p: float = 1.0            # keep the fewest tokens that hold this probability


@dataclass
class Rollout:
    """Drawn texts. Every field is (N, T) or (N, T, n_embd); past a text's end entries mean nothing."""
    tokens: torch.Tensor          # y_t
    mask: torch.Tensor            # True up to and including the end-of-text token
    kl: torch.Tensor              # KL(p_u || p), nats, at the decoding's temperature and support
    logp: torch.Tensor            # log p(y_t) under the uncontrolled model at temperature 1, nats
    logq: torch.Tensor            # log p_u(y_t), that of the draw: controlled, at the decoding's temperature
    before: torch.Tensor          # V(h_t)
    after: torch.Tensor           # E[Q(h_t, y)] of value.py, y ~ p_u: V(h_t) + dA/dx . std (E_u[W] - E_0[W])
    hidden: torch.Tensor          # h_t, or h_t + u_t where u_t is an excitation; in the model's dtype
    psi: torch.Tensor             # W[y_t] - E[W] under p_u, likewise; both empty unless recorded
    earned: torch.Tensor          # reward of the text before y_t; 0 until it is scored (sample.roll_out)

    def pick(self, rows):
        """The texts of these rows."""
        return Rollout(*(column[rows] for column in vars(self).values()))

    def few(self, texts=64):
        """The rows of all texts, a few at a time: what is made of states need not fit in memory at once."""
        return torch.arange(len(self.mask)).split(texts)

    def states(self, rows):
        """hidden (B, T, n_embd) of these rows."""
        return self.hidden[rows]

    def draws(self, rows):
        """hidden and psi of these rows, both (B, T, n_embd)."""
        return self.hidden[rows], self.psi[rows]


class Sampler:
    """
    A batch of texts of one shape; buffers and, on a GPU, the graphs are made once and used again. A graph
    holds the numbers of its control as they were: for another step size, another Sampler.

    `size` bounds a text's tokens, the prompt's included, `n_tokens` those drawn; `record` and `report` are
    generate's. The model's GPU has to be the current one (torch.cuda.set_device).
    """

    grain = 64      # a graph's shapes are fixed: there is one for each so many slots of the cache attended to
    stream = None   # where graphs are warmed up and captured: one for all, as cuBLAS keeps memory for each

    def __init__(self, model, batch, size, n_tokens, decoding, control=None, record=False, report=True):
        W, n_embd = model.wte.weight, model.config.n_embd
        device = W.device
        self.model, self.decoding, self.control = model, decoding, control
        self.record, self.report, self.pushes = record, report, None
        if type(control) is Controller and not control.excitation:        # a subclass finds u its own way
            Q, self.R = span(control.value)
            if len(self.R) < n_embd:                           # u = e @ directions, so W u = pushes e:
                self.directions = control.value.std * Q.T      # a product of V's width, not of n_embd
                self.pushes = W @ self.directions.T.to(W.dtype)                   # (n_vocab, k)
        self.cache = Cache(model, batch, size)
        # Made once: on a CPU the page faults of a fresh (B, n_vocab) cost more than the passes over it. With
        # nothing to report, the controlled logits and probs are written over the logits.
        buffers = torch.empty(4 if report else 2, batch, model.config.n_vocab, device=device)
        self.delta, self.logits = buffers[:2]
        self.moved, self.probs = buffers[2:] if report else (self.logits, self.logits)
        self.hidden = torch.zeros(batch, n_embd, dtype=W.dtype, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(batch, n_tokens, device=device)
        kl, logp, logq, before, after, earned = torch.zeros(6, batch, n_tokens, device=device)
        hidden, psi = self.hidden.new_zeros(2, batch, n_tokens if record else 0, n_embd)
        self.out = Rollout(kl.long(), kl.bool(), kl, logp, logq, before, after, hidden, psi, earned)
        captured = device.type == "cuda" and not getattr(control, "eager", False)
        self.graphs = {} if captured else None                 # {span: graph}; None: every step eager
        if captured:
            self.pool = torch.cuda.graph_pool_handle()
            Sampler.stream = Sampler.stream or torch.cuda.Stream()

    def step(self):
        """h_t -> u_t -> y_t -> h_{t+1} for every row, all on the device."""
        model, h, t = self.model, self.hidden, self.t
        logits = model.unembed(h, self.logits)                           # (B, n_embd) -> (B, n_vocab)
        kept = truncate(logits, self.decoding)
        u, delta = self.steer(h, kept)
        moved = kept if delta is None else torch.add(kept, delta, out=self.moved)
        probs = torch.softmax(moved, -1, out=self.probs)
        greedy = self.decoding.temperature == 0
        token = probs.argmax(-1) if greedy else draw(probs, self.uniforms.index_select(1, t))
        token = token.masked_fill(~self.alive, model.config.eos_token_id)                           # (B,)
        self.write(t, tokens=token, mask=self.alive, logq=probs.gather(1, token[:, None])[:, 0].log())
        if self.record:
            W = model.wte.weight
            mean = probs.to(W.dtype) @ W                                 # (B, n_vocab) -> (B, n_embd)
            excited = getattr(self.control, "excitation", 0) > 0
            self.write(t, hidden=(h + u).to(h.dtype) if excited else h, psi=model.wte(token) - mean)
        if self.report:
            self.measure(h, token, logits, kept, delta)
        self.alive.logical_and_(token != model.config.eos_token_id)
        self.hidden.copy_(model(token[:, None], self.cache)[:, 0])
        t.add_(1)

    def measure(self, h, token, logits, kept, delta):
        """
        Write log p(y_t) and, of a control, KL = E_q[delta] - log E_p[exp(delta)] and the values. Memory of
        this size is slow to get: `probs`, first q, becomes q - p, `moved` p, and `delta` the worths.
        """
        q, p = self.probs, self.moved
        if self.control is None:
            log_z = log_normaliser(kept, q)
        else:
            log_z_q = log_normaliser(self.moved, q)
            kl = torch.mul(q, delta, out=p).sum(-1) - log_z_q
            log_z = log_normaliser(kept, torch.softmax(kept, -1, out=p))
            value = self.control.value(h)
            rise = self.worth(h, delta, out=delta).mul_(q.sub_(p)).sum(-1)
            self.write(self.t, kl=kl + log_z, before=value, after=value + rise)
        if kept is not logits:
            log_z = log_normaliser(logits, torch.softmax(logits, -1, out=q))
        self.write(self.t, logp=logits.gather(1, token[:, None])[:, 0] - log_z)

    def worth(self, h, delta, out=None):
        """h (B, n_embd) -> the worth of drawing each token, dA/dx . std W[y] + constant (B, n_vocab)"""
        if isinstance(self.control, Guided):
            return torch.div(delta, self.control.step_size or 1.0, out=out)
        value, climbed = self.control.value, self.control.value.climbed
        if self.pushes is None:
            return self.model.unembed(value.std * climbed.gradient(h), out)
        return product(climbed.slope(climbed.preactivation(h)) @ self.R.T, self.pushes, out)

    def steer(self, h, kept):
        """h (B, n_embd), kept logits (B, n_vocab) -> u (B, n_embd), what it adds to the logits; or None."""
        if self.control is None:
            return None, None
        if isinstance(self.control, Guided):
            return 0.0, self.control(self.model, self.cache, h, kept)
        if self.pushes is None:
            u = self.control(h)
            delta = self.model.unembed(u, self.delta)                    # a product of its own: h + u would
        else:                                                            # round u away
            e = self.control.climb(h, self.R)                            # (B, k)
            u, delta = e @ self.directions, product(e, self.pushes, self.delta)
        if self.decoding.temperature not in (0, 1):
            delta /= self.decoding.temperature
        if self.control.target < math.inf:
            sign = 1 if self.control.step_size > 0 else -1
            rise = sign * (self.control.target - self.control.value(h))
            scale = target_ball(kept, delta, sign * self.worth(h, delta), rise)[:, None]
            u, delta = scale * u, delta.mul_(scale)
        if self.control.max_kl < math.inf:
            scale = kl_ball(kept, delta, self.control.max_kl)[:, None]
            u, delta = scale * u, delta.mul_(scale)
        return u, delta

    def write(self, t, **columns):
        for name, column in columns.items():
            getattr(self.out, name).index_copy_(1, t, column[:, None])

    def begin(self, prompts, uniforms):
        """Forget the last texts, read the prompts [[token, ..], ..] and stand at their last state."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(padded, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        device = self.hidden.device
        self.cache.clear()
        for buffer in (self.t, *vars(self.out).values()):
            buffer.zero_()
        unread = [] if self.report else [self.out.kl, self.out.logp]
        for values in (self.out.before, self.out.after, *unread):
            values.fill_(math.nan)                             # V is not read unless there is a control
        self.alive.fill_(True)
        self.uniforms.copy_(uniforms)
        lengths = lengths.to(device)
        hidden = self.model(padded.to(device), self.cache, lengths)               # (B, T, n_embd)
        self.hidden.copy_(hidden[torch.arange(len(prompts), device=device), lengths - 1])
        if device.type == "cpu":
            give_back()                                        # reading them took more than a step does

    def advance(self):
        """One step: on a GPU the replay of the graph that attends to the fewest slots that are enough."""
        if self.graphs is None:
            return self.step()
        live = self.cache.span + 1                             # slots in use once the new token is there
        span = min(-(-live // self.grain) * self.grain, self.cache.size)
        if span not in self.graphs:
            self.graphs[span] = self.capture(span)
        self.graphs[span].replay()
        self.cache.span = live

    def capture(self, span):
        """
        The step over `span` slots as a CUDA graph: warmed up on a side stream, recorded, not yet run.

        What a step reads and changes is put back after each warm-up; what it only writes, the true step
        writes again. Every buffer is older than the graph: its memory pool, one for all graphs, holds what
        lives within a step.
        """
        def step():
            self.cache.span = span - 1                         # the model adds the new token
            self.step()

        state = (self.t, self.alive, self.hidden, self.cache.lengths)
        saved = [buffer.clone() for buffer in state]
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                step()
                for buffer, was in zip(state, saved):
                    buffer.copy_(was)
        torch.cuda.current_stream().wait_stream(self.stream)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            step()
        return graph

    def run(self, prompts, uniforms, watch=None):
        """
        Draw the texts -> the sampler's own Rollout, which the next run writes over. `watch(tokens)` sees each
        column of tokens as it is drawn.
        """
        self.begin(prompts, uniforms)
        for t in range(uniforms.size(1)):
            self.advance()
            if watch:
                watch(self.out.tokens[:, t])
            if (watch or t % 16 == 15) and not self.alive.any():
                break
        return self.out


def truncate(logits, decoding):
    """logits (B, n_vocab) -> at the temperature, with -inf outside the top-k and top-p tokens."""
    if decoding.temperature not in (0, 1):
        logits = logits / decoding.temperature
    if decoding.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(decoding.top_k).values[:, -1:], -torch.inf)
    if decoding.top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= decoding.top_p            # the tokens before hold top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits


def log_prob(logits, token):
    """logits (B, n_vocab), token (B,) -> log softmax(logits)[token] (B,), nats"""
    return logits.log_softmax(-1).gather(1, token[:, None])[:, 0]


def draw(probs, uniform, block=256):
    """
    probs (B, n_vocab), uniform (B, 1) in [0, 1) -> tokens (B,), the inverse CDF at each uniform.

    In two levels, since a CDF of the whole vocabulary costs more than all else after the head: first the
    block of so many tokens, then the token in it. Both CDFs rise, summed in float64 and on a CPU in order (a
    GPU's parallel sum may dip by 1e-16). The uniform is below 1, and what is left of it inside the block is
    kept below the block's total: never a token without probability, none past the last probable one.
    """
    n_vocab, n = probs.size(1), probs.size(1) // block                            # n whole blocks, a rest
    sums = torch.cat([probs[:, :n * block].unflatten(1, (n, block)).sum(-1),
                      probs[:, n * block:].sum(-1, keepdim=True)], 1)             # (B, n + 1)
    cdf = F.pad(sums, (1, 0)).cumsum(-1, dtype=torch.float64)                     # (B, n + 2), 0 first
    target = uniform.double() * cdf[:, -1:]
    chosen = torch.searchsorted(cdf[:, 1:].contiguous(), target, right=True)      # (B, 1)
    tokens = chosen * block + torch.arange(block, device=probs.device)            # (B, block)
    inside = probs.gather(1, tokens.clamp(max=n_vocab - 1)) * (tokens < n_vocab)
    inside = inside.cumsum(-1, dtype=torch.float64)
    rest = torch.minimum(target - cdf.gather(1, chosen), inside[:, -1:] * (1 - 2.0 ** -40))
    return (chosen * block + torch.searchsorted(inside, rest, right=True))[:, 0]


def uniform_table(samples, n_tokens, seed):
    """(samples, n_tokens) uniforms in [0, 1), on the CPU whatever the device of the model."""
    return torch.rand(samples, n_tokens, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(model, prompts, uniforms, decoding=None, control=None, record=False, report=True, batch=256,
             watch=None, progress=None):
    """
    prompts [[token, ..], ..], one a sample, and uniforms (N, T) -> a Rollout of N texts.

    `record` keeps states and psi for training; `report` measures kl, logp, before and after, a few passes
    over the vocabulary: without it they are NaN. Done in batches of `batch` texts. InputError if a text
    would be longer than the model's context.
    """
    decoding, (samples, n_tokens) = decoding or Decoding(), uniforms.shape
    if not 0 < len(prompts) == samples:
        raise ValueError(f"{len(prompts)} prompts and {samples} rows of uniforms")
    longest = max(map(len, prompts))
    if longest + n_tokens > model.config.n_positions:
        raise InputError(f"a prompt of {longest} tokens and {n_tokens} more go past the model's context of "
                         f"{model.config.n_positions}; shorten the prompt or --tokens")
    whole, sampler = None, None
    for start in range(0, samples, batch):
        rows = slice(start, min(start + batch, samples))
        if sampler is None or len(sampler.alive) != rows.stop - rows.start:
            sampler = drawn = None                             # its memory first
            sampler = Sampler(model, rows.stop - rows.start, longest + n_tokens, n_tokens, decoding,
                              control, record, report)
        drawn = vars(sampler.run(prompts[rows], uniforms[rows], watch))
        whole = whole or Rollout(*(part.new_empty(samples, *part.shape[1:]) for part in drawn.values()))
        for name, part in drawn.items():
            getattr(whole, name)[rows] = part
        if progress:
            progress(rows.stop, samples)
    return whole


# --------------------------------------------------------------------------- other methods, budgets

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
        """hidden (B, n_embd), logits (B, n_vocab) and the cache before the draw -> what to add to them."""
        _, tokens, gains = self.look_ahead(model, cache, hidden, logits)
        return torch.zeros_like(logits).scatter(1, tokens, self.step_size * gains)

    def look_ahead(self, model, cache, hidden, logits):
        """-> the candidates' logits, the candidates, V(h_{t+1}) - V(h_t) of each, all (B, candidates)."""
        best, tokens = logits.topk(self.candidates)
        gains, span, now = torch.zeros_like(best), cache.span, self.value(hidden)
        for i in range(self.candidates):
            gains[:, i] = self.value(model(tokens[:, i:i + 1], cache)[:, 0]) - now
            cache.lengths -= 1                                 # taken back; its slot is written again
            cache.span = span
        return best, tokens, gains * (tokens != model.config.eos_token_id)         # no state follows an end


def pick_best(scores, n):
    """scores (n * N,), candidate j of text i in row j * N + i -> rows (N,) of the best candidates."""
    texts = len(scores) // n
    return scores.view(n, texts).argmax(0) * texts + torch.arange(texts, device=scores.device)


def best_of_kl(scores, n):
    """
    KL of the best of n from one, nats a text: sum over the levels c of P_n(c) log(P_n(c) / P(c)).

    P(c) is a level's share of the scores; without ties this is log n - (n - 1) / n.
    """
    levels, counts = scores.unique(return_counts=True)
    if len(levels) > len(scores) / 2:                          # no ties to speak of
        return math.log(n) - (n - 1) / n
    below = F.pad(counts.double().cumsum(0) / len(scores), (1, 0))                 # P(score <= c), 0 first
    p, p_n = below.diff(), (below ** n).diff()
    return (p_n * (p_n / p).log()).sum().item()


@torch.no_grad()
def drawn_from(model, prompts, tokens, batch=4096):
    """
    prompts [[token, ..], ..] and what was drawn after them, tokens (N, T) -> hidden (N, T, n_embd), the state
    before each draw, without control: one causal pass over the whole texts, of so many tokens at a time.
    """
    texts = [torch.tensor(prompt + row) for prompt, row in zip(prompts, tokens.tolist())]
    texts = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(tokens.device)
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    places, few = starts + torch.arange(tokens.size(1)), batch // texts.size(1) + 1          # (N, T)
    return torch.cat([model(part)[torch.arange(len(part))[:, None], at]
                      for part, at in zip(texts.split(few), places.split(few))])


class Reread(Rollout):
    """
    A Rollout recorded without its states: wherever they are asked for, the tokens are read again. `control`
    is the one they were drawn under, without max_kl, target or excitation; there is no `pick`.
    """

    def __init__(self, rollout, model, prompts, control=None):
        super().__init__(**vars(rollout))
        self.model, self.prompts, self.control = model, prompts, control

    def states(self, rows):
        """hidden (B, T, n_embd) of these rows."""
        return drawn_from(self.model, [self.prompts[i] for i in rows.tolist()], self.tokens[rows])

    @torch.no_grad()
    def draws(self, rows, batch=256):
        """hidden and psi of these rows, both (B, T, n_embd), the head on so many states at a time."""
        hidden, W, psi = self.states(rows), self.model.wte.weight, []
        for h, token in zip(hidden.flatten(0, 1).split(batch), self.tokens[rows].flatten().split(batch)):
            logits = self.model.unembed(h)                     # (batch, n_vocab)
            if self.control is not None:
                logits += self.model.unembed(self.control(h))
            psi.append(self.model.wte(token) - logits.softmax(-1).to(W.dtype) @ W)
        return hidden, torch.cat(psi).view_as(hidden)


@torch.no_grad()
def teacher_force(model, prompts, rollout, batch=32):
    """log p(y_t) (N, T), nats, of the drawn tokens after these prompts [[token, ..], ..], no control."""
    logp = torch.zeros_like(rollout.logp)
    for rows in rollout.few(batch):
        tokens = rollout.tokens[rows]                                             # (B, T)
        hidden = drawn_from(model, [prompts[i] for i in rows.tolist()], tokens)
        logits = model.unembed(hidden.flatten(0, 1))                              # (B * T, n_vocab)
        logp[rows] = log_prob(logits, tokens.flatten()).view_as(tokens)
    return logp


@torch.no_grad()
def step_for_kl(model, control, rollout, nats, states=1024):
    """
    The step_size at which `control` costs `nats` a text on the states of an uncontrolled rollout.

    A search on the exact KL, averaged over so many of the states, times the tokens a text has: rare
    tokens, which drawn texts hardly show, count in full. What control changes of later states does not.
    InputError if no step costs so much.
    """
    real, length = rollout.mask.nonzero().cpu(), rollout.mask.sum().item() / len(rollout.mask)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    chosen = real[order[:states]]                              # (states, 2): row and t
    hidden = [rollout.states(part[:, 0])[torch.arange(len(part)), part[:, 1]] for part in chosen.split(64)]
    log_p = [model.unembed(h).log_softmax(-1) for h in hidden]             # each (<= 64, n_vocab)

    def cost(step_size):
        """KL of a step of that size, nats a text."""
        sized, total = replace(control, step_size=step_size), 0.0
        for h, log_p_h in zip(hidden, log_p):
            log_q = (log_p_h + model.unembed(sized(h))).log_softmax(-1)
            total += kl_divergence(log_q, log_p_h).sum().item()
        return total / len(chosen) * length
    return dial_for(cost, nats)


def dial_for(cost, nats):
    """
    The dial > 0 at which a rising cost(dial) is `nats`, to a thousandth: cost grows about as the dial's
    square, so the next guess is dial * sqrt(nats / cost), inside a bracket that keeps it safe. After ten
    guesses, of a cost that levels off or jumps, the bracket alone is trusted. InputError if there is none.
    """
    low, high, dial, guesses = 0.0, math.inf, 1.0, 10
    while high > low * (1 + 1e-6):
        spent = cost(dial)
        if abs(spent - nats) < 0.001 * nats:
            break
        low, high, guesses = (dial, high, guesses - 1) if spent < nats else (low, dial, guesses - 1)
        if low > 2 ** 30 or not math.isfinite(spent):
            raise InputError(f"no control costs {nats} nats a text: V is flat or the radius too small; "
                             f"choose fewer --nats, or a reward that varies more")
        guess = dial * min(max(nats / max(spent, 1e-30), 1e-3), 1e3) ** 0.5
        dial = guess if guesses > 0 and low < guess < high else min((low + high) / 2, 2 * dial)
    return dial
