"""
Answers to try the tests on (test_kit.py); never handed out. RIGHT: bodies that must pass, split by a
blank line. WRONG: what is written instead in the first of them, so that some test must fail.
"""
RIGHT = {}
WRONG = {}

# ----------------------------------------------------------------------------------- bellman_targets
RIGHT["targets"] = """
targets = torch.zeros_like(values)
next_value = torch.zeros_like(values[:, 0])
next_target = torch.zeros_like(values[:, 0])
for t in reversed(range(values.size(1))):
    target = rewards[:, t] + (1 - lam) * next_value + lam * next_target
    next_value = values[:, t] * mask[:, t]
    next_target = target * mask[:, t]
    targets[:, t] = next_target
return targets

B, T = values.shape
targets = values.new_zeros(B, T)
for b in range(B):
    last = int(mask[b].sum()) - 1
    targets[b, last] = rewards[b, last]
    for t in range(last - 1, -1, -1):
        targets[b, t] = rewards[b, t] + (1 - lam) * values[b, t + 1] + lam * targets[b, t + 1]
return targets

following = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros_like(values[:, :1])], 1)
targets = (rewards + (1 - lam) * following) * mask
for t in range(values.size(1) - 2, -1, -1):
    targets[:, t] += lam * targets[:, t + 1] * mask[:, t]
return targets

V, r = values.masked_fill(~mask, 0).double(), rewards.masked_fill(~mask, 0).double()
columns = [r[:, -1]]
for t in range(values.size(1) - 2, -1, -1):
    columns.insert(0, r[:, t] + (1 - lam) * V[:, t + 1] + lam * columns[0])
return torch.stack(columns, 1).to(values.dtype)

r, V, T = rewards * mask, values * mask, values.size(1)
steps = torch.arange(T)
ahead = (steps[None] - steps[:, None])
weight = torch.where(ahead >= 0, float(lam) ** ahead.clamp(min=0), 0.0)
direct = r + (1 - lam) * torch.nn.functional.pad(V, (0, 1))[:, 1:]
return (direct @ weight.T) * mask
"""
WRONG["targets"] = """
(1 - lam) * next_value + lam * next_target => lam * next_value + (1 - lam) * next_target
* next_value => * values[:, t]
values[:, t] * mask[:, t] => values[:, t]
rewards[:, t] => rewards[:, t - 1]
targets = torch.zeros_like(values) => targets = values
targets = torch.zeros_like(values) => targets = rewards
next_target = target * mask[:, t] => next_target = target
targets[:, t] = next_target => targets[:, t] = target
reversed(range(values.size(1))) => range(values.size(1))
rewards[:, t] + (1 => (1
(1 - lam) * next_value => next_value
+ lam * next_target =>
(1 - lam) * next_value + =>
(1 - lam) => lam
lam * next_target => lam ** 2 * next_target
range(values.size(1)) => range(values.size(1) - 1)
return targets => return targets[0]
return targets => return targets.clamp(0, 1)
return targets => return targets.tolist()
next_value = torch.zeros_like(values[:, 0]) => next_value = values[:, -1]
values[:, t] * mask[:, t] => values[:, t].clone(); values[:, t] = 0
rewards[:, t] + => rewards[:, t].clamp(min=0) +
"""

