"""
Train a value function on the hidden states of a frozen GPT-2: rollouts -> rewards -> V.

    python train_value.py                                    # the tiny model: under a minute on two CPU cores
    python train_value.py --model gpt2 --prompts openings.txt --out out/gpt2.safetensors

    1. roll out the model on the prompts, at temperature 1, recording states and psi
    2. score the finished texts with the reward
    3. fit V to the Bellman equation on the recorded states, and A, whose gradient steers, to what each
       draw did for the reward (see value.py)
    4. --rounds above 1: roll out under the control so far and fit again, soft policy iteration
    5. report on held-out rollouts, drawn like the last ones learned from, save, and show a few steered texts
       beside plain ones

The paper stops at one round. The first knows the uncontrolled texts only: V(h_t) is what the model
earns if it is left alone from here on, not what the control still to come will make of it.
"""
import argparse
import math
import resource
import sys
import time
from functools import partial

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import sample
from control import Controller, Reread, step_for_kl
from model import InputError
from sample import Parser, count, named, number
from value import (ValueNet, advantages, bellman_targets, fingerprint, load_reward, moments, value_loss,
                   whitening)

# Ours and the baselines, with settings that do well on the tiny language and on film reviews alike; those
# that are best for one task are found by tests/tune.py. One-step targets (lam 0) carry the reward back one
# token at a time: compare --lam 0 and 1 at --epochs 1.
METHODS = {
    # V, and A fitted to the draws: a net, or one direction for all states
    "q": dict(draws="net", lam=0.8, standardised=True, epochs=4, rate=0.01, decay=1.0, width=128),
    "draws": dict(draws="line", lam=0.8, standardised=True, epochs=4, rate=0.01, decay=1.0, width=128),
    # values alone
    "plain": dict(lam=0.8, standardised=True, epochs=2, rate=0.03, decay=3.0, width=256),
    # values alone, one-step targets, raw states, no ball
    "paper": dict(lam=0.0, standardised=False, epochs=2, rate=0.03, decay=3.0, width=64),
    # a static direction, the same u everywhere: least squares of the reward on the states, or as in the
    # paper on the state after the prompt, h_0, alone
    "static": dict(ridge=3.0),
    "static-h0": dict(ridge=3.0, first=True),
}


def ball(settings, radius=Controller.radius):
    """The radius for a net of these settings; raw coordinates and static directions have no ball."""
    return radius if settings.get("standardised") else math.inf


def train(model, rollout, rewards, seed=0, log=None, costs=None, **settings):
    """
    Rollout of N texts and rewards (N,) -> a frozen ValueNet, by the settings of one of METHODS.

    `draws`: A is a "net" or a "line"; without it V itself is climbed. costs (N, T): see bellman_targets.
    InputError if the loss grows beyond all bounds, or a static direction has no states that differ.
    """
    if "ridge" in settings:
        return fit_static(rollout, rewards, **settings).requires_grad_(False)
    draws, lam, standardised, width = [settings.pop(name, None)
                                       for name in ("draws", "lam", "standardised", "width")]
    torch.manual_seed(seed)
    mask, costs = rollout.mask, torch.zeros_like(rollout.kl) if costs is None else costs
    value = ValueNet(rollout.hidden.size(-1), width).to(mask.device)
    value.b2.data.fill_(rewards.mean())                        # the best constant
    if standardised:
        value.standardise(rollout.states(rows)[mask[rows]] for rows in rollout.few())

    def bellman_error(rows):
        return value_loss(value, rollout.states(rows), rewards[rows], mask[rows], lam, costs[rows])

    descend(value, bellman_error, len(rewards), log=log and partial(log, "V"), **settings)
    value.requires_grad_(False)
    if draws:
        advantage = advantages(read(value, rollout), rollout.earned, rewards, mask, lam, costs)
        fit = fit_lift if draws == "net" else fit_line
        value.lift = fit(model, value, rollout, advantage, log=log and partial(log, "A"), **settings)
        value.lift.requires_grad_(False)
    return value


def read(value, rollout):
    """V (N, T) of all states."""
    return torch.cat([value(rollout.states(rows)) for rows in rollout.few()])


