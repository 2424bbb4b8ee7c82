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
import math
import resource
import sys
import time

import torch

import sample
from control import Controller
from model import InputError
from sample import Decoding, Parser, at_least, figures, generate, uniform_table
from value import ValueNet, load_reward, value_loss

# --method: the loss, lambda (unless --lam is given), standardised states?, excitation?
METHODS = {"q": ("q", 0.8, True, True),            # ours
           "plain": ("v", 0.95, True, False),      # values alone
           "paper": ("v", 0.0, False, False)}      # values alone, one-step targets, raw states


def roll_out(model, encoder, reward, prompts, samples, n_tokens, seed, **how):
    """`samples` texts, the prompts taken in turn -> (Rollout, rewards (N,), texts)."""
    prompts = [prompts[i % len(prompts)] for i in range(samples)]
    rollout = generate(model, prompts, uniform_table(samples, n_tokens, seed), seed=seed, **how)
    texts = sample.decode(encoder, prompts, rollout, model.config.eos_token_id)
    return rollout, torch.tensor(reward(texts), device=rollout.mask.device), texts


def fit(value, rollout, rewards, form, lam, epochs, batch, rate, seed):
    """Adam on the Bellman error, over batches of whole texts; prints the loss of each epoch."""
    optimizer = torch.optim.Adam(value.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(rewards) / batch))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(rewards), generator=generator).to(rewards.device).split(batch):
            loss = value_loss(value, rollout.hidden[rows], rollout.psi[rows], rewards[rows],
                              rollout.mask[rows], lam, form)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows) / len(rewards)
        print(f"epoch {epoch + 1:2d}  Bellman error {total:.4f}", flush=True)


@torch.no_grad()
def report(value, rollout, rewards):
    """How well V foretells the outcome of held-out uncontrolled texts."""
    values, mask = value(rollout.hidden), rollout.mask
    outcome = rewards[:, None].expand_as(values)
    error = (values - outcome)[mask].square().mean().item()
    print(f"\nheld-out texts: squared error {error:.4f}, of their mean {rewards.var().item():.4f}")
    print("correlation of V(h_t) with the outcome:", end="")
    longest = int(mask.sum(1).max())
    for t in sorted({0, longest // 8, longest // 4, longest // 2, 3 * longest // 4, longest - 1}):
        alive = mask[:, t]
        if alive.sum() > 2:
            pair = torch.stack([values[alive, t], rewards[alive]])
            print(f"  t={t} {torch.corrcoef(pair)[0, 1]:.2f}", end="")
    print("\ncalibration, states in five bins by V:")
    order = values[mask].argsort()
    for part in order.chunk(5):
        print(f"  V {values[mask][part].mean():+.3f}   outcome {outcome[mask][part].mean():+.3f}")


def peak_memory(device):
    """Peak memory of this process, in MiB: the device's if it has its own, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def parse_args(argv):
    parser = Parser(__doc__)
    parser.add_control()
    add = parser.add_argument
    add("--out", default="out/value.safetensors", metavar="FILE", help="where V is saved")
    add("--reward", default="sentiment", metavar="NAME", help="sentiment or path/to/file.py:function")
    add("--method", choices=METHODS, default="q", help="q: V and its gradient, with excitation; plain: values alone; "
                                                       "paper: values alone, one-step targets, raw states")
    add("--lam", type=at_least(0, float), help="lambda of TD(lambda): 0 moves the reward back one token a pass, 1 is "
                                               "Monte Carlo (default: q 0.8, plain 0.95, paper 0)")
    add("--rollouts", type=at_least(16), default=4000, help="texts to learn from")
    add("--held-out", type=at_least(16), default=1000, help="texts to report on")
    add("--excitation", type=at_least(0, float), default=0.1, help="largest standard deviation of the random control "
                                                                   "in the rollouts, in standard deviations of h")
    add("--width", type=at_least(1), default=128, help="of V's hidden layer")
    add("--epochs", type=at_least(1), default=10, help="passes over the rollouts")
    add("--texts", type=at_least(1), default=64, help="texts a gradient step")
    add("--rate", type=at_least(0, float), default=3e-3, help="peak learning rate")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    form, lam, standardised, excited = METHODS[args.method]
    lam = lam if args.lam is None else args.lam
    if lam > 1:
        raise InputError(f"--lam {lam}: choose 0 to 1")
    sample.check_writable(args.out)
    reward = load_reward(args.reward)
    model, encoder, texts, prompts = sample.load(args)

    def rolled(samples, seed, label, **how):
        return roll_out(model, encoder, reward, prompts, samples, args.tokens, seed, batch=args.batch,
                        progress=sample.progress(label), **how)

    clock = [time.time()]
    first, _, _ = rolled(min(256, args.rollouts), args.seed, "first rollouts", record=True)
    mean, std = first.hidden[first.mask].mean(0), first.hidden[first.mask].std(0)
    excitation = args.excitation * std if excited and args.excitation else None
    rollout, rewards, _ = rolled(args.rollouts, args.seed + 1, "rollouts", record=True, excitation=excitation)
    clock.append(time.time())
    torch.manual_seed(args.seed)
    value = ValueNet(model.config.n_embd, args.width).to(mean.device)
    if standardised:
        value.mean.copy_(mean)
        value.std.copy_(std)
    value.b2.data.fill_(rewards.mean())
    fit(value, rollout, rewards, form, lam, args.epochs, args.texts, args.rate, args.seed)
    clock.append(time.time())
    held, outcome, _ = rolled(args.held_out, args.seed + 2, "held-out rollouts", record=True)
    report(value.requires_grad_(False), held, outcome)
    value.save(args.out, fingerprint=model.fingerprint(), model=str(args.model), method=args.method, lam=lam,
               reward=args.reward, rollouts=args.rollouts, tokens=args.tokens, temperature=1.0, seed=args.seed)
    print(f"\n{args.out}: {sum(p.numel() for p in value.parameters()):,} parameters trained, rollouts "
          f"{clock[1] - clock[0]:.0f} s, fit {clock[2] - clock[1]:.0f} s, peak memory {peak_memory(mean.device):.0f} MiB")
    control = Controller(value, args.steps, args.sign * args.step_size, args.radius, args.max_kl)
    few = min(len(prompts), 3)
    pairs = {label: rolled(few, args.seed + 3, label, control=how)
             for label, how in (("uncontrolled", None), ("controlled", control))}
    sample.show_pairs({label: (rollout, texts, scores.tolist()) for label, (rollout, scores, texts) in pairs.items()},
                      range(few))


if __name__ == "__main__":
    sample.run(main)