# ---------------------------------------------------------------------------------------- grad_log_p
RIGHT["grad_log_p"] = """
return W[token] - probs.to(W.dtype) @ W

mean = torch.einsum("bv,vd->bd", probs.to(W.dtype), W)
return torch.nn.functional.embedding(token, W) - mean

hot = torch.nn.functional.one_hot(token, len(W)).to(probs)
return ((hot - probs) @ W.to(probs.dtype)).to(W.dtype)

rows = []
for y, p in zip(token, probs):
    rows.append(W[y] - (p[:, None].to(W.dtype) * W).sum(0))
return torch.stack(rows)

u = torch.zeros(len(token), W.size(1), requires_grad=True)
with torch.enable_grad():
    log_p = (probs.clamp(min=1e-30).log() + u @ W.float().T).log_softmax(-1)
    slope, = torch.autograd.grad(log_p.gather(1, token[:, None]).sum(), u)
return slope.to(W.dtype)
"""
WRONG["grad_log_p"] = """
W[token] - => W[token] +
W[token] - probs.to(W.dtype) @ W => probs.to(W.dtype) @ W - W[token]
- probs.to(W.dtype) @ W =>
W[token] - probs.to(W.dtype) @ W => -(probs.to(W.dtype) @ W)
probs.to(W.dtype) @ W => W.mean(0)
probs.to(W.dtype) @ W => probs.log().to(W.dtype) @ W
probs.to(W.dtype) @ W => probs.softmax(-1).to(W.dtype) @ W
probs.to(W.dtype) @ W => W[probs.argmax(-1)]
probs.to(W.dtype) @ W => (probs.to(W.dtype) @ W).mean(0)
probs.to(W.dtype) @ W => probs.mean(0).to(W.dtype) @ W
W[token] => W[probs.argmax(-1)]
W[token] => probs.gather(1, token[:, None]).to(W.dtype) * W[token]
W[token] => W[token[0]]
probs.to(W.dtype) @ W => probs[:1].to(W.dtype) @ W
probs.to(W.dtype) @ W => probs @ W
probs.to(W.dtype) @ W => probs @ W.float()
W[token] - probs.to(W.dtype) @ W => (W[token] - probs.to(W.dtype) @ W).sum(0)
W[token] - probs.to(W.dtype) @ W => (W[token] - probs.to(W.dtype) @ W) / probs.gather(1, token[:, None])
W[token] - probs.to(W.dtype) @ W => (W - W.mean(0))[token] - probs.to(W.dtype) @ W
return W[token] - => W -= W.mean(0); return W[token] -
W[token] - probs.to(W.dtype) @ W => (1 - probs.gather(1, token[:, None])).to(W.dtype) * W[token]
W[token] - probs.to(W.dtype) @ W => (W[token] - probs.to(W.dtype) @ W).double()
"""

# --------------------------------------------------------------------------------------- bellman_loss
RIGHT["loss"] = """
V = value(hidden, so_far)
target = bellman_targets(V.detach(), rewards, mask, lam)
if draws is None:
    return (V - target).square()[mask].mean()
g = value.gradient(hidden)
Q = V + (g * draws).sum(-1)
loss = (Q - target).square() + RIDGE * g.square().sum(-1)
return loss[mask].mean()

V = value(hidden, so_far)
with torch.no_grad():
    target = bellman_targets(V, rewards, mask, lam)
Q, penalty = V, 0.0
if draws is not None:
    g = value.gradient(hidden)
    Q = V + torch.einsum("btd,btd->bt", g, draws)
    penalty = RIDGE * (g[mask] ** 2).sum(-1).mean()
return torch.nn.functional.mse_loss(Q[mask], target[mask]) + penalty

V = value(hidden, so_far)
error = V - bellman_targets(V.detach(), rewards, mask, lam)
ridge = torch.zeros_like(error)
if draws is not None:
    error = error + (value.gradient(hidden) * draws).sum(-1)
    ridge = RIDGE * value.gradient(hidden).norm(dim=-1) ** 2
return ((error ** 2 + ridge) * mask).sum() / mask.sum()

V = value(hidden, so_far)
target = bellman_targets(V.clone().detach(), rewards, mask, lam)
total = 0
for b, t in mask.nonzero().tolist():
    Q = V[b, t]
    if draws is not None:
        g = value.gradient(hidden)[b, t]
        Q = Q + g @ draws[b, t]
        total = total + RIDGE * g @ g
    total = total + (Q - target[b, t]) ** 2
return total / mask.sum()

values = value(hidden, so_far)
target = bellman_targets(values.data, rewards, mask, lam).detach()[mask]
if draws is None:
    return ((target - values[mask]) ** 2).mean()
g = value.gradient(hidden)[mask]
advantage = (g * draws[mask]).sum(1)
return ((target - values[mask] - advantage) ** 2 + RIDGE * (g * g).sum(1)).mean()
"""
WRONG["loss"] = """
+ RIDGE * g.square().sum(-1) =>
+ RIDGE * g.square() => - RIDGE * g.square()
RIDGE * g.square().sum(-1) => RIDGE * g.square().mean(-1)
RIDGE * g.square().sum(-1) => RIDGE * g.norm(dim=-1)
RIDGE * g.square().sum(-1) => RIDGE * g.abs().sum(-1)
RIDGE * g.square().sum(-1) => 0.1 * g.square().sum(-1)
RIDGE * g.square().sum(-1) => RIDGE * draws.square().sum(-1)
RIDGE * g.square().sum(-1) => RIDGE * V.square()
RIDGE * g.square().sum(-1) => RIDGE * (g * draws).sum(-1).square()
V + (g * draws).sum(-1) => V
V + (g * draws).sum(-1) => (g * draws).sum(-1)
V + (g * draws) => V - (g * draws)
(g * draws).sum(-1) => (g * draws).mean(-1)
(Q - target).square() => (Q - target).abs()
loss[mask].mean() => loss.mean()
loss[mask].mean() => loss[mask].sum()
loss[mask].mean() => (loss * mask).mean()
value(hidden, so_far) => value(hidden, 0 * so_far)
mask, lam) => mask, 1.0)
.square()[mask].mean() => .square().mean()
Q = V + => Q = V.detach() +
g = value.gradient(hidden) => g = value.gradient(hidden).detach()
return loss[mask].mean() => return loss[mask].mean().item()
"""