def descend(net, loss, texts, epochs, rate, decay, batch=64, log=None):
    """
    Minimise loss(rows), the rows of a batch of whole texts, by AdamW in so many epochs.

    `rate` is the peak learning rate, falling to 0 along a cosine; `decay` the decoupled weight decay.
    `log(epoch, loss)` is called after each epoch.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(texts / batch))
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(texts).split(batch):
            error = loss(rows)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            total += error.item() * len(rows) / texts
        if not math.isfinite(total):
            raise InputError(f"training diverged in epoch {epoch + 1}; choose a smaller --rate, or a "
                             f"reward on a smaller scale")
        if log:
            log(epoch, total)


class Whitened(nn.Module):
    """A parametrisation of W1, as B T."""
    def __init__(self, T):
        super().__init__()
        self.register_buffer("T", T)

    def forward(self, B):
        return B @ self.T


def fit_lift(model, value, rollout, advantage, **settings):
    """
    A, as wide as V: the net whose dA/dx . psi_x is least far from the advantages (N, T) of the draws.

    psi is far larger in some directions than in others, and AdamW would favour these. So W1 = B T, and B
    is what is trained: T makes draws, real and imagined, alike in all directions.
    """
    mask, lift = rollout.mask, value.beside(len(value.w2))
    T = whitening((value.std * rollout.draws(rows)[1][mask[rows]] for rows in rollout.few()),
                  value.std * model.wte.weight.float())
    _, spread = moments((rollout.states(rows)[mask[rows]] - value.mean) / value.std @ T
                        for rows in rollout.few())
    parametrize.register_parametrization(lift, "w1", Whitened(T / spread.mean()))     # of x T: about 1

    def error(rows):
        worth = lift.worth(*rollout.draws(rows))
        return (worth - advantage[rows])[mask[rows]].square().mean()

    descend(lift, error, len(mask), **settings)
    parametrize.remove_parametrizations(lift, "w1")            # W1 = B T from now on
    return lift


def fit_line(model, value, rollout, advantage, **_):
    """
    A(h) = w . x, one direction for all states: least squares of the advantages (N, T) on psi_x, and of 0 on
    the imagined draws.
    """
    def psi(rows):
        return value.std * rollout.draws(rows)[1][rollout.mask[rows]]             # (n, n_embd)

    T = whitening((psi(rows) for rows in rollout.few()), value.std * model.wte.weight.float())
    moment = sum(psi(rows).T @ advantage[rows][rollout.mask[rows]] for rows in rollout.few())
    return line(value, T @ (T @ moment) / rollout.mask.sum())


def fit_static(rollout, rewards, ridge, first=False):
    """
    V(h) = w . x + const by ridge regression of the rewards on the states: its gradient w is static. Of the
    `first` states only, there is one for each prompt.
    """
    mask = rollout.mask.clone()
    value = ValueNet(rollout.hidden.size(-1), 1).to(mask.device)
    value.standardise(rollout.states(rows)[mask[rows]] for rows in rollout.few())
    if first:
        mask[:, 1:] = False
    outcome = (rewards - rewards.mean())[:, None].expand_as(mask)

    def x(rows):
        return ((rollout.states(rows) - value.mean) / value.std)[mask[rows]]      # (n, n_embd)

    mean, _ = moments(x(rows) for rows in rollout.few())       # 0 of all states
    gram, moment = 0.0, 0.0                                    # (n_embd, n_embd), (n_embd,)
    for rows in rollout.few():
        centred = x(rows) - mean
        gram, moment = gram + centred.T @ centred, moment + centred.T @ outcome[rows][mask[rows]]
    gram.diagonal().add_(ridge * gram.diag().mean())
    try:
        w = torch.linalg.solve(gram, moment)
    except torch.linalg.LinAlgError:
        raise InputError("the states do not differ: no direction fits them; give more prompts, or a "
                         "--ridge above 0") from None
    value = line(value, w)
    value.b2.data.fill_(rewards.mean())
    return value


def line(value, w):
    """A ValueNet w . x in the coordinates of another: one tanh, far from bending."""
    net = value.beside(1)
    size = w.norm().clamp(min=1e-30)
    net.w1.data[0], net.w2.data[0] = 1e-3 * w / size, 1e3 * size
    return net


def improve(model, control, rollout, rewards, first, nats, settings, radius=Controller.radius, seed=0,
            log=None):
    """
    A round of soft policy iteration: `control` and texts drawn under it -> the next Controller.

    Evaluation: V and A of the reward less beta KL, beta = 1 / step_size, the exchange rate at which this
    control is optimal (without the KL V would call for ever more of it). Improvement: one step on the new
    A, at the size that costs `nats` a text on the states of the `first` texts, uncontrolled ones. In the
    first round `control` is None, or an excitation, which costs nothing here: it is no policy.
    """
    value = train(model, rollout, rewards, seed=seed, log=log, costs=kl_costs(control, rollout), **settings)
    control = Controller(value, radius=ball(settings, radius))
    control.step_size = step_for_kl(model, control, first, nats)
    return control


def kl_costs(control, rollout):
    """beta KL (N, T) of the control that a rollout was drawn under; None without one."""
    return rollout.kl / control.step_size if control is not None and not control.excitation else None


def excitation(rollout, size):
    """A Controller that moves such states at random, with standard deviations of x up to `size`."""
    value = ValueNet(rollout.hidden.size(-1), 1).to(rollout.mask.device).requires_grad_(False)
    value.standardise([rollout.hidden[rollout.mask]])
    return Controller(value, excitation=size)


@torch.no_grad()
def report(value, rollout, rewards, costs=None):
    """How well V foretells the outcome of held-out texts: their reward, less the costs (N, T) to come."""
    values, mask = read(value, rollout), rollout.mask
    outcome = bellman_targets(torch.zeros_like(values), rewards, mask, 1.0, costs)
    error, spread = (values - outcome)[mask].square().mean(), outcome[mask].var()
    print(f"\nheld-out states: squared error of V to the outcome {error:.4f}, "
          f"of the best constant {spread:.4f}")
    print("correlation of V(h_t) with the outcome:", end="")
    longest = int(mask.sum(1).max())
    for t in sorted({0, longest // 8, longest // 4, longest // 2, 3 * longest // 4, longest - 1}):
        alive = mask[:, t]
        if alive.sum() > 2:
            pair = torch.stack([values[alive, t], outcome[alive, t]])
            print(f"  t={t} {torch.corrcoef(pair)[0, 1]:.2f}", end="")
    print("\ncalibration, states in five bins by V:")
    order = values[mask].argsort()
    for part in order.chunk(5):
        print(f"  V {values[mask][part].mean():+.3f}   outcome {outcome[mask][part].mean():+.3f}")


def fits(args, model):
    """Whether the states of all rollouts will; if not, says that the texts will be read again instead."""
    W, most = model.wte.weight, max(args.rollouts * min(args.rounds, 3), args.held_out)
    states = most * args.tokens * W.size(1) * 2 * W.itemsize                      # bytes, psi too
    if states <= args.spare / 2:                               # the other half is the sampler's
        return True
    what = (f"the states of {most} rollouts take {states / 2 ** 30:.3f} GiB, and --max-memory "
            f"{args.max_memory:.3f} leaves {max(args.spare, 0) / 2 ** 31:.3f} for them")
    if args.excitation:
        raise InputError(f"{what}; excited, they cannot be read again: choose fewer --rollouts or --tokens")
    print(f"{what}: read again from the tokens in every pass, which takes longer")
    return False


def peak_memory(device):
    """Peak memory of this process, in MiB: the device's if it has its own, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def parse_args(argv):
    """The options, those not given filled in with the method's own."""
    parser = Parser(__doc__, seed=0)
    add = parser.add_argument
    add("--out", type=named, default="out/value.safetensors", metavar="FILE", help="where V is saved")
    add("--reward", default="sentiment", metavar="NAME", help="sentiment, path/to/file.py:function, or a "
        "GPT-2 classifier: a directory or a name of the hub")
    add("--method", choices=METHODS, default="q", help="q: V, and A trained on the draws; draws: "
        "likewise, but A is one direction for all states; plain: values alone; paper: values alone, one-step "
        "targets, raw states, no ball; static: one direction, by least squares of the reward on the states; "
        "static-h0: likewise, of the state after the prompt alone")
    own = parser.add_argument_group("settings of training", "default: the method's own").add_argument
    own("--lam", type=number(float, 0, 1), default=argparse.SUPPRESS,
        help="lambda of TD(lambda): 0 moves the reward back one token a pass, 1 is Monte Carlo")
    own("--epochs", type=count, default=argparse.SUPPRESS, help="passes over the rollouts")
    own("--rate", type=number(float, 0, 10), default=argparse.SUPPRESS, help="peak learning rate")
    own("--decay", type=number(float, 0, 100), default=argparse.SUPPRESS, help="weight decay, decoupled")
    add("--rollouts", type=number(int, 16, 2 ** 31), default=4000, help="texts to learn from, a round")
    add("--rounds", type=count, default=1, help="of policy iteration: 1 learns from uncontrolled texts only")
    add("--nats", type=number(float, 1e-6, 1e3), default=0.5, help="a text: the cost of the control whose "
        "step size is saved with V, and of the rounds")
    add("--excitation", type=number(float, 0, 10), default=0.0, help="in the first round, random "
        "controls whose standard deviation is up to so many of a state's")
    add("--held-out", type=number(int, 16, 2 ** 31), default=1000, help="texts to report on")
    own("--width", type=number(int, 1, 65536), default=argparse.SUPPRESS, help="of V's hidden layer")
    own("--ridge", type=number(float, 0, 1e9), default=argparse.SUPPRESS,
        help="of static and static-h0, relative to the mean square of a feature")
    args = parser.parse_args(argv)
    settings = {name for method in METHODS.values() for name in method}
    if foreign := vars(args).keys() & settings - METHODS[args.method].keys():
        names = " and no --".join(sorted(foreign))
        raise InputError(f"--method {args.method} has no --{names}; leave it out")
    for name, setting in METHODS[args.method].items():
        setattr(args, name, getattr(args, name, setting))
    return args


