"""
Train a value function on the hidden states of a frozen GPT-2: rollouts -> rewards -> net -> report.

    python train_value.py --model gpt2 --prompts tests/openings.txt --out out/gpt2.pt

    1. draw texts without control, and keep every state and every score function
    2. step rewards: r_t = reward of the text that ends with y_t, less that of the text before it
       (potential-based shaping, Ng et al. 1999)
    3. fit Q to the Bellman equation (value.py), find the step that costs NATS, report, save

--method paper is the paper's way. The default, q, differs where that measured better:
    1. a gradient head, trained on the draws       (paper and plain: V alone, differentiated)
    2. step rewards                                (paper and plain: all of the reward at the end)
    3. TD(lambda), lambda 0.95                     (paper: one-step targets, lambda 0)
    4. states standardised                         (paper: raw states)
"""
import argparse
import functools
import math
import os
import sys
from pathlib import Path

import torch

from control import ascend, generate, read_prompts, step_for_kl, uniform_table
from model import InputError, load
from value import ValueNet, bellman_targets, load_reward

METHODS = {"q": dict(gradient_head=True, lam=0.95, standardised=True, step_rewards=True),
           "plain": dict(gradient_head=False, lam=0.95, standardised=True, step_rewards=False),
           "paper": dict(gradient_head=False, lam=0.0, standardised=False, step_rewards=False)}
NATS = 0.5          # a text: what the saved step size costs
RADIUS = 10.0       # of the ball: wide, since the nats are what bounds a step
HELD_OUT = 1000     # texts to report on
RATE, EPOCHS, BATCH, DECAY = 0.01, 4, 64, 1.0       # of AdamW; BATCH in texts
TOY = os.path.relpath(Path(__file__).with_name("tests") / "toy")

def progress(label, done, total):
    if sys.stderr.isatty():
        print(f"\r\033[K{label} {done} of {total}", end="\n" * (done == total), file=sys.stderr)

def partial_rewards(reward, tokenizer, prompts, rollout, step_rewards, show=lambda *_: None):
    """
    -> (N, T + 1) float64: column t is the reward of the text before y_t (0 without step_rewards);
    from the text's end on, the whole text's
    """
    partial, group = torch.zeros(len(prompts), rollout.mask.size(1) + 1, dtype=torch.float64), 128
    lengths, tokens = rollout.mask.sum(1).tolist(), rollout.tokens.tolist()
    for start in range(0, len(prompts), group):
        rows = range(start, min(start + group, len(prompts)))
        places = [(i, t) for i in rows for t in range(lengths[i] + 1)
                  if step_rewards or t == lengths[i]]
        texts = [tokenizer.decode(prompts[i] + tokens[i][:t]) for i, t in places]
        known = iter(reward([text for text in texts if text]).tolist())
        for (i, t), text in zip(places, texts):
            partial[i, t:] = next(known) if text else math.nan
        show(rows.stop, len(prompts))
    return partial.where(partial.isfinite(), partial[:, -1].nanmean())  # empty texts: the mean

def whitening(scores, W):
    """
    scores (n, n_embd) of draws and W (n_vocab, n_embd) -> T = M^-1/2 (n_embd, n_embd), symmetric.

    M: second moment of the scores plus that of uniformly chosen tokens. T makes draws alike in all
    directions, so that AdamW favours none; the second part binds those that only rare tokens have.
    In float64, as float32 loses small directions; eigenvalues are at least 1e-10 of the largest.
    """
    scores, W = scores.double(), W.double() - W.double().mean(0)
    sizes, axes = torch.linalg.eigh(scores.T @ scores / len(scores) + W.T @ W / len(W))
    return (axes / sizes.clamp(min=1e-10 * sizes.max()).sqrt() @ axes.T).float()