# ------------------------------------------------------------------------------------ ValueNet.forward
RIGHT["forward"] = """
f = self.features(hidden).to(self.value_head.weight.dtype)
heads = self.value_head(f)
if not self.reads_so_far:
    return heads[..., 0]
return heads[..., 0] + heads[..., 1] * so_far

x = (hidden.float() - self.mean) / self.std
f = self.body(x)
head = self.value_head
V = f.to(head.weight.dtype) @ head.weight.T + head.bias
if self.reads_so_far:
    return V[..., 0] + V[..., 1] * so_far
return V[..., 0]

f = self.features(hidden).to(self.value_head.bias.dtype)
a = f @ self.value_head.weight[0] + self.value_head.bias[0]
if len(self.value_head.bias) == 1:
    return a
return torch.addcmul(a, f @ self.value_head.weight[1] + self.value_head.bias[1], so_far)

heads = self.value_head(self.features(hidden).type_as(self.value_head.weight)).unbind(-1)
return heads[0] + heads[1] * so_far if self.reads_so_far else heads[0]

f = self.features(hidden)
weight, bias = self.value_head.weight, self.value_head.bias
out = torch.nn.functional.linear(f.to(weight.dtype), weight, bias)
if not self.reads_so_far:
    return out.squeeze(-1)
inputs = torch.stack([torch.ones_like(so_far), so_far], -1)
return (out * inputs).sum(-1)
"""
WRONG["forward"] = """
heads[..., 1] * so_far => heads[..., 1]
+ heads[..., 1] * so_far =>
+ heads[..., 1] * so_far => - heads[..., 1] * so_far
heads[..., 0] + heads[..., 1] * so_far => heads[..., 1] + heads[..., 0] * so_far
heads[..., 1] * so_far => so_far
heads[..., 0] + heads[..., 1] * so_far => heads[..., 0] * so_far + heads[..., 1] * so_far
heads[..., 1] * so_far => (heads[..., 1] * so_far).sum()
self.features(hidden) => self.body(hidden.float())
self.features(hidden) => self.body(hidden.float() - self.mean)
self.features(hidden) => self.body((hidden.float() - self.mean) * self.std)
self.features(hidden) => self.features(hidden).relu()
self.features(hidden) => self.features(hidden).detach()
return heads[..., 0] + => return heads[..., :1] +
if not self.reads_so_far => if self.reads_so_far
.to(self.value_head.weight.dtype) =>
self.value_head(f) => self.value_head(f).float()
self.value_head(f) => self.value_head(f).tanh()
self.value_head(f) => self.value_head(f) - self.value_head.bias
* so_far => * so_far.clamp(0, 1)
* so_far => * so_far.detach()
heads[..., 1] * so_far => heads[..., 1].detach() * so_far
if not self.reads_so_far => if so_far is None
self.features(hidden) => self.body[0](hidden.float())
f = self.features => hidden -= self.mean.to(hidden); f = self.features
"""

