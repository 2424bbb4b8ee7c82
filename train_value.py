"""
Train a value function on the hidden states of a frozen GPT-2: rollouts -> rewards -> V.

    python train_value.py                                    # the tiny model: under a minute on two CPU cores
    python train_value.py --model path/to/gpt2 --prompts openings.txt --out out/gpt2.safetensors

    1. roll out the model on the prompts, at temperature 1, nudged by a small random control
    2. score the finished texts with the reward
    3. fit V (see value.py) by TD(lambda) on the recorded states
    4. report on held-out rollouts, save, and show a few steered texts beside plain ones

The nudge is persistent excitation, as in system identification: V is later asked about states h + u,
so states h + u are what it should have seen. `--method plain` and `--method paper` train the baselines.

But: one round only, on the uncontrolled model's texts; where control leads far away, V extrapolates.
"""
import argparse
import math
import resource
import sys
import time

import torch

from control import Controller
from model import GPT, InputError, load_tokenizer
from sample import (Decoding, decode, encode_prompts, figures, generate, pick_device, prompts_of, run_script,
                    show_texts, uniform_table)
from value import ValueNet, load_reward, bellman_targets, value_loss

# method: (form of the loss, lambda, standardised states, excitation on)
METHODS = {"q": ("q", None, True, True),          # ours
           "plain": ("v", None, True, False),     # values alone
           "paper": ("v", 0.0, False, False)}     # values alone, one-step bootstrapping, raw states


def roll_out(model, encoder, texts, reward, samples, n_tokens, seed, excitation=None, batch=256, record=True,
             label="rollouts"):
    """`samples` texts, the prompts taken in turn -> (Rollout, rewards (N,) on the model's device)."""
    prompts = encode_prompts(model, encoder, [texts[i % len(texts)] for i in range(samples)])
    rollout = generate(model, prompts, uniform_table(samples, n_tokens, seed), Decoding(), record=record,
                       excitation=excitation, batch=batch, seed=seed, progress=Progress(label))
    scores = reward(decode(encoder, prompts, rollout, model.config.eos_token_id))
    return rollout, torch.tensor(scores, dtype=torch.float32, device=rollout.mask.device)


def fit(value, rollout, rewards, form, lam, epochs, batch, rate, seed):
    """Adam on the Bellman error over batches of whole texts; the last epoch's mean loss."""
    optimizer = torch.optim.Adam(value.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(rewards) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(rewards), generator=generator).to(rewards.device).split(batch):
            loss = value_loss(value, rollout.hidden[rows], rollout.psi[rows], rewards[rows], rollout.mask[rows],
                              lam, form)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows) / len(rewards)
    return total
