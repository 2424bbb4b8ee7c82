"""
Control: before each draw, push the hidden state along g, inside a ball; and the loop that samples.

    u <- P(u + step_size g(h + u)),  from u = 0         g(h) = value.gradient(h), see value.py
    y ~ softmax(W (h + u))                              P: u beyond the ball is scaled back onto it

p = softmax(W h) is the model's distribution of the next token, p_u = softmax(W (h + u)) that under
control: log_p and log_q in code. KL(p_u || p) is the price of control, in nats.

What `generate` computes, for one text. The rest of this file is the same, batched and cached:

    tokens = prompt
    for uniform in uniforms:
        h = model(torch.tensor([tokens]))[:, -1]                    # the last hidden state, (1, n_embd)
        p_u = model.unembed(h + controller(h)).softmax(-1)[0]       # softmax(W (h + u))
        y = int((p_u.double().cumsum(0) <= uniform).sum())          # the first that exceeds it
        tokens = tokens + [y]
        if y in model.config.eos_ids:
            break

Source: Kong et al. 2024 (arXiv 2406.05954). The main differences from the paper:
    1. g is learned from the draws (value.py). The paper differentiates V.
    2. Control takes one step, of the size that costs a chosen number of nats (step_for_kl). The
       paper takes many small steps, and their number limits u.
    3. The ball. On request there is also a limit on the nats of each token (kl_ball).
    4. Only the hidden state of the next draw is controlled, not those of the prompt.

The uniform numbers come from one fixed table, whatever the control. So a text without control and
one with it form a pair. Limitations: control looks at the next draw only; what comes
later has to be in g. Rounding may change a drawn token, in bfloat16 above all.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import Cache, InputError, check_length

# The most |u|, in units of a hidden state's typical distance from the mean: it stops only an overdose.
RADIUS = 10.0

def ascend(value, hidden, steps=1, step_size=1.0, radius=RADIUS):
    """
    hidden (B, n_embd) -> u (B, n_embd), float32: projected gradient ascent from u = 0.
    The ball is ||u / std|| <= radius sqrt(n_embd). A negative step_size descends.
    """
    u = torch.zeros_like(hidden, dtype=torch.float32)
    longest = radius * math.sqrt(u.size(-1))
    for _ in range(steps):
        u = u + step_size * value.gradient(hidden + u)
        length = (u / value.std).norm(dim=-1, keepdim=True)                     # (B, 1)
        u = u * (longest / length).clamp(max=1)                                 # back onto the ball
    return u

def kl_divergence(log_q, log_p):
    """KL(q || p) in nats: log-probabilities (.., n_vocab) -> (..)"""
    return (log_q.exp() * (log_q - log_p)).sum(-1)

def kl_ball(logits, delta, max_kl, iterations=8):
    """
    logits, delta (B, n_vocab) -> scale (B,), nearly the largest s in [0, 1] with
    KL(softmax(logits + s delta) || softmax(logits)) <= max_kl: never above, seldom 2% below.
    Var_s is the variance of delta under softmax(logits + s delta). KL(s) starts as s^2 Var_0 / 2
    and its slope is s Var_s. So sqrt(KL(s)) is nearly a line, and Newton's method, held inside a
    bracket, solves sqrt(KL(s)) = sqrt(0.99 max_kl), in a fixed number of steps.
    """
    def variance(probs):
        mean = (probs * delta).sum(-1, keepdim=True)
        return (probs * (delta - mean) ** 2).sum(-1).clamp(min=1e-12)

    target = math.sqrt(0.99 * max_kl)
    log_p = logits.log_softmax(-1)
    s = (target * (2 / variance(log_p.exp())).sqrt()).clamp(max=1)              # (B,)
    low = torch.zeros_like(s)
    high = torch.ones_like(s)
    for _ in range(iterations):
        log_q = (log_p + s[:, None] * delta).log_softmax(-1)
        root = kl_divergence(log_q, log_p).clamp(min=1e-12).sqrt()
        inside = root ** 2 <= max_kl
        low = torch.where(inside, s, low)
        high = torch.where(inside, high, s)
        slope = s * variance(log_q.exp()) / (2 * root)                          # of sqrt(KL)
        newton = (s - (root - target) / slope).clamp(max=1)
        bracketed = (newton > low) & (newton <= high)
        s = torch.where(bracketed, newton, (low + high) / 2)
    return low

def nucleus(logits, top_p):
    """
    logits (B, n_vocab) -> the same without the tail: the likeliest tokens stay, until they hold
    top_p of the probability together. The others get -1e9: no probability, and no nan in a KL.
    """
    p, order = logits.softmax(-1).sort(-1, descending=True)
    likelier = p.cumsum(-1) - p                             # probability of all likelier tokens
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier < top_p)
    return logits.masked_fill(~kept, -1e9)

def draw(probs, uniform, block=256):
    """
    probs (B, n_vocab), uniform (B, 1) in [0, 1) -> tokens (B,): the first whose cumulative
    probability exceeds uniform times the total. No token without probability is drawn.
    In two levels: first the block of `block` tokens, then the token in it. Sums are float64. What
    is left of the target inside the block is kept below the block's sum, whatever rounding does.
    """
    padded = F.pad(probs, (0, -probs.size(1) % block))                          # (B, n * block)
    blocks = padded.unflatten(1, (-1, block))                                   # (B, n, block)
    sums = blocks.sum(-1, dtype=torch.float64)                                  # (B, n)
    cdf = sums.cumsum(-1)
    target = uniform.double() * cdf[:, -1:]                                     # (B, 1)
    chosen = torch.searchsorted(cdf, target, right=True)                        # (B, 1)
    before = (cdf - sums).gather(1, chosen)
    rest = (target - before).clamp(min=0)
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block))[:, 0]   # (B, block)
    inside = inside.cumsum(-1, dtype=torch.float64)
    rest = torch.minimum(rest, inside[:, -1:] * (1 - 2.0 ** -40))
    return chosen[:, 0] * block + torch.searchsorted(inside, rest, right=True)[:, 0]

def controlled_log_probs(model, hidden, controller=None, temperature=1.0, top_p=1.0, max_kl=math.inf):
    """
    hidden (B, n_embd) -> log p and log p_u (B, n_vocab), without and with control.
    top_p cuts p to its nucleus before control. max_kl is the most that control may cost, in nats.
    """
    if controller is None:
        logits, delta = model.unembed(hidden), None
    else:
        # W h and W u are computed apart, since in bfloat16 h + u would lose a small u.
        logits, delta = model.unembed(torch.stack([hidden, controller(hidden)]))    # (B, n_vocab)
        delta = delta / temperature
    logits = logits / temperature
    if top_p < 1:
        logits = nucleus(logits, top_p)
    log_p = logits.log_softmax(-1)
    if controller is None:
        return log_p, log_p
    if max_kl < math.inf:
        delta = delta * kl_ball(logits, delta, max_kl)[:, None]
    return log_p, (logits + delta).log_softmax(-1)

def grad_log_p(W, token, probs):
    """token (B,), drawn from probs (B, n_vocab) = softmax(W (h + u)) -> W[token] - E_probs[W], the
    gradient of log probs[token] in u (B, n_embd)"""
    return W[token] - probs.to(W.dtype) @ W

# --------------------------------------------------------------------------------- the closed loop

@dataclass
class Rollout:
    """N drawn texts. After a text's end the fields mean nothing."""
    tokens: torch.Tensor          # y_t (N, T)
    mask: torch.Tensor            # (N, T), True up to and including the token that ends the text
    kl: torch.Tensor              # KL(p_u || p) (N, T) at the draw of y_t, nats
    log_p: torch.Tensor           # log p(y_t) (N, T), without control, nats
    log_q: torch.Tensor           # log p_u(y_t) (N, T), nats
    hidden: torch.Tensor          # h_t (N, T, n_embd) in the model's dtype; (N, 0, n_embd) if not kept
    grad_log_p: torch.Tensor      # W[y_t] - E_{p_u}[W], of the same shape; without control p_u = p

    @classmethod
    def empty(cls, N, T, n_embd, weight, record):
        """Room for N texts; weight: a tensor of the model's dtype and device"""
        kept = T if record else 0
        return cls(tokens=weight.new_zeros(N, T, dtype=torch.long),
                   mask=weight.new_zeros(N, T, dtype=torch.bool),
                   kl=weight.new_zeros(N, T, dtype=torch.float32),
                   log_p=weight.new_zeros(N, T, dtype=torch.float32),
                   log_q=weight.new_zeros(N, T, dtype=torch.float32),
                   hidden=weight.new_zeros(N, kept, n_embd),
                   grad_log_p=weight.new_zeros(N, kept, n_embd))

    def drawn(self, i):
        """The tokens of text i, up to its end"""
        return self.tokens[i, self.mask[i]].tolist()

    def texts(self, tokenizer, prompts):
        """-> the N finished texts, each with its prompt"""
        return [readable(tokenizer, prompt + self.drawn(i)) for i, prompt in enumerate(prompts)]

    def beginnings(self, tokenizer, prompts, i):
        """Text i, with its prompt -> T + 1 texts: before y_0 was drawn, before y_1, .., finished"""
        drawn = self.drawn(i)
        return [readable(tokenizer, prompts[i] + drawn[:t]) for t in range(len(drawn) + 1)]

