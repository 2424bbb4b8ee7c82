"""
Every method at equal KL: gain in reward against nats, mean over trainings +- its standard error.

    python tests/evidence/compare.py                            # the tiny language: half an hour
    python tests/evidence/compare.py --task reviews --seeds 3   # ../shared/imdb-mini: hours on a CPU

One set of rollouts a seed trains all methods. The step size is the one that costs the budget on the
states of these rollouts (control.step_for_kl): nothing is tuned on the prompts of the report. The KL
printed is what the reported texts cost. All texts are drawn with the same uniforms. Each (method,
seed) is appended to --json as it is done, and not done again.

    q          the default                      q-end      without step rewards
    q-dV       q-end's V differentiated         q-5, q-30  so many steps that share the step size
    plain      V alone                          paper      V alone, as in train_value.py
    literal    the paper to the letter: ReLU, width 4096, Adam 1e-4, raw states, 30 steps; 4 epochs
    static     one direction: ridge regression of the reward on all states; static-h0: on the first
    best-of    the best of n = 2, 4, 16 by the reward, whose KL is that of the choice
    guided     p(y) exp(step (V(h') - V(h))) over the 20 likeliest tokens, each run through GPT-2
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import train_value                                                                    # noqa: E402
from control import Rollout, Sampler, ascend, generate, read_prompts                  # noqa: E402
from control import step_for_kl, uniform_table                                        # noqa: E402
from exact import Exact                                                               # noqa: E402
from model import load                                                                # noqa: E402
from value import ValueNet, bellman_targets, load_reward                              # noqa: E402

SHARED = ROOT.parent / "shared"
METHODS = "q q-end q-dV q-5 q-30 plain paper literal static static-h0 best-of guided".split()
TASKS = {"toy": dict(model=train_value.TOY, tokens=32, rollouts=4000, budgets=(.1, .3, .8),
                     samples=8000),
         "reviews": dict(model=SHARED / "imdb-mini", tokens=24, rollouts=9600, budgets=(.5, 1, 2),
                         samples=2400, train=SHARED / "prompts" / "reviews-train.txt",
                         test=ROOT / "tests" / "openings.txt")}

class Bench:
    """A task: model, reward, prompts, and the uncontrolled texts that gains are measured against."""
    def __init__(self, args):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        self.task = TASKS[args.task] | ({"samples": args.samples} if args.samples else {})
        self.model, self.tokenizer = load(self.task["model"], "gpt2", args.device)
        self.reward = load_reward(args.reward, args.device, "gpt2")
        name = self.task["model"]
        self.train, self.test = (read_prompts(self.model, self.tokenizer, name,
                                              path=self.task.get(key)) for key in ("train", "test"))
        self.rows, self.free = self.draw(self.test, self.task["samples"], 1000)
        self.base = self.score(self.rows, self.free)
        self.exact = None
        if args.task == "toy":
            self.exact = Exact(self.model, self.tokenizer, self.test, self.draw(
                self.test, 6000, 999, record=True)[1], self.task["tokens"])

    def draw(self, prompts, samples, seed, controller=None, **how):
        rows = [prompts[i % len(prompts)] for i in range(samples)]
        uniforms = uniform_table(samples, self.task["tokens"], seed)
        return rows, generate(self.model, rows, uniforms, controller, **how)

    def score(self, rows, rollout, step_rewards=False):
        partial = train_value.partial_rewards(self.reward, self.tokenizer, rows, rollout,
                                              step_rewards)
        return partial if step_rewards else partial[:, -1]

    def point(self, rollout, nats):
        """What the texts gained and cost, and how near the optimum that is."""
        n = len(rollout.mask)
        change = self.score(self.rows[:n], rollout) - self.base[:n]
        kl = (rollout.kl * rollout.mask).sum(1).mean().item()
        point = {"nats": nats, "kl": kl, "gain": change.mean().item(),
                 "texts_error": (change.std() / len(change) ** .5).item(),
                 "perplexity": (-rollout.logp[rollout.mask].mean()).exp().item()}
        return point | ({"share": point["gain"] / self.exact.best(kl)} if self.exact else {})

def end_only(partial, rollout):
    """All of the reward at the end of the text."""
    ends = rollout.mask.sum(1, keepdim=True).cpu()
    return partial * (torch.arange(partial.size(1)) >= ends)

def literal(rollout, rewards, seed):
    """The paper to the letter, as far as four passes over the rollouts go."""
    torch.manual_seed(seed)
    value = ValueNet(rollout.hidden.size(-1), 4096, gradient_head=False).to(rollout.mask.device)
    value.body[1] = nn.ReLU()
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-4)
    for _ in range(4):
        for rows in torch.randperm(len(rewards)).split(64):
            values = value(rollout.hidden[rows])
            targets = bellman_targets(values.detach(), rewards[rows], rollout.mask[rows], 0.0)
            loss = (values - targets)[rollout.mask[rows]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return value.requires_grad_(False)

def static(rollout, outcome, first=False, ridge=3.0):
    """One direction for all states: ridge regression of the outcome (N,) on standardised states."""
    std, mean = torch.std_mean(rollout.hidden[rollout.mask].float(), 0)
    mask = rollout.mask.clone()
    mask[:, 1:] &= not first
    x = ((rollout.hidden - mean) / std)[mask]
    y = (outcome - outcome.mean())[:, None].expand_as(mask)[mask].float()
    x = x - x.mean(0)
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diag().mean())
    direction = torch.linalg.solve(gram, x.T @ y) * std
    return lambda hidden, size: (size * direction).expand(len(hidden), -1)

def control_of(method, bench, rollout, partial, seed):
    """-> control(hidden, step_size) -> u"""
    device, outcome = rollout.mask.device, partial[:, -1].to(rollout.mask.device)
    if method.startswith("static"):
        return static(rollout, outcome, method == "static-h0")
    if method == "literal":
        value = literal(rollout, end_only(partial, rollout).diff(dim=1).float().to(device), seed)
        return lambda hidden, size: ascend(value, hidden, 30, size / 30, math.inf)
    settings = dict(train_value.METHODS[method.split("-")[0]])
    if not settings.pop("step_rewards") or method in ("q-end", "q-dV"):
        partial = end_only(partial, rollout)
    rewards = partial.diff(dim=1).float().to(device)
    value = train_value.train(bench.model, rollout, rewards, **settings, seed=seed)
    steps = int(method[2:]) if method[2:].isdigit() else 1
    radius = train_value.RADIUS if settings["standardised"] else math.inf
    if method == "q-dV":
        value.gradient_head = None
    return lambda hidden, size: ascend(value, hidden, steps, size / steps, radius)

def best_of(bench):
    """Points of the best of n; KL of the choice, sum over levels c of P_n(c) log(P_n(c) / P(c))."""
    scores = [bench.base] + [bench.score(*bench.draw(bench.test, bench.task["samples"], 2000 + i))
                             for i in range(15)]
    for n in (2, 4, 16):
        best = torch.stack(scores[:n]).max(0).values
        levels, counts = torch.cat(scores).unique(return_counts=True)
        below = torch.cat([torch.zeros(1), counts.cumsum(0) / counts.sum()])
        p, p_n = below.diff().double(), (below.double() ** n).diff()
        kl = (p_n * (p_n / p).log()).nansum().item()
        gain = (best - bench.base).mean().item()
        yield {"nats": n, "kl": kl, "gain": gain, "perplexity": math.nan} | (
            {"share": gain / bench.exact.best(kl)} if bench.exact else {})

def guided(bench, rollout, partial, seed, candidates=20, batch=128):
    """Points of value-guided decoding, over the same texts; V as plain trains it."""
    settings = dict(train_value.METHODS["plain"])
    settings.pop("step_rewards")
    rewards = end_only(partial, rollout).diff(dim=1).float().to(rollout.mask.device)
    value = train_value.train(bench.model, rollout, rewards, **settings, seed=seed)
    model, T, longest = bench.model, bench.task["tokens"], max(map(len, bench.rows))
    texts = min(1024, len(bench.rows) // batch * batch)         # it takes 20 times as long
    for size in (1.0, 2.0, 4.0):
        def look_ahead(hidden):
            log_p, cache = model.unembed(hidden).log_softmax(-1), sampler.cache
            tokens, delta = log_p.topk(candidates).indices, torch.zeros_like(log_p)
            for i in range(candidates):
                after = value(model(tokens[:, i:i + 1], cache)[:, 0])
                cache.lengths -= 1                              # taken back, to be written again
                cache.used -= 1
                delta.scatter_(1, tokens[:, i:i + 1], size * (after - value(hidden))[:, None])
            return log_p, (log_p + delta).log_softmax(-1)
        sampler, parts = Sampler(model, batch, longest + T, T, False, look_ahead), []
        uniforms = uniform_table(len(bench.rows), T, 1000)
        with torch.no_grad():
            for start in range(0, texts, batch):
                out = sampler.run(bench.rows[start:start + batch], uniforms[start:start + batch])
                parts.append([column.clone() for column in vars(out).values()])
        whole = Rollout(*map(torch.cat, zip(*parts)))
        yield bench.point(whole, size)

def record(method, seed, bench, learned):
    """All points of one training."""
    rollout, partial, started = *learned, time.time()
    if method == "best-of":
        return {"points": list(best_of(bench)), "seconds": 0.0}
    if method == "guided":
        points = list(guided(bench, rollout, partial, seed))
        return {"points": points, "seconds": time.time() - started}
    control, points = control_of(method, bench, rollout, partial, seed), []
    seconds = time.time() - started
    for nats in bench.task["budgets"]:
        step = step_for_kl(bench.model, control, rollout, nats)
        _, texts = bench.draw(bench.test, bench.task["samples"], 1000, lambda h: control(h, step))
        points.append(bench.point(texts, nats))
    return {"points": points, "seconds": seconds}

def table(lines, methods):
    """Mean over trainings +- its standard error: gain @ KL, and of the optimum, for each budget."""
    for method in methods:
        rows = [line for line in lines if line["method"] == method]
        cells = []
        for points in zip(*(row["points"] for row in rows)):
            gains = torch.tensor([point["gain"] for point in points])
            kl = sum(point["kl"] for point in points) / len(points)
            error = f"{gains.std() / len(gains) ** .5:.3f}" if len(gains) > 1 else "n/a  "
            share = sum(point.get("share", math.nan) for point in points) / len(points)
            cell = f"{gains.mean():6.3f} +-{error} @{kl:5.2f}"
            cells.append(cell + f" {share:4.2f}" * (share == share))
        if rows:
            print(f"{method:10}{len(rows):2}  " + " | ".join(cells) +
                  f" | {sum(row['seconds'] for row in rows) / len(rows):4.0f} s")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--task", choices=TASKS, default="toy")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="trainings")
    parser.add_argument("--samples", type=int, help="texts reported on, a point")
    parser.add_argument("--reward", default="sentiment")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="the records (default: out/TASK.jsonl)")
    args = parser.parse_args()
    path = args.json or ROOT / "out" / f"{args.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done, methods = {(line["method"], line["seed"]) for line in lines}, args.methods.split(",")
    bench = None
    for seed in range(1, args.seeds + 1):
        missing = [method for method in methods if (method, seed) not in done
                   and not (method == "best-of" and seed > 1)]
        if missing:
            bench = bench or Bench(args)
            rows, rollout = bench.draw(bench.train, bench.task["rollouts"], seed, record=True)
            partial = bench.score(rows, rollout, step_rewards=True)
        for method in missing:
            lines.append({"method": method, "seed": seed, "task": args.task, "reward": args.reward,
                          **record(method, seed, bench, (rollout, partial))})
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            gains = [round(point["gain"], 3) for point in lines[-1]["points"]]
            print(f"seed {seed} {method}: {gains}", file=sys.stderr, flush=True)
    table(lines, methods)

if __name__ == "__main__":
    main()
