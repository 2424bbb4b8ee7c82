"""
Every method at equal KL: gain in reward, mean over trainings and its standard error.

    python tests/evidence/compare.py --json out/toy.jsonl
    python tests/evidence/compare.py --task reviews --methods q,static --seeds 3

One set of rollouts a seed trains all methods. The step size is the one that costs the budget on the
states of these rollouts, so nothing is tuned on the prompts of the report; the KL printed is what
the reported texts cost. A gain is the mean reward less that of the uncontrolled texts drawn with
the same uniforms. On the tiny language it is also given as a share of the optimum at that KL, which
exact.py computes; samples may put it above 100%. Each (method, seed) is appended to --json as it is
done, and not done again.

    q, q-end    train_value.py's default; without step rewards
    q-5, q-30   q with so many steps, which share the step size
    q-dV        q-end, but its V differentiated instead of its gradient head
    plain       V alone, differentiated
    paper       the paper's way, with one step
    baselines.py: static, static-h0, guided (plain's V), best-of (n as in TASKS), literal

Perplexity is the model's own, of the largest budget's texts; seconds are those of training alone.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import baselines                                                                    # noqa: E402
import train_value                                                                  # noqa: E402
from control import ascend, generate, read_prompts, step_for_kl, uniform_table      # noqa: E402
from exact import Exact                                                             # noqa: E402
from model import InputError, load                                                  # noqa: E402
from value import load_reward                                                       # noqa: E402

SHARED = ROOT.parent / "shared"
METHODS = "q,q-end,q-dV,plain,paper,static,static-h0,best-of,guided"
TASKS = {"toy": dict(model=train_value.TOY, tokens=32, rollouts=4000, samples=8000,
                     budgets=(0.1, 0.3, 0.8), best_of=(2, 3, 5)),
         "reviews": dict(model=SHARED / "imdb-mini", tokens=24, rollouts=9600, samples=2400,
                         budgets=(0.5, 1, 2), best_of=(3, 6, 16),
                         train=SHARED / "prompts" / "reviews-train.txt",
                         test=ROOT / "tests" / "openings.txt")}
REPORT = 1000       # seed of the reported texts' uniforms; trainings have 1, 2, ..

class Task:
    """Its model, reward and prompts, and the uncontrolled texts that gains are measured against"""
    def __init__(self, args):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        task = TASKS[args.task]
        self.tokens, self.budgets, self.best_of = task["tokens"], task["budgets"], task["best_of"]
        self.samples, self.rollouts = args.samples, args.rollouts
        self.model, self.tokenizer = load(task["model"], "gpt2", args.device)
        self.reward = load_reward(args.reward, args.device, "gpt2")
        self.train, self.test = (read_prompts(self.model, self.tokenizer, task["model"],
                                              path=task.get(key)) for key in ("train", "test"))
        self.free = self.draw(self.test, self.samples, REPORT)
        self.base = self.score(self.test, self.free)
        self.exact = {} if args.task != "toy" else Exact(self.model, self.tokenizer, self.test, self.draw(
            self.test, 6000, 777, record=True), self.tokens)

    def draw(self, prompts, samples, seed, controller=None, **options):
        """-> a Rollout of so many texts, from the prompts in turn"""
        rows = [prompts[i % len(prompts)] for i in range(samples)]
        return generate(self.model, rows, uniform_table(samples, self.tokens, seed), controller,
                        batch=1024 if self.model.wte.weight.is_cuda else 128, **options)

    def partial(self, prompts, rollout, step_rewards):
        rows = [prompts[i % len(prompts)] for i in range(len(rollout.mask))]
        return train_value.partial_rewards(self.reward, self.tokenizer, rows, rollout, step_rewards)

    def score(self, prompts, rollout):
        return self.partial(prompts, rollout, False)[:, -1]

    def learn(self, seed):
        """What methods learn from -> a Rollout with states, rewards so far (N, T + 1)"""
        rollout = self.draw(self.train, self.rollouts, seed, record=True)
        return rollout, self.partial(self.train, rollout, True)

    def uncontrolled(self):
        """The record that the table and the chart begin with"""
        optimum = self.exact and {"optimum": [self.exact.kl.tolist(), self.exact.gain.tolist()]}
        return {"mean": self.base.mean().item(), "perplexity": perplexity(self.free)} | optimum

    def point(self, nats, kl, change, texts_perplexity):
        """change (N,): each text's reward less that of its uncontrolled partner"""
        gain, error = change.mean().item(), (change.std() / len(change) ** 0.5).item()
        share = self.exact and {"share": gain / self.exact.best(kl)}
        return {"nats": nats, "kl": kl, "gain": gain, "error": error,
                "perplexity": texts_perplexity} | share

    def measure(self, nats, texts):
        kl = (texts.kl * texts.mask).sum(1).mean().item()
        return self.point(nats, kl, self.score(self.test, texts) - self.base, perplexity(texts))

def perplexity(texts):
    return (-texts.logp[texts.mask].mean()).exp().item()

def train(method, task, rollout, partial, seed):
    """-> control(hidden, step_size) -> u, and the net, if it has one"""
    if method.startswith("static"):
        fit = baselines.static_h0 if method == "static-h0" else baselines.static
        return fit(rollout, partial[:, -1]), None
    settings = dict(train_value.METHODS[{"guided": "plain", "literal": "paper"}.get(
        method, method.split("-")[0])])
    if not settings.pop("step_rewards") or method in ("q-end", "q-dV"):
        ends = rollout.mask.sum(1, keepdim=True).cpu()
        partial = partial * (torch.arange(partial.size(1)) >= ends)     # all of it at the end
    rewards = partial.diff(dim=1).float().to(rollout.mask.device)
    steps, radius = 1, train_value.RADIUS if settings["standardised"] else math.inf
    if method == "literal":
        value, steps = baselines.literal(rollout, rewards, seed), 30
    else:
        value = train_value.train(task.model, rollout, rewards, **settings, seed=seed)
        steps = int(method[2:]) if method[2:].isdigit() else 1
    if method == "q-dV":
        value.gradient_head = None
    return lambda hidden, size: ascend(value, hidden, steps, size / steps, radius), value

