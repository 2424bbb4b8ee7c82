"""
Fine-tuning all weights on the same rollouts and rewards, to set beside a control that changes none.

    -log sigmoid(beta (log [p'(a) / p(a)] - log [p'(b) / p(b)]))      a, b: the better and the worse
                                                                      of two texts after one prompt

Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290). For a chosen KL the weights are
w + s (w' - w), and s is searched (Ramé et al. 2023, arXiv 2306.04488): one tuning serves all
budgets. `python -m tests.evidence.compare --methods dpo` trains and reports it, with its seconds.
"""
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F

PAIRS = 16                              # pairs of texts in a batch


def states(model, prompts, tokens):
    """Prompts [[token, ..], ..], tokens (N, T) drawn after them -> the states before each draw"""
    rows = [torch.cat([tokens.new_tensor(p), row[:-1]]) for p, row in zip(prompts, tokens)]
    hidden = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=tokens.device)[:, None]
    places = first + torch.arange(tokens.size(1), device=tokens.device)             # (N, T)
    return hidden[torch.arange(len(rows), device=tokens.device)[:, None], places]


@torch.no_grad()
def compared(rollout, model, prompts, other, group=16):
    """A Rollout drawn from `other` -> the same, with KL(other || model) and the model's log p"""
    kl = torch.zeros_like(rollout.kl)
    drawn = torch.zeros_like(rollout.kl)                        # log p of the tokens drawn
    for i in range(0, len(kl), group):
        rows = slice(i, i + group)
        tokens = rollout.tokens[rows]
        log_p = model.unembed(states(model, prompts[rows], tokens)).log_softmax(-1)
        log_q = other.unembed(states(other, prompts[rows], tokens)).log_softmax(-1)
        kl[rows] = (log_q.exp() * (log_q - log_p)).sum(-1)
        drawn[rows] = log_p.gather(-1, tokens[:, :, None])[:, :, 0]
    return replace(rollout, kl=kl, log_p=drawn)


def pairs_of(outcome, n_prompts, generator):
    """Rewards (N,), the prompts taken in turn -> rows (pairs, 2), the better text first"""
    turns = torch.randperm(len(outcome) // n_prompts // 2 * 2, generator=generator).view(2, -1, 1)
    a, b = (turns * n_prompts + torch.arange(n_prompts)).flatten(1)
    better = (outcome[a] > outcome[b])[:, None]
    pairs = torch.where(better, torch.stack([a, b], 1), torch.stack([b, a], 1))
    return pairs[outcome[a] != outcome[b]]


def dpo(model, prompts, rollout, outcome, seed, rate, epochs, beta):
    """Prompts and Rollout of N texts with rewards (N,) -> a tuned copy of the model"""
    generator = torch.Generator().manual_seed(seed)
    before = (rollout.log_p * rollout.mask).sum(1)
    tuned = deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    n_prompts = len({tuple(prompt) for prompt in prompts})
    pairs = torch.cat([pairs_of(outcome, n_prompts, generator) for _ in range(epochs)])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, -(-len(pairs) // PAIRS))
    for rows in pairs[torch.randperm(len(pairs), generator=generator)].split(PAIRS):
        rows = rows.T.flatten()                                 # the better texts, then the others
        tokens, mask = rollout.tokens[rows], rollout.mask[rows]
        hidden = states(tuned, [prompts[i] for i in rows], tokens)
        logits = tuned.unembed(hidden).flatten(0, 1)
        log_p = -F.cross_entropy(logits, tokens.flatten(), reduction="none").view(mask.shape)
        better, worse = ((log_p * mask).sum(1) - before[rows]).chunk(2)
        loss = -F.logsigmoid(beta * (better - worse)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuned.requires_grad_(False)


@torch.no_grad()
def between(model, tuned, s):
    """The model whose weights are w + s (w' - w)"""
    result = deepcopy(model)
    for weight, end in zip(result.parameters(), tuned.parameters()):
        weight += s * (end - weight)
    return result