def readable(tokenizer, tokens):
    """The text that a reward reads; "a" if there is no word in it, because some rewards need one"""
    text = tokenizer.decode(tokens)
    return text if text.strip() else "a"

class Sampler:
    """
    A batch of texts, drawn side by side: `prefill`, then `step` for each token. On a GPU a step is
    recorded once as a CUDA graph, which then runs again without Python. So `step` reads nothing back
    from the device, and writes only to buffers that are made once.
    """
    def __init__(self, model, batch, size, n_tokens, record=False,
                 controller=None, temperature=1.0, top_p=1.0, max_kl=math.inf):
        weight, n_embd = model.wte.weight, model.config.n_embd
        self.model = model
        self.record = record
        self.settings = (controller, temperature, top_p, max_kl)
        self.eos_ids = torch.tensor(model.config.eos_ids, dtype=torch.long, device=weight.device)
        self.cache = Cache(model, batch, size)
        self.hidden = weight.new_zeros(batch, n_embd)
        self.alive = weight.new_zeros(batch, dtype=torch.bool)
        self.uniforms = weight.new_zeros(batch, n_tokens, dtype=torch.float32)
        self.t = weight.new_zeros(1, dtype=torch.long)
        self.out = Rollout.empty(batch, n_tokens, n_embd, weight, record)
        self.graphs = {}                                    # {number of the window: CUDA graph}
        self.pool = torch.cuda.graph_pool_handle() if weight.is_cuda else None

    def log_probs(self, hidden):
        """hidden (B, n_embd) -> log p, log p_u (B, n_vocab). A subclass may control otherwise."""
        return controlled_log_probs(self.model, hidden, *self.settings)

    def prefill(self, prompts, uniforms):
        """Read the prompts [[token, ..], ..] and set self.hidden to their last hidden states."""
        device = self.hidden.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)        # (B, T)
        self.uniforms.copy_(uniforms)
        self.alive.fill_(True)
        self.t.zero_()
        self.out.mask.zero_()
        self.cache.lengths.zero_()
        self.cache.used = 0
        hidden = self.model(tokens, self.cache, lengths)                        # (B, T, n_embd)
        self.hidden.copy_(hidden[torch.arange(len(rows), device=device), lengths - 1])

    def step(self):
        """h_t -> u_t -> y_t, and the text with y_t -> h_{t+1}, for every row"""
        W, out, t = self.model.wte.weight, self.out, self.t
        log_p, log_q = self.log_probs(self.hidden)                              # (B, n_vocab)
        probs = log_q.exp()
        token = draw(probs, self.uniforms.index_select(1, t))                   # (B,)
        out.tokens.index_copy_(1, t, token[:, None])
        out.mask.index_copy_(1, t, self.alive[:, None])
        out.kl.index_copy_(1, t, (probs * (log_q - log_p)).sum(-1, keepdim=True))
        out.log_p.index_copy_(1, t, log_p.gather(1, token[:, None]))
        out.log_q.index_copy_(1, t, log_q.gather(1, token[:, None]))
        if self.record:
            out.hidden.index_copy_(1, t, self.hidden[:, None])
            out.grad_log_p.index_copy_(1, t, grad_log_p(W, token, probs)[:, None])
        self.alive &= (token[:, None] != self.eos_ids).all(-1)
        self.hidden.copy_(self.model(token[:, None], self.cache)[:, 0])
        self.t += 1                                         # in place, as all the others

    def step_or_replay(self):
        """A step. On a GPU the first of each window is run, then recorded; later ones replay it."""
        window = self.cache.used // Cache.WINDOW
        if window in self.graphs:
            self.graphs[window].replay()
            self.cache.used += 1
            return
        self.step()
        if self.hidden.is_cuda:
            self.cache.used -= 1                            # recording runs nothing, but counts
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step()
            self.graphs[window] = graph

    def run(self, prompts, uniforms):
        """-> the sampler's own Rollout, which the next run writes over"""
        self.prefill(prompts, uniforms)
        for t in range(uniforms.size(1)):
            if t % 16 == 0 and not self.alive.any():        # waits for the device: not every time
                break
            self.step_or_replay()
        return self.out