# --------------------------------------------------------------------------------------------- ascend
RIGHT["ascend"] = """
u = torch.zeros_like(hidden, dtype=torch.float32)
for _ in range(steps):
    u = u + step_size * value.gradient(hidden + u)
    length = (u / value.std).norm(dim=-1, keepdim=True)
    longest = radius * math.sqrt(u.size(-1))
    u = u * (longest / length).clamp(max=1)
return u

u = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
for _ in range(steps):
    u = u + step_size * value.gradient(hidden + u).float()
    size = (u / value.std).square().mean(-1, keepdim=True).sqrt()
    u = torch.where(size > radius, u * radius / size, u)
return u

u = 0 * hidden.float()
for _ in range(steps):
    u = u.add(value.gradient(hidden.float() + u), alpha=step_size)
    if radius < float("inf"):
        x = u / value.std
        x = torch.renorm(x, 2, 0, radius * u.size(-1) ** 0.5)
        u = x * value.std
return u

h = hidden.float()
for _ in range(steps):
    h = h + step_size * value.gradient(h)
    u = h - hidden.float()
    ratio = (u / value.std).norm(dim=1) / (radius * u.size(1) ** 0.5)
    h = hidden.float() + u / ratio.clamp(min=1)[:, None]
return h - hidden.float()

rows = []
for h in hidden.float():
    u = torch.zeros_like(h)
    for _ in range(steps):
        u = u + step_size * value.gradient((h + u)[None])[0]
        length = (u / value.std).norm().item()
        if length > radius * len(u) ** 0.5:
            u = u * (radius * len(u) ** 0.5 / length)
    rows.append(u)
return torch.stack(rows)
"""
WRONG["ascend"] = """
hidden + u => hidden
u / value.std => u
u / value.std => u * value.std
u / value.std => u / value.std ** 2
step_size * => abs(step_size) *
step_size * => -step_size *
step_size * => step_size / steps *
.clamp(max=1) =>
.clamp(max=1) => .clamp(min=1)
* math.sqrt(u.size(-1)) =>
math.sqrt(u.size(-1)) => u.size(-1)
u = u + step_size * value => u = step_size * value
u = u + step_size => u = 2 * u + step_size
hidden + u => hidden - u
.norm(dim=-1, keepdim=True) => .norm()
.norm(dim=-1, keepdim=True) => .abs().amax(-1, keepdim=True)
.norm(dim=-1, keepdim=True) => .abs().sum(-1, keepdim=True)
u = u * (longest / length).clamp(max=1) => u = (u / value.std).clamp(-radius, radius) * value.std
u = u * (longest / length).clamp(max=1) => u = u * (longest / (length + 1e-6))
range(steps) => range(1)
range(steps) => range(steps + 1)
return u => return hidden + u
u = u + step_size * value.gradient(hidden + u) => hidden += step_size * value.gradient(hidden); u = u + step_size * value.gradient(hidden)
u = u * (longest / length).clamp(max=1) => u = u * (longest / length).clamp(max=1) if _ == steps - 1 else u
value.gradient(hidden + u) => torch.autograd.functional.jacobian(lambda h: value(h).sum(), hidden.float() + u)
longest / length => (u / value.std * longest / length).norm(dim=-1, keepdim=True) / length
"""

