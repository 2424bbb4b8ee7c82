"""
Train a value function on the hidden states of a frozen GPT-2: rollouts -> rewards -> net -> report.
Read value.py first: its words are used here.

    python train_value.py                                           # the tiny model, ten seconds
    python train_value.py --model gpt2 --prompts tests/openings.txt --out out/gpt2.pt

    1. draw texts without control; keep each hidden state and each grad_log_p
    2. score every text, and every beginning of it: the reward so far
    3. fit Q to the Bellman equation
    4. find the step size that costs NATS, save the net, report on texts that it has not seen

--method is one row of METHODS:

    q        g is learned; V reads the reward so far                    (the default)
    q-end    g is learned; V reads h alone: for rewards that judge finished texts only
    plain    V alone, of h alone; control climbs dV/dh
    paper    as plain, but with one-step targets (lambda 0), raw hidden states and no ball, as in arXiv
             2406.05954; with sample.py --steps 30 it comes near to the paper's own way
"""
import argparse
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import torch

from control import RADIUS, ascend, generate, readable, step_for_kl, uniform_table
from model import (InputError, check_length, in_turn, load, read_prompts, run_script,
                   show_progress)
from value import ValueNet, bellman_targets, load_reward

# Chosen with seeds 101 and up, for all tasks at once; results have other seeds (evidence/RESULTS.md).
RIDGE = 0.3         # weight of |g|^2: without it g is noise where the draws say nothing
DECAY = 1.0         # weight decay of AdamW, not on biases: keeps g small if rewards are noisy
LAMBDA = 0.8        # of TD(lambda), if V reads the reward so far
LAMBDA_END = 0.95   # if it does not: V then knows less, and its forecasts are trusted less
RATE = 0.01         # learning rate of AdamW, falling to 0 as a cosine
EPOCHS = 4
BATCH = 64          # texts per optimizer step
METHODS = {
    "q": dict(gradient_head=True, reads_so_far=True, standardised=True, lam=LAMBDA, radius=RADIUS),
    "q-end": dict(gradient_head=True, reads_so_far=False, standardised=True, lam=LAMBDA_END,
                  radius=RADIUS),
    "plain": dict(gradient_head=False, reads_so_far=False, standardised=True, lam=LAMBDA_END,
                  radius=RADIUS),
    "paper": dict(gradient_head=False, reads_so_far=False, standardised=False, lam=0.0,
                  radius=math.inf),
}
NATS = 0.5          # per text: what the saved step size costs, on hidden states without control
HELD_OUT = 1000     # texts to report on
GROUP = 128         # texts scored in one call
TOY = str(Path(__file__).with_name("tests") / "toy")

def score(reward, tokenizer, prompts, rollout, beginnings=True, progress=None):
    """
    -> so_far (N, T), the reward of each text before y_t was drawn, and outcome (N,), that of the
    finished texts; float64. Without `beginnings` only finished texts are scored, and so_far is 0.
    After a text's end so_far means nothing.
    """
    N, T = rollout.mask.shape
    so_far = torch.zeros(N, T, dtype=torch.float64)
    outcome = torch.zeros(N, dtype=torch.float64)
    for start in range(0, N, GROUP):
        stop = min(start + GROUP, N)
        rows = [rollout.beginnings(tokenizer, prompts, i) for i in range(start, stop)]
        if not beginnings:
            rows = [row[-1:] for row in rows]
        scores = reward([text for row in rows for text in row])
        parts = scores.split([len(row) for row in rows])                        # one per text
        for i, part in zip(range(start, stop), parts):
            so_far[i, :len(part) - 1] = part[:-1]
            outcome[i] = part[-1]
        if progress:
            progress(stop, N)
    return so_far, outcome

def rewards_at_end(outcome, mask):
    """outcome (N,), mask (N, T) -> r_t (N, T): the outcome at each text's last token, 0 elsewhere"""
    end = mask.sum(1, keepdim=True) - 1                                         # (N, 1)
    is_last = torch.arange(mask.size(1), device=mask.device) == end             # (N, T)
    return outcome.to(mask.device)[:, None] * is_last

def whitening(grad_log_p, W):
    """
    grad_log_p (n, n_embd) of draws, W (n_vocab, n_embd) -> M^-1/2 (n_embd, n_embd), symmetric.

    M is the second moment of grad_log_p plus that of uniformly chosen tokens. Multiplied by M^-1/2,
    both together are spread equally in all directions, so that the ridge and AdamW treat all alike.
    The product g . grad_log_p stays: the net learns M^1/2 g, and `unscale` makes g of it. Without
    the uniform tokens, a direction in which only rare tokens differ would be blown up. In float64,
    because float32 loses small directions; eigenvalues are at least 1e-10 of the largest.
    """
    drawn = grad_log_p.double()
    tokens = W.double() - W.double().mean(0)
    M = drawn.T @ drawn / len(drawn) + tokens.T @ tokens / len(tokens)
    sizes, axes = torch.linalg.eigh(M)
    sizes = sizes.clamp(min=1e-10 * sizes.max())
    return ((axes / sizes.sqrt()) @ axes.T).float()