def uniform_table(samples, n_tokens, seed):
    """(samples, n_tokens) uniforms in [0, 1); a row depends on the seed and its number alone"""
    rows = [np.random.default_rng([seed, i]).random(n_tokens, np.float32) for i in range(samples)]
    return torch.from_numpy(np.stack(rows))

@torch.no_grad()
def generate(model, prompts, uniforms, controller=None, temperature=1.0, top_p=1.0, max_kl=math.inf,
             record=False, batch=128, progress=None, make_sampler=Sampler):
    """
    N prompts [[token, ..], ..] and uniforms (N, T) -> a Rollout of N texts of at most T tokens.
    controller: hidden (B, n_embd) -> u (B, n_embd), called once a token; None: u = 0. On a GPU its
    Python code runs only while a step is recorded: a counter or a list in it is not updated later.
    top_p and max_kl, in nats a token: see controlled_log_probs. `record` keeps the hidden states.
    `progress(done, N)` is called after each batch. make_sampler: Sampler or a subclass. InputError
    if a text would be longer than the model's context.
    """
    N, T = uniforms.shape
    check_length(model, prompts, T)
    batch = min(batch, N)
    sampler = make_sampler(model, batch, max(map(len, prompts)) + T, T, record,
                           controller, temperature, top_p, max_kl)
    whole = Rollout.empty(N, T, model.config.n_embd, model.wte.weight, record)
    for start in range(0, N, batch):
        rows = [i % N for i in range(start, start + batch)]          # the last batch is filled up
        part = sampler.run([prompts[i] for i in rows], uniforms[rows])
        stop = min(start + batch, N)
        for name, field in vars(whole).items():
            field[start:stop] = getattr(part, name)[:stop - start]
        if progress:
            progress(stop, N)
    return whole