# -------------------------------------------------------------------------------------------- kl_ball
RIGHT["kl_ball"] = """
log_p = logits.log_softmax(-1)
low, high = torch.zeros_like(logits[:, 0]), torch.ones_like(logits[:, 0])
for _ in range(20):
    s = (low + high) / 2
    log_q = (log_p + s[:, None] * delta).log_softmax(-1)
    inside = (log_q.exp() * (log_q - log_p)).sum(-1) <= max_kl
    low = torch.where(inside, s, low)
    high = torch.where(inside, high, s)
return low

low, high = logits.new_zeros(len(logits)), logits.new_ones(len(logits))
log_p = logits.log_softmax(-1)
for _ in range(12):
    s = (low + high) / 2
    inside = kl_divergence((logits + s[:, None] * delta).log_softmax(-1), log_p) < max_kl
    low, high = torch.where(inside, s, low), torch.where(inside, high, s)
return low

log_p = logits.double().log_softmax(-1)
scales = torch.linspace(0, 1, 1001, dtype=torch.float64)
kl = torch.stack([kl_divergence((log_p + s * delta).log_softmax(-1), log_p) for s in scales])
last = (kl <= max_kl).int().cumprod(0).sum(0) - 1
first = scales[last]
fine = torch.linspace(0, 1e-3, 101, dtype=torch.float64)
kl = torch.stack([kl_divergence((log_p + (first + s)[:, None] * delta).log_softmax(-1), log_p)
                  for s in fine])
last = (kl <= max_kl).int().cumprod(0).sum(0) - 1
return (first + fine[last]).clamp(max=1).float()

found = []
for row, change in zip(logits, delta):
    low, high, log_p = 0.0, 1.0, row.log_softmax(-1)
    for _ in range(15):
        s = high if _ == 0 else (low + high) / 2
        log_q = (row + s * change).log_softmax(-1)
        if (log_q.exp() * (log_q - log_p)).sum() <= max_kl:
            low = s
        else:
            high = s
    found.append(low)
return torch.tensor(found)

p, s = logits.softmax(-1), torch.ones(len(logits))
low, high = torch.zeros_like(s), torch.ones_like(s)
for _ in range(30):
    tilted = s[:, None] * delta
    log_z = (logits + tilted).logsumexp(-1) - logits.logsumexp(-1)
    kl = ((logits + tilted).softmax(-1) * tilted).sum(-1) - log_z
    low, high = torch.where(kl <= max_kl, s, low), torch.where(kl <= max_kl, high, s)
    s = (low + high) / 2
return low
"""
WRONG["kl_ball"] = """
log_q.exp() * (log_q - log_p) => log_p.exp() * (log_p - log_q)
log_q.exp() * (log_q - log_p) => log_q.exp() * log_q
log_q.exp() * (log_q - log_p) => (log_q.exp() - log_p.exp()).abs()
log_q.exp() * (log_q - log_p) => (log_q - log_p) ** 2
<= max_kl => <= max_kl / 2
<= max_kl => <= 1.1 * max_kl
<= max_kl => >= max_kl
<= max_kl => <= max_kl ** 0.5
return low => return high + 0.01
return low => return 0 * low
return low => return low ** 0
return low => return low.mean().expand_as(low)
return low => return low[:, None]
return low => return low.min()
range(20) => range(3)
torch.ones_like(logits[:, 0]) => torch.ones_like(logits[:, 0]) * 10
torch.ones_like(logits[:, 0]) => torch.ones_like(logits[:, 0]) / 10
.sum(-1) => .mean(-1)
.sum(-1) => .sum()
log_p + s[:, None] * delta => s[:, None] * delta
log_p + s[:, None] * delta => log_p - s[:, None] * delta
(log_p + s[:, None] * delta).log_softmax(-1) => log_p + s[:, None] * delta
log_p = logits.log_softmax(-1) => log_p = logits
log_p = logits.log_softmax(-1) => logits -= logits.logsumexp(-1, True); log_p = logits.clone()
return low => return (max_kl / (log_p.exp() * delta ** 2).sum(-1).sqrt()).clamp(max=1)
"""