def trained_points(method, task, learned, seed):
    """-> points, seconds of training"""
    start, points = time.time(), []
    control, value = train(method, task, *learned, seed)
    seconds = time.time() - start

    def at(nats):
        if method == "guided":
            rows = [task.train[i % len(task.train)] for i in range(256)]
            table = uniform_table(len(rows), task.tokens, seed)
            size = baselines.guided_size(task.model, value, rows, table, nats)
            rows = [task.test[i % len(task.test)] for i in range(task.samples)]
            table = uniform_table(len(rows), task.tokens, REPORT)
            return baselines.guided(task.model, value, rows, table, size)
        step = step_for_kl(task.model, control, learned[0], nats)
        return task.draw(task.test, task.samples, REPORT, lambda hidden: control(hidden, step))
    for nats in task.budgets:
        try:
            points.append(task.measure(nats, at(nats)))
        except InputError as error:
            points.append({"nats": nats, "failed": str(error)})
    return points, seconds

def best_of_points(task, seed):
    """Every seed draws anew. The gain is over the mean of the very texts that are chosen from."""
    texts = [task.draw(task.test, task.samples, 1000 * seed + 1001 + i)
             for i in range(max(task.best_of))]
    rewards = torch.stack([task.score(task.test, drawn) for drawn in texts])    # (n, N)
    logp, mask = (torch.stack([getattr(drawn, field) for drawn in texts]).cpu()
                  for field in ("logp", "mask"))                                # (n, N, T)
    points, prompts = [], min(len(task.test), task.samples)
    for n in task.best_of:
        kept = baselines.best_of_n(rewards, n), torch.arange(task.samples)
        kls = [baselines.best_of_kl(rewards[:, i::len(task.test)], n) for i in range(prompts)]
        points.append(task.point(n, sum(kls) / prompts, rewards[kept] - rewards.mean(0),
                                 (-logp[kept][mask[kept]].mean()).exp().item()))
    return points, 0.0

def table(free, lines, methods):
    """A row a method, a column a budget: gain ± standard error @ KL, share of the optimum"""
    print(f"uncontrolled: reward {free['mean']:.3f}, perplexity {free['perplexity']:.1f}; "
          f"{free['task']}, {free['reward']}, {free['samples']} texts a point\n"
          f"{'method':9}{'n':>3}  gain ± error @ KL" + ", % of optimum" * ("optimum" in free))
    for method in methods:
        rows, cells = [line for line in lines if line["method"] == method], []
        for points in zip(*(row["points"] for row in rows)):
            if any("failed" in point for point in points):
                cells.append(f"{'no step costs it':>18}" + " " * 7 * ("optimum" in free))
                continue
            gain = torch.tensor([point["gain"] for point in points])
            error = f"{gain.std() / len(gain) ** 0.5:.3f}" if len(gain) > 1 else "    -"
            kl, last = mean(points, "kl"), mean(points, "perplexity")
            share = f" {100 * mean(points, 'share'):5.1f}%" if "optimum" in free else ""
            cells.append(f"{gain.mean():6.3f}±{error}@{kl:<5.2f}{share}")
        if rows:
            print(f"{method:9}{len(rows):3} " + " ".join(cells) +
                  f" ppl {last:3.0f} {mean(rows, 'seconds'):3.0f} s")

def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--task", choices=TASKS, default="toy")
    parser.add_argument("--methods", default=METHODS, help="separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="trainings a method")
    parser.add_argument("--samples", type=int, help="texts reported on, a point")
    parser.add_argument("--rollouts", type=int, help="texts learnt from, a training")
    parser.add_argument("--reward", default="sentiment", help="as for train_value.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where records are kept (out/TASK.jsonl)")
    args = parser.parse_args()
    args.json = args.json or ROOT / "out" / f"{args.task}.jsonl"
    args.samples = args.samples or TASKS[args.task]["samples"]
    args.rollouts = args.rollouts or TASKS[args.task]["rollouts"]
    return args

def records(path, methods, args):
    """The records in the file, those that miss added to it as they come"""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    settings = {key: vars(args)[key] for key in ("task", "reward", "samples", "rollouts")}
    if any(line[key] != settings[key] for line in lines for key in settings):
        sys.exit(f"{path} was made with other settings than {settings}; name another --json")
    task, done = None, {(line["method"], line["seed"]) for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)

    def add(method, seed, **result):
        lines.append({"method": method, "seed": seed} | settings | result)
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    for seed in range(1, args.seeds + 1):
        missing = [method for method in methods if (method, seed) not in done]
        if missing:
            task = task or Task(args)
            if not lines:
                add("none", 0, **task.uncontrolled())
            learned = task.learn(seed) if missing != ["best-of"] else None
        for method in missing:
            points, seconds = (best_of_points(task, seed) if method == "best-of" else
                               trained_points(method, task, learned, seed))
            add(method, seed, points=points, seconds=seconds)
            print(f"seed {seed} {method}: {[round(p.get('gain', math.nan), 3) for p in points]}",
                  file=sys.stderr, flush=True)
    return lines

if __name__ == "__main__":
    args = parse_args()
    methods = args.methods.split(",")
    free, *lines = records(args.json, methods, args)
    table(free, lines, methods)