@torch.no_grad()
def step_for_kl(model, controller_at, rollout, nats, n_states=512):
    """
    The step size > 0 at which controller_at(hidden, step_size) -> u costs `nats` a text, to 0.1%.
    The cost is the mean KL at n_states hidden states of the rollout, times the tokens of a text. It
    leaves out that control leads to other hidden states. InputError if no step costs so much.
    """
    hidden = rollout.hidden[rollout.mask]
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:n_states]
    hidden = hidden[chosen.to(hidden.device)]                                   # (n_states, n_embd)
    tokens = rollout.mask.sum(1).float().mean()
    low, high, size = 0.0, math.inf, 1.0
    for i in range(50):
        log_p, log_q = controlled_log_probs(model, hidden, lambda h: controller_at(h, size))
        spent = (kl_divergence(log_q, log_p).mean() * tokens).item()
        if abs(spent - nats) < 0.001 * nats:
            return size
        if spent < nats:
            low = size
        else:
            high = size
        # KL grows about as size^2. Outside the bracket, and every third time: towards its middle.
        size *= math.sqrt(nats / max(spent, 1e-30))
        if not low < size < high or i % 3 == 2:
            size = (low + min(high, 4 * low + 1e-6)) / 2
    raise InputError(f"control cannot cost {nats:g} nats a text: its direction is nearly 0, or the ball "
                     f"stops it; choose a reward that varies more, or more rollouts")