# ----------------------------------------------------------------------------------------------- draw
RIGHT["draw"] = """
cdf = probs.double().cumsum(-1)
target = uniform.double() * cdf[:, -1:]
return torch.searchsorted(cdf, target, right=True)[:, 0]

cdf = probs.cumsum(-1, dtype=torch.float64)
return (cdf <= uniform.double() * cdf[:, -1:]).sum(-1)

cdf = probs.double().cumsum(1)
above = cdf > uniform * cdf[:, -1:]
return above.int().argmax(1)

tokens = []
for p, x in zip(probs.double(), uniform.double()):
    cdf = p.cumsum(0)
    tokens.append(int((cdf > x * cdf[-1]).nonzero()[0]))
return torch.tensor(tokens)

padded = F.pad(probs, (0, -probs.size(1) % block)).double()
blocks = padded.unflatten(1, (-1, block))
cdf = blocks.sum(-1).cumsum(-1)
target = uniform.double() * cdf[:, -1:]
chosen = (cdf <= target).sum(-1)
rows = torch.arange(len(probs))
before = F.pad(cdf, (1, 0))[rows, chosen]
inside = blocks[rows, chosen].cumsum(-1) + before[:, None]
inner = torch.minimum(target[:, 0], inside[:, -1] * (1 - 1e-12))
return chosen * block + (inside <= inner[:, None]).sum(-1)
"""
WRONG["draw"] = """
probs.double().cumsum(-1) => probs.float().cumsum(-1)
uniform.double() => (1 - uniform.double())
uniform.double() * cdf[:, -1:] => uniform.double()
right=True => right=False
right=True)[:, 0] => right=True)
right=True)[:, 0] => right=True)[:, 0].int()
right=True)[:, 0] => right=True)[:, 0] + 1
right=True)[:, 0] => right=True)[:, 0].float()
right=True)[:, 0] => right=True)[:, 0] - 1
right=True)[:, 0] => right=True)[:1, 0].expand(len(probs))
return => return 0 *
probs.double().cumsum(-1) => probs.double().sort(-1, descending=True)[0].cumsum(-1)
probs.double().cumsum(-1) => probs.double().cumsum(0)
probs.double().cumsum(-1) => probs.double().flip(-1).cumsum(-1)
probs.double().cumsum(-1) => probs.double().softmax(-1).cumsum(-1)
probs.double().cumsum(-1) => probs.half().double().cumsum(-1)
torch.searchsorted(cdf, target, right=True)[:, 0] => probs.argmax(-1)
torch.searchsorted(cdf, target, right=True)[:, 0] => torch.multinomial(probs, 1)[:, 0]
uniform.double() * => torch.rand_like(uniform).double() *
uniform.double() * cdf[:, -1:] => uniform[:1].double() * cdf[:, -1:]
cdf[:, -1:] => cdf[:1, -1:]
right=True)[:, 0] => right=True)[:, 0].clamp(max=255)
cdf = => probs /= 3; cdf =
cdf[:, -1:] => (cdf[:, -1:] + 1e-3)
"""

# ------------------------------------------------------------------------------------------ whitening
RIGHT["whitening"] = """
drawn = grad_log_p.double()
tokens = W.double() - W.double().mean(0)
M = drawn.T @ drawn / len(drawn) + tokens.T @ tokens / len(tokens)
sizes, axes = torch.linalg.eigh(M)
sizes = sizes.clamp(min=1e-10 * sizes.max())
return (axes / sizes.sqrt() @ axes.T).float()

x, tokens = grad_log_p.double(), W.double()
M = x.T @ x / x.size(0) + torch.cov(tokens.T, correction=0)
sizes, axes = torch.linalg.eigh(M)
sizes = torch.maximum(sizes, 1e-10 * sizes[-1])
return axes @ torch.diag(sizes ** -0.5) @ axes.T

x, tokens = grad_log_p.double(), W.double() - W.double().mean(0, keepdim=True)
M = torch.einsum("ni,nj->ij", x, x) / len(x) + torch.einsum("ni,nj->ij", tokens, tokens) / len(W)
axes, sizes, _ = torch.linalg.svd(M)
sizes = sizes.clamp(min=1e-10 * float(sizes[0]))
return ((axes * sizes.rsqrt()) @ axes.T).float()

both = torch.cat([grad_log_p.double() / len(grad_log_p) ** 0.5,
                  (W.double() - W.double().mean(0)) / len(W) ** 0.5])
_, root, axes = torch.linalg.svd(both, full_matrices=False)
root = root.clamp(min=1e-5 * root[0])
return (axes.T / root @ axes).float()

x, w = grad_log_p.detach().double(), W.detach().double()
second = (x[:, :, None] * x[:, None, :]).mean(0)
variance = (w[:, :, None] * w[:, None, :]).mean(0) - torch.outer(w.mean(0), w.mean(0))
sizes, axes = torch.linalg.eigh(second + variance)
small = sizes < sizes.max() * 1e-10
sizes = torch.where(small, sizes.max() * 1e-10, sizes)
return (axes / sizes.sqrt() @ axes.T).float()
"""
WRONG["whitening"] = """
W.double() - W.double().mean(0) => W.double()
drawn = grad_log_p.double() => drawn = grad_log_p.double() - grad_log_p.double().mean(0)
/ len(drawn) =>
/ len(drawn) => / len(tokens)
/ len(tokens) =>
/ len(tokens) => / (len(tokens) - 1)
sizes.sqrt() => sizes
axes / sizes.sqrt() => axes * sizes.sqrt()
.double() =>
sizes.clamp(min=1e-10 * sizes.max()) => sizes
1e-10 * sizes.max() => 1e-10
1e-10 * sizes.max() => 1e-3 * sizes.max()
1e-10 * sizes.max() => 1e-10 * sizes.mean()
@ axes.T => @ axes
(axes / sizes.sqrt() @ axes.T) => (axes / sizes.sqrt())
(axes / sizes.sqrt() @ axes.T) => (axes.T / sizes.sqrt() @ axes)
drawn.T @ drawn / len(drawn) + =>
+ tokens.T @ tokens / len(tokens) =>
(axes / sizes.sqrt() @ axes.T) => torch.linalg.cholesky(torch.linalg.inv(M + 1e-9 * torch.eye(len(M))))
(axes / sizes.sqrt() @ axes.T) => torch.diag(M.diag().clamp(min=1e-10).rsqrt())
tokens = W.double() - W.double().mean(0) => W -= W.mean(0); tokens = W.double()
return (axes => return -(axes
sizes = sizes.clamp(min=1e-10 * sizes.max()) => sizes = sizes + 1e-3 * sizes.max()
"""