def timed(spent, system, args, samples, seed, label, record=False, **how):
    """
    sample.roll_out of system = (model, encoder, reward, prompts), its seconds added to `spent`; with states
    that are kept where args.keep says so.
    """
    clock, show = [time.time()], sample.progress(label)

    def progress(done, total):
        show(done, total)
        clock.append(time.time())

    rollout, rewards, texts = sample.roll_out(*system, samples, args.tokens, seed, batch=args.batch,
                                              progress=progress, record=record and args.keep, **how)
    spent["drawing"] += clock[-1] - clock[0]
    spent["scoring"] += time.time() - clock[-1]
    if record and not args.keep:
        model, _, _, prompts = system
        rollout = Reread(rollout, model, sample.in_turn(prompts, samples), how.get("control"))
    return rollout, rewards, texts


def iterate(args, model, rolled, settings):
    """--rounds of rollouts and training -> the last Controller, and that of the texts it has learned from."""
    def log(net, epoch, loss):
        print(f"{net}  epoch {epoch + 1:2d}  squared error {loss:.4f}")

    control, first = None, None
    if args.excitation:
        torch.manual_seed(args.seed)
        control = excitation(rolled(256, args.seed, "pilot", record=True)[0], args.excitation)
    for i in range(args.rounds):
        rollout, rewards, _ = rolled(args.rollouts, args.seed + 10_000 * i, "rollouts", control=control,
                                     record=True, earned=True)
        cost = f", KL {sample.figures(rollout, rewards)['kl_text']:.3f} nats a text" * (control is not None)
        print(f"{args.rollouts} rollouts of {args.tokens} tokens: mean reward {rewards.mean():.3f}, "
              f"standard deviation {rewards.std():.3f}{cost}")
        if rewards.min() == rewards.max():
            raise InputError(f"every text has the reward {rewards[0]:g}: nothing to learn; choose another "
                             f"--reward")
        first = rollout if first is None else first
        policy = control if i > 0 else None                    # an excitation is none
        control = improve(model, control, rollout, rewards, first, args.nats, settings, seed=args.seed,
                          log=log)
    return control, policy


