"""
What control by a value function has to beat.

    static      one direction for all states: u = size d, d by ridge regression of the reward on h
    one-g       one direction for all states, from the draws that g learns from: d minimises
                E[(d . grad_log_p(y) - (R - V))^2] + RIDGE |d|^2, V being that of q
    look-ahead  p_u(y) ~ p(y) exp(size (V(h') - V(h))), h' the state after y, which the model is run
                to find, for the likeliest candidates y (value-guided decoding, as in FUDGE, Yang and
                Klein 2021, and in controlled decoding, Mudgal et al. 2024)
    LM-Steer    u = size A h, A by likelihood of the best quarter of the texts, or more if they tie (after
                Han et al. 2024, arXiv 2305.12798, whose A has low rank and whose loss reads the
                bad texts, too): the nearest published relative of a push on the last hidden state
    RAD-Q       u = size B h: Q(h, y) = a . h + (B h) . W[y] by squared error to the text's reward, a
                weight that grows along the text (Deng and Raffel 2023, arXiv 2310.09520, with the
                low-rank head of Troshin et al. 2024, arXiv 2407.04615, as we read them)
    best of n   draw n texts, keep the one with the highest reward

static, one_g, lm_steer and rad_q return controller_at(hidden, size) -> u, as control.step_for_kl takes it.
finetune.py is DPO.
"""
import math

import torch
import torch.nn as nn

import train_value
from control import Sampler


def static(rollout, outcome, ridge=3.0):
    """
    A Rollout with states and its rewards (N,) -> controller_at, the same u everywhere.

    The ridge is in units of the mean squared feature; 3 is best, or nearly, on the reviews.
    """
    mask = rollout.mask
    hidden = rollout.hidden[mask].float()                                       # (n, n_embd)
    reward = outcome.float().to(hidden.device)[:, None].expand(mask.shape)[mask]
    std = hidden.std(0)
    x = (hidden - hidden.mean(0)) / std
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    direction = torch.linalg.solve(gram, x.T @ (reward - reward.mean())) * std
    return lambda hidden, size: (size * direction).expand(len(hidden), -1)


def one_g(model, rollout, so_far, outcome, value):
    """
    A fair single direction: near to what q's g would be if it had to be the same in all states.

    As g it is whitened, with RIDGE, for outcomes of deviation 1. Other than g it is solved for, without
    weight decay, and its target is the outcome itself (lambda 1).
    """
    mask = rollout.mask
    reward = outcome.to(mask.device)[:, None]
    V = value(rollout.hidden, so_far.to(mask.device))                           # (N, T)
    surprise = ((reward - V) / outcome.std())[mask].double()                    # (n,)
    whiten = train_value.whitening(rollout.grad_log_p[mask], model.wte.weight)
    draws = (rollout.grad_log_p[mask].float() @ whiten).double()                # (n, n_embd)
    gram = draws.T @ draws / len(draws)
    gram.diagonal().add_(train_value.RIDGE)
    direction = whiten @ torch.linalg.solve(gram, draws.T @ surprise / len(draws)).float()
    return lambda hidden, size: (size * direction).expand(len(hidden), -1)


@torch.enable_grad()
def lm_steer(model, rollout, outcome, seed, rate, epochs=4, batch=32):
    """A Rollout with states and its rewards (N,) -> controller_at; A starts from no control"""
    torch.manual_seed(seed)
    best = (outcome >= outcome.quantile(0.75)).nonzero()[:, 0].to(rollout.mask.device)
    n_embd = rollout.hidden.size(-1)
    A = torch.zeros(n_embd, n_embd, device=best.device, requires_grad=True)
    optimizer = torch.optim.Adam([A], lr=rate)
    for _ in range(epochs):
        for rows in best[torch.randperm(len(best))].split(batch):
            hidden = rollout.hidden[rows][rollout.mask[rows]].float()           # (n, n_embd)
            logits = model.unembed(hidden + hidden @ A.T)
            loss = nn.functional.cross_entropy(logits, rollout.tokens[rows][rollout.mask[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    A.requires_grad_(False)
    return lambda hidden, size: size * hidden.float() @ A.T


@torch.enable_grad()
def rad_q(model, rollout, outcome, seed, rate, epochs=4, batch=64):
    """
    A Rollout with states and its rewards (N,) -> controller_at, by B and a bias. States and outcomes
    are standardised, as for q.
    """
    torch.manual_seed(seed)
    W = model.wte.weight.float()
    n_embd = W.size(1)
    std, mean = torch.std_mean(rollout.hidden[rollout.mask].float(), 0)
    reward = ((outcome - outcome.mean()) / outcome.std()).float().to(W.device)
    head = nn.Linear(n_embd, 1 + n_embd).to(W.device)                           # a, and B
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(reward)).split(batch):
            out = head((rollout.hidden[rows].float() - mean) / std)             # (B, T, 1 + n_embd)
            Q = out[..., 0] + (out[..., 1:] * W[rollout.tokens[rows]]).sum(-1)
            weight = rollout.mask[rows].cumsum(1) * rollout.mask[rows]          # 1, 2, .. along a text
            loss = (weight * (Q - reward[rows, None]) ** 2).sum() / weight.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.requires_grad_(False)
    return lambda hidden, size: size * head((hidden.float() - mean) / std)[..., 1:]


class LookAhead(Sampler):
    """Control by V of the states that may come next: `candidates` more runs of the model a token"""

    def __init__(self, *settings, value, size, candidates=20):
        super().__init__(*settings)
        self.value = value
        self.size = size
        self.candidates = candidates

    def log_probs(self, hidden):
        """hidden (B, n_embd) -> log p, log p_u (B, n_vocab); the cache is as before"""
        log_p = self.model.unembed(hidden).log_softmax(-1)
        here = self.value(hidden).float()                                       # (B,)
        tokens = log_p.topk(min(self.candidates, log_p.size(-1))).indices       # (B, candidates)
        change = torch.zeros_like(log_p)
        for column in tokens.split(1, dim=1):                                   # (B, 1)
            after = self.value(self.model(column, self.cache)[:, 0]).float()
            self.cache.lengths -= 1         # the next token is written over this one
            self.cache.used -= 1
            change.scatter_(1, column, (after - here)[:, None])
        change[:, self.eos_ids] = 0         # no text goes on after an end, so V there means nothing
        return log_p, (log_p + self.size * change).log_softmax(-1)


def size_for_kl(texts_at, nats, rounds=12):
    """
    The size at which texts_at(size), a few texts, cost so many nats, to 5% if it is found.

    KL grows as the square of a small size: that gives the next guess. Every third round, and if the
    guess is outside of what is left, take the middle (on a log scale), or a quarter, or four times.
    """
    low, high, size = 0.0, math.inf, 1.0
    for i in range(rounds):
        texts = texts_at(size)
        kl = (texts.kl * texts.mask).sum(1).mean().item()
        if abs(kl - nats) < 0.05 * nats:
            break
        if kl < nats:
            low = size
        else:
            high = size
        size *= max(min(math.sqrt(nats / max(kl, 1e-9)), 10), 0.1)
        if not low < size < high or i % 3 == 2:
            if low == 0:
                size = high / 4
            elif high == math.inf:
                size = 4 * low
            else:
                size = math.sqrt(low * high)
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
    p = at_most.diff()
    p_n = (at_most ** n).diff()
    return torch.special.xlogy(p_n, p_n / p).sum().item()
