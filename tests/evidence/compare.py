"""
Every method at equal KL: gain in reward, mean over trainings and its standard error.

    python tests/evidence/compare.py
    python tests/evidence/compare.py --task reviews --methods q,static --seeds 3

One set of rollouts a seed trains all methods. The step size is the one that costs the budget on the
states of these rollouts, so nothing is tuned on the draws of the report; the KL printed is what
the reported texts cost. A gain is the mean reward less that of the uncontrolled texts drawn with
the same uniforms. On the tiny language it is also given as a share of the optimum at that KL, which
exact.py computes; chance may put it above 100%. Each training reports on draws of its own, so that
the error over trainings is also that of the texts. Each (method, seed) is added to --json as it is
done, and not done again.

    q, q-end    train_value.py's default; without step rewards
    q-5, q-30   q with so many steps, which share the step size; q-free, q-30-free: without a ball
    q-dV        q-end, but its V differentiated instead of its gradient head
    rounds-2    policy iteration: q trained again on as many texts under the control so far, of
                rewards r_t - beta KL_t, beta = 1 / step_size; rounds-4: three times more
    plain, paper    V alone, differentiated; the paper's way, with one step
    static, static-h0, guided (plain's V), best-of (n as in TASKS), literal: baselines.py
    prefix      a sentence of praise before every prompt (reviews), at the KL that it costs
    dpo         all weights fine-tuned: finetune.py

Of the largest budget's texts: ppl, the perplexity under the uncontrolled model; div, distinct pairs
of tokens among all pairs, in groups of 100 texts; judge, their gain in the reward --judge. s:
seconds to train and to find the sizes, all budgets together, without drawing and scoring the
rollouts (rounds: with those of later rounds).
"""
import argparse
import functools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import baselines                                                                    # noqa: E402
import finetune                                                                     # noqa: E402
import train_value                                                                  # noqa: E402
from control import Rollout, ascend, generate, read_prompts                         # noqa: E402
from control import step_for_kl, uniform_table                                      # noqa: E402
from exact import Exact, grammar                                                    # noqa: E402
from model import InputError, load                                                  # noqa: E402
from value import load_reward                                                       # noqa: E402

SHARED = ROOT.parent / "shared"
METHODS = "q,rounds-2,q-30,q-end,q-dV,plain,paper,static,static-h0,best-of,guided,prefix,dpo"
TASKS = {"toy": dict(model=train_value.TOY, tokens=32, rollouts=4000, samples=8000,
                     budgets=(0.1, 0.3, 0.8), best_of=(2, 3, 5),
                     dpo=(1e-4, 4, 1),                              # rate, epochs, beta
                     start=grammar.START),
         "twist": dict(model=Path(train_value.TOY, "twist"), tokens=24, rollouts=4000,
                       samples=8000, budgets=(0.1, 0.3, 0.8), best_of=(2, 3, 5), dpo=(1e-4, 2, 1),
                       start=grammar.START_TWIST),
         "reviews": dict(model=SHARED / "imdb-mini", tokens=24, rollouts=9600, samples=2400,
                         budgets=(0.5, 1, 2), best_of=(3, 6, 16), dpo=(3e-5, 1, 0.1),
                         prefix="This is one of the best films I have ever seen, I loved it.",
                         train=SHARED / "prompts" / "reviews-train.txt",
                         test=ROOT / "tests" / "openings.txt")}
REPORT = 1000       # the uniforms of training 1 have seed 1, of its report 1001, and so on