def bellman_loss(value, hidden, so_far, draws, rewards, mask, lam):
    """
    The mean over real tokens of (Q - target)^2 + RIDGE |g|^2; without g, of (V - target)^2.
    hidden and draws, the whitened grad_log_p or None: (B, T, n_embd). The others: (B, T).
    """
    V = value(hidden, so_far)                                                   # (B, T)
    target = bellman_targets(V.detach(), rewards, mask, lam)
    if draws is None:
        return (V - target).square()[mask].mean()
    g = value.gradient(hidden)                                                  # (B, T, n_embd)
    Q = V + (g * draws).sum(-1)
    loss = (Q - target).square() + RIDGE * g.square().sum(-1)
    return loss[mask].mean()

def make_optimizer(value, steps):
    """AdamW, with weight decay on all but biases, and the schedule of its learning rate"""
    biases = [p for p in value.parameters() if p.dim() == 1]
    weights = [p for p in value.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0},
                                   {"params": weights, "weight_decay": DECAY}], lr=RATE)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

def train(model, rollout, so_far, rewards, gradient_head, reads_so_far, standardised, lam, seed,
          progress=None):
    """
    A Rollout with states, so_far and rewards r_t (N, T) -> a frozen ValueNet.

    For training, outcomes get mean 0 and deviation 1, and grad_log_p is whitened. `unscale` undoes
    both. InputError if the loss diverges.
    """
    torch.manual_seed(seed)
    mask, hidden, W = rollout.mask, rollout.hidden, model.wte.weight.float()
    value = ValueNet(hidden.size(-1), gradient_head=gradient_head, reads_so_far=reads_so_far)
    value.to(W.device)
    if standardised:
        std, mean = torch.std_mean(hidden[mask].float(), 0)
        value.mean.copy_(mean)
        value.std.copy_(std.clamp(min=1e-6))

    scale, shift = torch.std_mean(rewards.sum(1))
    ones = torch.ones(len(mask), dtype=rewards.dtype)
    rewards = rewards - shift * rewards_at_end(ones, mask.cpu())                # at the last tokens
    rewards = (rewards / scale).float().to(W.device)
    so_far = ((so_far - shift) / scale).float().to(W.device)
    whiten = whitening(rollout.grad_log_p[mask], W) if gradient_head else None

    optimizer, schedule = make_optimizer(value, EPOCHS * math.ceil(len(mask) / BATCH))
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(mask)).split(BATCH):
            draws = rollout.grad_log_p[rows].float() @ whiten if gradient_head else None
            loss = bellman_loss(value, hidden[rows], so_far[rows], draws, rewards[rows], mask[rows], lam)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise InputError(f"training diverged in epoch {epoch + 1}; lower RATE in train_value.py")
        if progress:
            progress(epoch + 1, EPOCHS)
    unscale(value, scale, shift, whiten)
    return value.requires_grad_(False)

@torch.no_grad()
def unscale(value, scale, shift, whiten):
    """
    The net was trained on standardised outcomes: let it forecast the outcomes. g <- scale M^-1/2 g,
        V <- shift + scale (a + b (s - shift) / scale) = (scale a - shift b + shift) + b s
    V's head becomes float64, because float32 loses a reward that is large and varies little.
    """
    head = value.value_head.double()
    if value.reads_so_far:
        head.weight[0].mul_(scale).sub_(shift * head.weight[1])
        head.bias[0].mul_(scale).sub_(shift * head.bias[1])
    else:
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    head.bias[0] += shift
    if whiten is not None:
        value.gradient_head.weight.copy_(scale * whiten @ value.gradient_head.weight)

def report(value, rollout, so_far, outcome):
    """Print R^2 over all hidden states of new texts, of V and of the reward so far as forecasts"""
    mask = rollout.mask.cpu()
    truth = outcome[:, None].expand(mask.shape)[mask]
    if truth.var() == 0:
        print(f"{len(mask)} held-out texts all earn {truth[0]:g}, so R^2 is not defined")
        return

    def r_squared(forecast):
        return 1 - (forecast.cpu()[mask] - truth).square().mean() / truth.var()
    V = value(rollout.hidden, so_far.to(rollout.hidden.device))                 # (N, T)
    line = f"{len(mask)} held-out texts, all states: R^2 of V for the outcome {r_squared(V):.3f}"
    if value.reads_so_far:
        line += f", of the reward so far alone {r_squared(so_far):.3f}"
    print(line)