def main(argv=None):
    """Rollouts, rewards, V; the report; the file; a few steered texts."""
    args = parse_args(argv)
    sample.check_writable(args.out)
    model, encoder, _, prompts = sample.load(args)
    args.keep = fits(args, model)
    reward = load_reward(args.reward, args.device)
    started, spent = time.time(), {"drawing": 0.0, "scoring": 0.0}                # seconds
    rolled = partial(timed, spent, (model, encoder, reward, prompts), args)
    settings = {name: getattr(args, name) for name in METHODS[args.method]}
    control, policy = iterate(args, model, rolled, settings)
    value, spent["training"] = control.value, time.time() - started - sum(spent.values())
    held_out, outcome, _ = rolled(args.held_out, args.seed + 1, "held-out rollouts", control=policy,
                                  record=True)
    if policy is not None:
        print("\nheld-out texts are drawn under the control of the round before; outcome: the reward less "
              "the beta KL still to come")
    report(value, held_out, outcome, kl_costs(policy, held_out))
    value.save(args.out, fingerprint=fingerprint(model), model=str(args.model), method=args.method,
               **settings, reward=args.reward, rollouts=args.rollouts, rounds=args.rounds, tokens=args.tokens,
               temperature=1.0, seed=args.seed, excitation=args.excitation, nats=args.nats,
               step_size=control.step_size, radius=control.radius)
    times = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items())
    print(f"\n{args.out}: {sum(p.numel() for p in value.parameters()):,} parameters trained; {times}, peak "
          f"memory {peak_memory(model.wte.weight.device):.0f} MiB; a step of {control.step_size:.2f} costs "
          f"about {args.nats:g} nats a text")
    few = min(max(len(prompts), 2), 4)
    pairs = {label: rolled(few, args.seed + 2, label, control=how)
             for label, how in (("uncontrolled", None), ("controlled", control))}
    sample.show_pairs(pairs, range(few))


if __name__ == "__main__":
    sample.run(main)