class Task:
    """Its model, reward and prompts, and the uncontrolled texts that gains are measured against"""
    def __init__(self, args):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        self.settings = task = TASKS[args.task]
        self.tokens, self.budgets, self.best_of = task["tokens"], task["budgets"], task["best_of"]
        self.samples, self.rollouts = args.samples, args.rollouts
        self.model, self.tokenizer = load(task["model"], "gpt2", args.device)
        self.reward, self.judge = (name and load_reward(name, args.device, "gpt2")
                                   for name in (args.reward, args.judge))
        self.train, self.test = (read_prompts(self.model, self.tokenizer, task["model"],
                                              path=task.get(key)) for key in ("train", "test"))
        self.exact = self.optimum(self.draw(self.test, 6000, 777, record=True)) if (
            "start" in task) else {}

    def optimum(self, rollout):
        return Exact(self.model, self.tokenizer, self.test, rollout, self.tokens,
                     self.settings["start"])

    def report_on(self, seed):
        """Every training reports on texts of its own: then its error is also that of the texts."""
        self.seed = REPORT + seed
        self.free = self.draw(self.test, self.samples, self.seed)
        self.base = self.score(self.test, self.free)
        self.judged = self.judge and self.score(self.test, self.free, self.judge)

    def draw(self, prompts, samples, seed, controller=None, **options):
        """-> a Rollout of so many texts, from the prompts in turn"""
        return generate(self.model, in_turn(prompts, samples),
                        uniform_table(samples, self.tokens, seed), controller,
                        batch=1024 if self.model.wte.weight.is_cuda else 128, **options)

    def partial(self, prompts, rollout, step_rewards, reward=None):
        rows = in_turn(prompts, len(rollout.mask))
        return train_value.partial_rewards(reward or self.reward, self.tokenizer, rows, rollout,
                                           step_rewards)

    def score(self, prompts, rollout, reward=None):
        return self.partial(prompts, rollout, False, reward)[:, -1]

    def learn(self, seed):
        """What methods learn from -> a Rollout with states, rewards so far (N, T + 1)"""
        rollout = self.draw(self.train, self.rollouts, seed, record=True)
        return rollout, self.partial(self.train, rollout, True)

    def uncontrolled(self):
        """The record that the table and the chart begin with"""
        exact = self.exact and {"optimum": [self.exact.kl.tolist(), self.exact.gain.tolist()]}
        return {"mean": self.base.mean().item()} | style(self.free) | exact

    def point(self, nats, kl, change, texts):
        """change (N,): each text's reward less that of its uncontrolled partner"""
        gain, error = change.mean().item(), (change.std() / len(change) ** 0.5).item()
        other = {"share": gain / self.exact.best(kl)} if self.exact else {}
        if self.judge:
            judged = self.score(self.test, texts, self.judge) - self.judged
            other["judged"] = judged.mean().item()
        return {"nats": nats, "kl": kl, "gain": gain, "error": error} | style(texts) | other

    def measure(self, nats, texts):
        kl = (texts.kl * texts.mask).sum(1).mean().item()
        return self.point(nats, kl, self.score(self.test, texts) - self.base, texts)

def in_turn(prompts, samples):
    return [prompts[i % len(prompts)] for i in range(samples)]

def style(texts):
    pairs = (texts.tokens[:, :-1] * 2 ** 20 + texts.tokens[:, 1:]).cpu()
    masks = texts.mask[:, 1:].cpu()
    groups = [part[mask] for part, mask in zip(pairs.split(100), masks.split(100))]
    return {"perplexity": (-texts.logp[texts.mask].mean()).exp().item(),
            "distinct": sum(len(part.unique()) / len(part) for part in groups) / len(groups)}

def climbing(value, radius=train_value.RADIUS, steps=1):
    return lambda hidden, size: ascend(value, hidden, steps, size / steps, radius)

def rewards_of(rollout, partial, step_rewards=True):
    if not step_rewards:                                                # all of it at the end
        ends = rollout.mask.sum(1, keepdim=True).cpu()
        partial = partial * (torch.arange(partial.size(1)) >= ends)
    return partial.diff(dim=1).float().to(rollout.mask.device)

def fit(task, rollout, rewards, seed, kind="q", **changed):
    settings = {**train_value.METHODS[kind], **changed}
    del settings["step_rewards"]
    return train_value.train(task.model, rollout, rewards, **settings, seed=seed)

def train(method, task, rollout, partial, seed):
    """-> control(hidden, step_size) -> u, and the net, if it has one"""
    if method.startswith("static"):
        return baselines.static(rollout, partial[:, -1], first=method == "static-h0"), None
    kind = method.split("-")[0]
    kind = {"guided": "plain", "literal": "paper", "rounds": "q"}.get(kind, kind)
    rewards = rewards_of(rollout, partial, kind == "q" and method not in ("q-end", "q-dV"))
    radius = math.inf if kind == "paper" or "free" in method else train_value.RADIUS
    if method == "literal":
        value = baselines.literal(rollout, rewards, seed)
        return climbing(value, radius, 30), value
    value = fit(task, rollout, rewards, seed, kind)
    if method == "q-dV":
        value.gradient_head = None
    steps = re.match(r"q-(\d+)", method)                                # rounds-2 takes one
    return climbing(value, radius, int(steps[1]) if steps else 1), value