# ---------------------------------------------------------------------------------------- Cache.store
RIGHT["store"] = """
self.keys[layer][self.rows, :, self.positions] = k.transpose(1, 2)
self.values[layer][self.rows, :, self.positions] = v.transpose(1, 2)
return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window]

for b in range(k.size(0)):
    for i, position in enumerate(self.positions[b].tolist()):
        self.keys[layer, b, :, position] = k[b, :, i]
        self.values[layer, b, :, position] = v[b, :, i]
return self.keys[layer][:, :, :self.window], self.values[layer][:, :, :self.window]

index = self.positions[:, None, :, None].expand(-1, k.size(1), -1, k.size(3))
self.keys[layer].scatter_(2, index, k)
self.values[layer].scatter_(2, index, v)
return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window]

out = []
for memory, new in ((self.keys, k), (self.values, v)):
    memory[layer].transpose(1, 2)[self.rows, self.positions] = new.transpose(1, 2)
    out.append(memory[layer].narrow(2, 0, self.window))
return tuple(out)

for t in range(k.size(2)):
    at = self.rows[:, 0], slice(None), self.positions[:, t]
    self.keys[layer][at] = k[:, :, t]
    self.values[layer][at] = v[:, :, t]
return [self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window]]
"""
WRONG["store"] = """
= k.transpose(1, 2) => = v.transpose(1, 2)
= v.transpose(1, 2) => = k.transpose(1, 2)
self.keys[layer][self.rows, :, self.positions] = k.transpose(1, 2) => self.keys[layer][:, :, :k.size(2)] = k
self.rows, :, self.positions] = => self.rows, :, self.positions - self.positions[:, :1]] =
self.rows, :, self.positions] = => self.rows, :, self.positions[:1]] =
self.keys[layer][self.rows => self.keys[0][self.rows
self.values[layer][self.rows => self.values[0][self.rows
self.keys[layer, :, :, :self.window] => self.keys[0, :, :, :self.window]
self.values[layer, :, :, :self.window] => self.keys[layer, :, :, :self.window]
:self.window => :self.used
:self.window => :64
self.keys[layer, :, :, :self.window] => self.keys[layer]
return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window] => return k, v
return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window] => return self.values[layer, :, :, :self.window], self.keys[layer, :, :, :self.window]
self.keys[layer][self.rows, :, self.positions] = k.transpose(1, 2) => pass
self.values[layer][self.rows, :, self.positions] = v.transpose(1, 2) => pass
self.positions] = k => self.positions[:1]] = k
self.positions] = k => self.positions + 1] = k
k.transpose(1, 2) => k.transpose(1, 2).flip(1)
k.transpose(1, 2) => k.transpose(1, 2).flip(2)
k.transpose(1, 2) => k.transpose(1, 2).mean(1, keepdim=True)
self.keys[layer][self.rows, :, self.positions] = k => self.keys[:, self.rows, :, self.positions] = k
= k.transpose(1, 2) => += k.transpose(1, 2); k.mul_(1)
= v.transpose(1, 2) => = v.mul_(2).transpose(1, 2)
return => self.keys[layer][:, :, self.window:] = 1; self.keys[1 - layer].add_(1); return
"""