# -------------------------------------------------------------------------------------- the script

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Train a value function on the hidden states of a frozen GPT-2.",
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--reward", default="sentiment", help="sentiment; FILE.py:FUNCTION, from a "
                        "list of texts to one number each, which must not depend on the other texts; "
                        "or DIRECTORY or DIRECTORY:LABEL of a GPT-2 classifier")
    parser.add_argument("--method", choices=METHODS, default="q", help="a row of METHODS")
    parser.add_argument("--rollouts", type=int, default=4000, help="texts to learn from")
    parser.add_argument("--tokens", type=int, default=32, help="tokens drawn per text, at most")
    parser.add_argument("--seed", type=int, default=1, help="of the draws and of the net")
    parser.add_argument("--model", default=TOY, help="gpt2, gpt2-medium, .. or a directory")
    parser.add_argument("--tokenizer", help="for a model without tokenizer files, for example gpt2")
    parser.add_argument("--reward-tokenizer", help="for a classifier without tokenizer files")
    parser.add_argument("--prompts", help="a text file with one prompt per line; None: prompts.txt in "
                        "the model's directory, or the empty text. The bos, if any, comes before each")
    parser.add_argument("--out", default="out/value.pt", help="where the net is saved")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the model's weights")
    args = parser.parse_args(argv)
    if args.rollouts < 2:
        parser.error("--rollouts must be 2 or more")
    if args.tokens < 1:
        parser.error("--tokens must be 1 or more")
    if not 1 <= args.seed < 2 ** 63:
        parser.error("--seed must be 1 or more, and below 2^63")
    return args

def check_out(path):
    """Before any work: InputError if the net cannot be written there, or would replace another file"""
    folder = next(parent for parent in path.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            Path(empty, path.name).touch()                  # is the name possible?
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); choose another")
    if not path.exists():
        return
    try:
        info = ValueNet.load(path).info
    except InputError:
        raise InputError(f"--out {path}: is there, and holds something else than a net of this version; "
                         f"remove it, or choose another --out") from None
    print(f"{path.name} will be replaced: {info['method']}, reward {info['reward']}, "
          f"{info['rollouts']} rollouts, seed {info['seed']}")

def check_memory(model, rollouts, tokens):
    """Before any work: InputError if the states of all texts are more than the memory"""
    numbers = rollouts * tokens * model.config.n_embd
    needed = (4 + 4 + 4 + 8) * numbers      # hidden, grad_log_p, a copy in float32, one in float64
    if model.wte.weight.is_cuda:
        memory = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = math.inf                                   # Windows does not say
    if needed > memory:
        raise InputError(f"{rollouts} rollouts x {tokens} tokens x {model.config.n_embd} numbers need "
                         f"{needed / 1e9:.0f} GB, and there are {memory / 1e9:.0f}; lower --rollouts")

def prepare(args):
    """Check all that the user gave, before the first draw -> model, tokenizer, prompts, reward"""
    model, tokenizer = load(args.model, args.tokenizer, args.device, getattr(torch, args.dtype))
    prompts = read_prompts(model, tokenizer, args.model, path=args.prompts)
    check_length(model, prompts, args.tokens)
    check_memory(model, args.rollouts, args.tokens)
    reward = load_reward(args.reward, args.device, args.reward_tokenizer)
    if METHODS[args.method]["reads_so_far"]:    # a first try, if the reward takes unfinished texts
        reward([readable(tokenizer, prompt) for prompt in prompts[:2]])
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{Path(args.model).resolve().name}: {parameters:,} parameters, frozen, {args.dtype} on "
          f"{args.device}; {min(len(prompts), args.rollouts)} of {len(prompts)} prompts; reward "
          f"{getattr(reward, 'label', args.reward)}", flush=True)
    return model, tokenizer, prompts, reward

def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out).absolute()         # the code of a reward may change the working directory
    check_out(out)
    model, tokenizer, prompts, reward = prepare(args)
    settings = dict(METHODS[args.method])
    radius = settings.pop("radius")

    def roll_out(samples, seed, label):
        rows = in_turn(prompts, samples, seed)
        rollout = generate(model, rows, uniform_table(samples, args.tokens, seed), record=True,
                           progress=partial(show_progress, f"{label} drawn"))
        so_far, outcome = score(reward, tokenizer, rows, rollout, settings["reads_so_far"],
                                partial(show_progress, f"{label} scored"))
        return rollout, so_far, outcome

    rollout, so_far, outcome = roll_out(args.rollouts, args.seed, "rollouts")
    spread, mean = torch.std_mean(outcome)
    print(f"{args.rollouts} rollouts: reward {mean:.3g}, standard deviation {spread:.3g}", flush=True)
    if not 0 < spread < math.inf:
        raise InputError(f"rewards of mean {mean:g} have a deviation of {spread:g}; choose a --reward "
                         f"that varies, and is not huge")
    value = train(model, rollout, so_far, rewards_at_end(outcome, rollout.mask.cpu()), **settings,
                  seed=args.seed, progress=partial(show_progress, "epoch"))

    def controller_at(hidden, step_size):
        return ascend(value, hidden, 1, step_size, radius)
    step_size = step_for_kl(model, controller_at, rollout, NATS)
    info = vars(args) | {"step_size": step_size, "radius": radius, "nats": NATS}
    value.save(out, model, info)
    parameters = sum(weight.numel() for weight in value.parameters())
    print(f"{args.out}: {parameters:,} parameters; step size {step_size:.3g}", flush=True)
    report(value, *roll_out(HELD_OUT, args.seed + 1, "held-out"))

if __name__ == "__main__":
    run_script(main)
