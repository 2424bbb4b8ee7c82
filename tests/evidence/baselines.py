"""
What control by a value function has to beat.

    static      one direction for all states: h + size d, d by ridge regression of the reward
                (static-h0: from the first state of each text alone)
    guided      p_u(y) ~ p(y) exp(size (V(h') - V(h))), h' the state after y, which the model is run
                to find, for the likeliest candidates y (value-guided decoding, as in FUDGE, Yang
                and Klein 2021, and in controlled decoding, Mudgal et al. 2024)
    best_of_n   draw n texts, keep the one with the highest reward
    literal     the paper's net and optimizer to the letter, but four passes over the rollouts

`static` returns control(hidden, step_size) -> u, as control.step_for_kl takes it, `guided` texts,
`literal` a net to climb in 30 steps. finetune.py is DPO.
"""
import math

import torch
import torch.nn as nn

from control import Rollout, Sampler
from value import ValueNet, bellman_targets

def regression(hidden, outcome, std, ridge):
    """States (n, n_embd) and outcomes (n,) -> d (n_embd,), uphill in the states' own units"""
    x = hidden.float() / std
    x, y = x - x.mean(0), (outcome - outcome.mean()).float()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diag().mean())
    return torch.linalg.solve(gram, x.T @ y) * std

def static(rollout, outcome, first=False, ridge=3.0):
    """
    A Rollout with states and its rewards (N,) -> control, from all states or the first of each
    text (with one prompt these hold nothing). The ridge is in units of the mean squared feature; 3
    is best, or nearly, on the reviews.
    """
    mask, std = rollout.mask.clone(), rollout.hidden[rollout.mask].float().std(0)
    mask[:, 1:] &= not first
    outcome = outcome.to(mask.device)[:, None].expand(mask.shape)[mask]
    direction = regression(rollout.hidden[mask], outcome, std, ridge)
    return lambda hidden, size: (size * direction).expand(len(hidden), -1)

def look_ahead(model, value, cache, hidden, size, candidates):
    """hidden (B, n_embd) -> log p and log p_u (B, n_vocab); the cache is as before"""
    log_p, here = model.unembed(hidden).log_softmax(-1), value(hidden)
    tokens = log_p.topk(min(candidates, log_p.size(-1))).indices            # (B, candidates)
    change = torch.zeros_like(log_p)
    for column in tokens.split(1, dim=1):                                   # (B, 1)
        after = value(model(column, cache)[:, 0])
        cache.lengths -= 1                  # the next token is written over this one
        cache.used -= 1
        change.scatter_(1, column, (after - here)[:, None])
    change[:, model.config.eos_ids] = 0        # no text goes on after an end: V was not trained there
    return log_p, (log_p + size * change).log_softmax(-1)

@torch.no_grad()
def guided(model, value, prompts, uniforms, size, candidates=20, batch=128):
    """-> a Rollout, as control.generate; every token costs `candidates` more runs of the model"""
    (N, T), longest = uniforms.shape, max(map(len, prompts))
    batch, parts = min(batch, N), []
    sampler = Sampler(model, batch, longest + T, T, False, lambda hidden: look_ahead(
        model, value, sampler.cache, hidden, size, candidates))
    for start in range(0, N, batch):
        rows = [i % N for i in range(start, start + batch)]                 # the last is filled
        out = sampler.run([prompts[i] for i in rows], uniforms[rows])
        parts.append([column[:N - start].clone() for column in vars(out).values()])
    return Rollout(*map(torch.cat, zip(*parts)))

def size_for_kl(texts_at, nats, rounds=12):
    """The size at which texts_at(size), a few texts, cost so many nats, to 5% if it is found"""
    low, high, size = 0.0, math.inf, 1.0
    for i in range(rounds):
        texts = texts_at(size)
        kl = (texts.kl * texts.mask).sum(1).mean().item()
        if abs(kl - nats) < 0.05 * nats:
            break
        low, high = (size, high) if kl < nats else (low, size)
        size *= max(min(math.sqrt(nats / max(kl, 1e-9)), 10), 0.1)
        if not low < size < high or i % 3 == 2:
            size = (low + min(high, 4 * low)) / 2
    return size

def best_of_kl(rewards, n):
    """
    Rewards of one prompt's texts (any shape) -> KL(best of n || one text), nats.

    Between texts of equal reward the choice is blind. So with P(c), the probability of a reward of
    at most c, the reward r with the next lower r' has p(r) = P(r) - P(r'), is kept with p_n(r) =
    P(r)^n - P(r')^n, and KL = sum p_n log(p_n / p). Without ties this is log n - (n - 1) / n.
    """
    counts = rewards.flatten().unique(return_counts=True)[1].double()
    at_most = torch.cat([torch.zeros(1).double(), counts.cumsum(0) / counts.sum()])
    p, p_n = at_most.diff(), (at_most ** n).diff()
    return torch.special.xlogy(p_n, p_n / p).sum().item()

def literal(rollout, rewards, seed, epochs=4, batch=64):
    """Rewards r_t (N, T) -> a frozen ValueNet: ReLU, width 4096, Adam at 1e-4, raw states, lam 0"""
    torch.manual_seed(seed)
    value = ValueNet(rollout.hidden.size(-1), 4096, gradient_head=False).to(rollout.mask.device)
    value.body[1] = nn.ReLU()
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(rewards)).split(batch):
            values = value(rollout.hidden[rows])
            targets = bellman_targets(values.detach(), rewards[rows], rollout.mask[rows], 0.0)
            loss = (values - targets)[rollout.mask[rows]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return value.requires_grad_(False)