def next_round(task, control, step, seed):
    """-> the control learnt from texts under this control, whose nats are taken off the rewards"""
    rollout = task.draw(task.train, task.rollouts, seed, lambda hidden: control(hidden, step),
                        record=True)
    rewards = rewards_of(rollout, task.partial(task.train, rollout, True))
    value = fit(task, rollout, rewards - rollout.kl * rollout.mask / step, seed)
    return climbing(value), rollout

def prepare(method, task, learned, seed):
    """-> setting(nats) -> texts() -> a Rollout to report on; the first two are what is timed"""
    rollout, partial = learned
    if method == "dpo":
        tuned = finetune.dpo(task.model, in_turn(task.train, len(rollout.mask)), rollout,
                             partial[:, -1], seed, *task.settings["dpo"])

        def tuned_texts(prompts, table, s):
            other = finetune.between(task.model, tuned, s)
            return finetune.compared(generate(other, prompts, table), task.model, prompts, other,
                                     prompts)
        return sized(tuned_texts, task, seed)
    control, value = train(method, task, *learned, seed)
    if method == "guided":
        return sized(functools.partial(baselines.guided, task.model, value), task, seed)
    rounds = int(method[7:]) if method.startswith("rounds") else 1
    return setting_of(control, task, rollout, [seed + 100 * i for i in range(1, rounds)])

def setting_of(control, task, rollout, seeds=()):
    """A setting whose step is found on the rollout, after a round of policy iteration a seed"""
    def setting(nats, control=control, states=rollout):
        step = step_for_kl(task.model, control, states, nats)
        for seed in seeds:
            control, states = next_round(task, control, step, seed)
            step = step_for_kl(task.model, control, states, nats)
        return lambda: task.draw(task.test, task.samples, task.seed,
                                 lambda hidden: control(hidden, step))
    return setting

def sized(texts, task, seed):
    """texts(prompts, uniforms, size) -> a setting whose size is searched on a few texts"""
    def some(prompts, n, seed, size):
        return texts(in_turn(prompts, n), uniform_table(n, task.tokens, seed), size)

    def setting(nats):
        size = baselines.size_for_kl(functools.partial(some, task.train, 256, seed), nats)
        return lambda: some(task.test, task.samples, task.seed, size)
    return setting

def trained_points(method, task, learned, seed, prepare=prepare):
    """-> points, seconds of preparation"""
    start = time.time()
    setting = prepare(method, task, learned, seed)
    spent, points = time.time() - start, []
    for nats in task.budgets:
        start = time.time()
        try:
            texts = setting(nats)
        except InputError as error:
            points.append({"nats": nats, "failed": str(error)})
            continue
        spent += time.time() - start
        points.append(task.measure(nats, texts()))
    return points, spent

def best_of_points(task, seed):
    """Every seed draws anew. The gain is over the mean of the very texts that are chosen from."""
    texts = [task.draw(task.test, task.samples, 1000 * seed + 1001 + i)
             for i in range(max(task.best_of))]
    rewards = torch.stack([task.score(task.test, drawn) for drawn in texts])    # (n, N)
    fields = [torch.stack(field) for field in zip(*(vars(drawn).values() for drawn in texts))]
    points, prompts = [], min(len(task.test), task.samples)
    for n in task.best_of:
        best, rows = rewards[:n].argmax(0), torch.arange(task.samples)
        kls = [baselines.best_of_kl(rewards[:, i::len(task.test)], n) for i in range(prompts)]
        points.append(task.point(n, sum(kls) / prompts, rewards[best, rows] - rewards.mean(0),
                                 Rollout(*(field[best, rows] for field in fields))))
    return points, 0.0

def prefix_points(task, _):
    """One point, at the KL that the sentence costs; the reward does not read the sentence"""
    prompts, bos = in_turn(task.test, task.samples), [task.model.config.bos_id]
    longer = [bos + task.tokenizer.encode(f"{task.settings['prefix']} {task.tokenizer.decode(p)}")
              for p in prompts]
    texts = task.draw(longer, task.samples, task.seed)
    return [task.measure(0, finetune.compared(texts, task.model, prompts, task.model, longer))], 0.0