def train(model, rollout, rewards, gradient_head, lam, standardised, seed, show=lambda *_: None):
    """
    A Rollout with states and its rewards r_t (N, T) -> a frozen ValueNet. Rewards are standardised
    and scores whitened for training; both are undone in the heads. InputError if it diverges.
    """
    torch.manual_seed(seed)
    mask, hidden, W = rollout.mask, rollout.hidden, model.wte.weight.float()
    value = ValueNet(hidden.size(-1), gradient_head=gradient_head).to(W.device)
    if standardised:
        std, mean = torch.std_mean(hidden[mask].float(), 0)
        value.mean.copy_(mean), value.std.copy_(std.clamp(min=1e-6))
    scale, shift = torch.std_mean(rewards.sum(1))
    last = torch.arange(mask.size(1), device=W.device) == mask.sum(1, keepdim=True) - 1
    rewards = (rewards - shift * last) / scale          # outcomes have mean 0, deviation 1
    T = whitening(rollout.score[mask].float(), W) if gradient_head else None
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": DECAY * (p.dim() > 1)}
                                   for p in value.parameters()], lr=RATE)      # none on biases
    steps = EPOCHS * math.ceil(len(mask) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(mask)).split(BATCH):
            values = value(hidden[rows])                                            # (BATCH, T)
            targets = bellman_targets(values.detach(), rewards[rows], mask[rows], lam)
            if gradient_head:                                                       # Q instead of V
                values = value.q(hidden[rows], rollout.score[rows].float() @ T)
            loss = (values - targets)[mask[rows]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise InputError(f"training diverged in epoch {epoch + 1}; choose a smaller RATE")
        show(epoch + 1, EPOCHS)
    with torch.no_grad():
        value.value_head.weight *= scale
        value.value_head.bias.mul_(scale).add_(shift)
        if gradient_head:
            value.gradient_head.weight.copy_(scale * T @ value.gradient_head.weight)
    return value.requires_grad_(False)

def report(value, rollout, partial):
    """How well V predicts on texts that it has not seen, and whether a constant does better"""
    mask = rollout.mask.cpu()
    so_far, outcome = partial[:, :-1][mask], partial[:, -1:].expand(mask.shape)[mask]
    V, to_come = value(rollout.hidden).cpu().double()[mask], outcome - so_far
    error, constant = (V - to_come).square().mean(), to_come.var()
    print(f"{len(mask)} held-out texts, all states: R^2 of V for the reward still to come "
          f"{1 - error / constant:.3f},\nof reward so far + V for the outcome "
          f"{1 - error / outcome.var():.3f}" + (error > constant) * "; V is worse than a constant")

def check_out(path, info):
    """Before any work: can the net be written, and what does it replace?"""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not os.access(folder, os.W_OK) or folder.is_file():
        raise InputError(f"--out {path}: {folder} cannot be written; choose another")
    if path.exists():                   # load refuses to replace what is no value net
        old = ValueNet.load(path).info
        changed = [f"{key} {old.get(key)}" for key in info if old.get(key) != info[key]]
        print(f"{path} will be replaced; it had {', '.join(changed) or 'the same settings'}")

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], usage=argparse.SUPPRESS,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what is learned").add_argument
    what("--reward", default="sentiment", help="sentiment; FILE.py:FUNCTION, from a list of texts "
         "to a number each; or a GPT-2 classifier's directory, or DIRECTORY:LABEL")
    what("--method", choices=METHODS, default="q", help="see the top of this file")
    what("--no-step-rewards", action="store_true", help="q: all of the reward at the end of a text")
    what("--rollouts", type=int, default=4000, help="texts to learn from")
    what("--tokens", type=int, default=32, help="tokens drawn a text, at most")
    what("--seed", type=int, default=1, help="of the draws and of the net")
    where = parser.add_argument_group("the model and the files").add_argument
    where("--model", default=TOY, help="gpt2, gpt2-medium, .. or a directory")
    where("--tokenizer", help="of a model without tokenizer files, such as gpt2")
    where("--prompts", help="a text file, one prompt a line; the model's bos, if any, comes before "
          "each; None: prompts.txt beside the model, or the empty text")
    where("--out", type=Path, default="out/value.pt", help="where the net is saved")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    where("--device", choices=devices, default=devices[0], help="where the model runs")
    where("--dtype", choices=["float32", "bfloat16"], default="float32", help="of its weights")
    args = parser.parse_args(argv)
    if min(args.rollouts, args.tokens, args.seed) < 1:
        parser.error("--rollouts, --tokens and --seed are 1 or more")
    return args

def main(argv=None):
    args = parse_args(argv)
    settings = dict(METHODS[args.method])
    step_rewards = settings.pop("step_rewards") and not args.no_step_rewards
    info = vars(args) | {"step_rewards": step_rewards}
    del info["out"], info["device"], info["no_step_rewards"]
    check_out(args.out, info)
    model, tokenizer = load(args.model, args.tokenizer, args.device, getattr(torch, args.dtype))
    if model.wte.weight.numel() < 1e6:
        torch.set_num_threads(1)    # a tiny model on a busy machine: 4 seconds instead of 2 minutes
    prompts = read_prompts(model, tokenizer, args.model, path=args.prompts)
    reward = load_reward(args.reward, args.device, args.tokenizer)
    reward([tokenizer.decode(prompt) or "a" for prompt in prompts[:2]])     # fails now, not later
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, frozen, "
          f"{args.dtype} on {args.device}; {len(prompts)} prompts; reward {args.reward} "
          f"{getattr(reward, 'label', '')}" + f"; left out {[*model.extra]}" * bool(model.extra))

    def roll_out(samples, seed, label):
        rows = [prompts[i % len(prompts)] for i in range(samples)]
        rollout = generate(model, rows, uniform_table(samples, args.tokens, seed), record=True,
                           progress=functools.partial(progress, f"{label} drawn"))
        return rollout, partial_rewards(reward, tokenizer, rows, rollout, step_rewards,
                                        functools.partial(progress, f"{label} scored"))
    rollout, partial = roll_out(args.rollouts, args.seed, "rollouts")
    rewards = partial.diff(dim=1).float().to(args.device)                   # (N, T)
    spread, mean = torch.std_mean(partial[:, -1])
    print(f"{args.rollouts} rollouts: reward {mean:.3g}, standard deviation {spread:.3g}")
    if not spread > 0:
        raise InputError(f"every text has the reward {mean:g}; choose a --reward that varies")
    value = train(model, rollout, rewards, **settings, seed=args.seed,
                  show=functools.partial(progress, "epoch"))
    radius = RADIUS if settings["standardised"] else math.inf
    step = step_for_kl(model, lambda h, size: ascend(value, h, 1, size, radius), rollout, NATS)
    report(value, *roll_out(HELD_OUT, args.seed + 1, "held-out"))
    value.save(args.out, model, info | {"step_size": step, "radius": radius, "nats": NATS})
    print(f"{args.out}: {sum(p.numel() for p in value.parameters()):,} parameters; step {step:.3g}")

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