def points_of(method, task, learned, seed):
    other = {"best-of": best_of_points, "prefix": prefix_points}.get(method)
    return other(task, seed) if other else trained_points(method, task, learned, seed)

def cell(points, exact):
    """gain ± standard error @ KL, share of the optimum"""
    if any("failed" in point for point in points):
        return f"{'no step costs it':>{22 if exact else 17}}"
    share = f" {100 * mean(points, 'share'):3.0f}%" if exact else ""
    gain = f"{mean(points, 'gain'):6.3f}±{error_of(points, 'gain')}"
    return f"{gain}@{mean(points, 'kl'):<5.2f}{share}"

def table(free, lines, methods):
    """A row a method, a column a budget"""
    exact, width, judge = "optimum" in free, max(map(len, methods)), free.get("judge")
    print(f"{free['task']}, {free['reward']}, {free['rollouts']} rollouts a training, "
          f"{free['samples']} texts a point")
    print(f"{'method':{width}}  n   gain ± error @ KL" + exact * ", % of optimum" +
          "; ppl, div, s" + f"; judge {judge}" * bool(judge))
    print(f"{'none':{width}}    reward {free['mean']:.3f}, ppl {free['perplexity']:.1f}, "
          f"div {free['distinct']:.3f}")
    for method in methods:
        if rows := [line for line in lines if line["method"] == method]:
            columns = [*zip(*(row["points"] for row in rows))]
            last = [point for point in columns[-1] if "gain" in point]
            style = (f" {mean(last, 'perplexity'):4.1f} {mean(last, 'distinct'):.3f}"
                     f" {mean(rows, 'seconds'):3.0f}" if last else "")
            if judge and last:
                style += f" {mean(last, 'judged'):6.3f}±{error_of(last, 'judged')}"
            print(f"{method:{width}} {len(rows):2} " +
                  " ".join(cell(points, exact) for points in columns) + style)

def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)

def error_of(rows, key):
    """The standard error over trainings, without its 0"""
    numbers = torch.tensor([row[key] for row in rows])
    return f"{numbers.std() / len(rows) ** 0.5:.3f}".lstrip("0") if len(rows) > 1 else "   -"

def parse_args(description, methods=METHODS):
    parser = argparse.ArgumentParser(description=description.split("\n")[1])
    parser.add_argument("--task", choices=TASKS, default="toy")
    parser.add_argument("--methods", default=methods, help="separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="trainings a method")
    parser.add_argument("--samples", type=int, help="texts reported on, a point")
    parser.add_argument("--rollouts", type=int, help="texts learnt from, a training")
    parser.add_argument("--reward", default="sentiment", help="as for train_value.py")
    parser.add_argument("--judge", help="another reward, that nothing is trained or steered by")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where records are kept (out/TASK.jsonl)")
    args = parser.parse_args()
    args.json = args.json or ROOT / "out" / f"{args.task}.jsonl"
    args.samples = args.samples or TASKS[args.task]["samples"]
    args.rollouts = args.rollouts or TASKS[args.task]["rollouts"]
    return args

def records(path, methods, args, points_of=points_of):
    """The records in the file; missing ones are added to it as they come"""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    settings = {key: vars(args)[key] for key in ("task", "reward", "judge", "samples", "rollouts")}
    if any(line.get(key) != settings[key] for line in lines for key in settings):
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
            task.report_on(seed)
            if not lines:
                add("none", 0, **task.uncontrolled())
            learned = task.learn(seed) if {*missing} - {"best-of", "prefix"} else None
        for method in missing:
            if method == "prefix" and (seed > 1 or "prefix" not in task.settings):
                continue                                            # nothing is trained
            points, spent = points_of(method, task, learned, seed)
            add(method, seed, points=points, seconds=spent)
            print(f"seed {seed} {method}: {[round(p.get('gain', math.nan), 3) for p in points]}",
                  file=sys.stderr, flush=True)
    return lines

def main(args, points_of=points_of):
    methods = args.methods.split(",")
    free, *lines = records(args.json, methods, args, points_of)
    table(free, lines, methods)

if __name__ == "__main__":
    main(parse_args(__doc__))
