"""
Every method at equal KL: gain in reward, mean over trainings and its standard error.

    python -m tests.evidence.compare --task toy           # or twist, late, reviews

One set of rollouts a seed trains all methods. A step size is the one that costs the budget on the
states of these rollouts (guided, dpo, oracle: on 256 texts drawn with it), so nothing is tuned on the
draws of the report; the KL printed is what the reported texts cost. A gain is the mean reward less that
of the uncontrolled texts drawn with the same uniforms. On the tiny languages it is also given as a share
of the optimum at that KL (exact.py; chance may put it above 100%). Each training reports on draws of its
own, so that the error over trainings is also that of the texts. Each (method, seed) is added to --json as
it is done, and not done again.

    low     the lowest single training, in % of its row's mean, at its worst budget: of the share of
            the optimum where that is known, else of the gain
    R^2     of V for the outcome of uncontrolled texts that it has not seen (values.py has more)
    ppl     perplexity under the uncontrolled model, of the largest budget's texts
    div     distinct pairs of tokens among all pairs, in groups of 100 of these texts
    judge   their gain in the reward --judge
    s       seconds to train and to find the sizes, all budgets together, without drawing and scoring
            the rollouts (rounds: with those of later rounds)
"""
import argparse
import functools
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_value
from control import Rollout, generate, uniform_table
from model import InputError, in_turn, load, read_prompts, run_script
from tests.evidence import baselines, records, values
from tests.evidence.exact import Exact
from tests.evidence.methods import CONTROLS, FITS, METHODS, TRAINED
from tests.toy import grammar
from value import ValueNet, fingerprint, load_reward

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TOY = Path(train_value.TOY)
SETTINGS = ("task", "reward", "judge", "samples", "rollouts", "budgets")     # one a file
REPORT = 1000       # the uniforms of training 1 have seed 1, of its report 1001, and so on
EXACT = 6000        # texts whose states give the exact values
# Baselines have one setting for the tiny languages and one for reviews (dpo: one for each task), chosen
# on seeds 101 and up. q's are the same on all tasks.
TINY = dict(rollouts=4000, samples=8000, budgets=(0.1, 0.3, 0.8), best_of=(2, 3, 5),
            dpo=dict(rate=1e-4, epochs=4, beta=1), lm_steer=1e-3, rad_q=1e-2)
TASKS = {
    "toy": TINY | dict(model=TOY, tokens=32, start=grammar.START),
    "twist": TINY | dict(model=TOY / "twist", tokens=24, start=grammar.START_TWIST,
                         dpo=dict(rate=1e-4, epochs=2, beta=1)),
    "late": TINY | dict(model=TOY / "late", tokens=24, start=grammar.START_LATE),
    "reviews": dict(model=SHARED / "imdb-mini", tokenizer="gpt2", tokens=24,
                    train=SHARED / "prompts" / "reviews-train.txt",
                    test=ROOT / "tests" / "openings.txt",
                    rollouts=4800, samples=1200, budgets=(0.3, 1.0), best_of=(2, 3, 6),
                    dpo=dict(rate=3e-5, epochs=1, beta=0.1), lm_steer=1e-4, rad_q=1e-4),
}


# ---------------------------------------------------------------------------------------- the task

@dataclass
class Texts:
    """Drawn and scored: so_far (N, T), the reward before y_t; outcome (N,), that of the whole text"""
    prompts: list
    rollout: Rollout
    so_far: torch.Tensor
    outcome: torch.Tensor


class Task:
    """Model, prompts and reward; and the uncontrolled texts that gains are measured against"""

    def __init__(self, args):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        self.args = args
        self.settings = TASKS[args.task]
        self.tokens = self.settings["tokens"]
        name = self.settings["model"]
        self.model, self.tokenizer = load(name, self.settings.get("tokenizer"),
                                           args.device)
        self.reward = load_reward(args.reward, args.device, "gpt2")
        self.judge = load_reward(args.judge, args.device, "gpt2") if args.judge else None
        self.train = read_prompts(self.model, self.tokenizer, name, path=self.settings.get("train"))
        self.test = read_prompts(self.model, self.tokenizer, name, path=self.settings.get("test"))
        self.exact = None
        if "start" in self.settings and args.reward == "sentiment":
            self.seen = self.roll_out(self.test, EXACT, 777)
            self.exact = Exact(self.model, self.tokenizer, self.test, self.seen.rollout, self.tokens,
                               self.settings["start"])

    def draw(self, prompts, samples, seed, controller=None, **options):
        """-> a Rollout of so many texts, from the prompts in turn"""
        batch = 1024 if self.model.wte.weight.is_cuda else 128
        return generate(self.model, in_turn(prompts, samples, seed),
                        uniform_table(samples, self.tokens, seed), controller, batch=batch, **options)

    def roll_out(self, prompts, samples, seed, controller=None):
        """-> Texts, with their states and the reward of every beginning"""
        rows = in_turn(prompts, samples, seed)
        rollout = self.draw(prompts, samples, seed, controller, record=True)
        so_far, outcome = train_value.score(self.reward, self.tokenizer, rows, rollout)
        return Texts(rows, rollout, so_far, outcome)

    def learn(self, seed):
        """What all methods of this seed learn from -> Texts, kept in --cache if that is given"""
        draw = functools.partial(self.roll_out, self.train, self.args.rollouts, seed)
        if not self.args.cache:
            return draw()
        reward = Path(self.args.reward).name
        path = self.args.cache / f"{self.args.task}-{reward}-{self.args.rollouts}-{seed}.pt"
        model = fingerprint(self.model)
        if path.exists():
            saved = torch.load(path, map_location=self.args.device)
            if torch.equal(saved.pop("model"), model):
                return Texts(**saved | {"rollout": Rollout(**saved["rollout"])})
        texts = draw()
        saved = vars(texts) | {"rollout": vars(texts.rollout), "model": model}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(saved, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        return texts

    def report_on(self, seed):
        """Every training reports on texts of its own: then its error is also that of the texts."""
        self.seed = REPORT + seed
        self.free = self.roll_out(self.test, self.args.samples, self.seed)
        if self.judge:
            self.judged = self.score(self.free.rollout, self.judge)

    def score(self, rollout, reward=None):
        rows = in_turn(self.test, len(rollout.mask), self.seed)
        return (reward or self.reward)(rollout.texts(self.tokenizer, rows))

    def measure(self, nats, rollout):
        """-> the record of texts drawn with the report's uniforms"""
        kl = (rollout.kl * rollout.mask).sum(1).mean().item()
        return self.point(nats, kl, self.score(rollout) - self.free.outcome, rollout)

    def point(self, nats, kl, change, rollout):
        """change (N,): each text's reward less that of its uncontrolled partner"""
        error = (change.std() / len(change) ** 0.5).item()
        found = {"nats": nats, "kl": kl, "gain": change.mean().item(), "error": error}
        if self.judge:
            found["judged"] = (self.score(rollout, self.judge) - self.judged).mean().item()
        return found | style(rollout)

    def uncontrolled(self):
        """The record that a file begins with"""
        found = {"mean": self.free.outcome.mean().item()} | style(self.free.rollout)
        if self.exact:
            found["optimum"] = [self.exact.kl.tolist(), self.exact.gain.tolist()]
            found["mean value"] = [self.exact.mean_value_kl.tolist(),
                                   self.exact.mean_value_gain.tolist()]
        return found

    def quality(self, value):
        """What values.py prints of a net"""
        found = values.quality(value, self.free)
        if self.exact:
            truth, where = self.exact.truth()
            found["exact"] = values.r_squared(values.forecasts(value, self.seen)[where], truth)
        return found


def style(rollout):
    pairs = (rollout.tokens[:, :-1] * 2 ** 20 + rollout.tokens[:, 1:]).cpu()
    masks = rollout.mask[:, 1:].cpu()
    groups = [part[mask] for part, mask in zip(pairs.split(100), masks.split(100))]
    distinct = sum(len(part.unique()) / len(part) for part in groups) / len(groups)
    perplexity = (-rollout.log_p[rollout.mask].mean()).exp().item()
    return {"perplexity": perplexity, "distinct": distinct}


# -------------------------------------------------------------------------------- one training

def train_and_report(task, method, texts, seed):
    """-> the record of one training"""
    started = time.time()
    fitted = FITS[method["fit"]](task, method, texts, seed)
    seconds = time.time() - started
    points = []
    for nats in task.args.budgets:
        started = time.time()
        try:
            draw = CONTROLS[method["control"]](task, method, texts, fitted, seed, nats)
        except InputError as error:
            points.append({"nats": nats, "failed": str(error)})
            continue
        seconds += time.time() - started
        points.append(task.measure(nats, draw()))
    found = {"points": points, "seconds": seconds}
    if isinstance(fitted, ValueNet) and method["rounds"] == 1:
        found["values"] = task.quality(fitted)
    return found


def best_of(task, seed, equal_compute):
    """
    Every seed draws anew. The gain is over the mean of all its draws, those of the largest n.

    equal_compute: the rollouts of a training are spent on more draws of the reported texts instead.
    """
    sizes = task.settings["best_of"]
    if equal_compute:
        sizes = [1 + math.ceil(task.args.rollouts / task.args.samples)]
    samples, prompts = task.args.samples, min(len(task.test), task.args.samples)
    tables = [task.draw(task.test, samples, 1000 * seed + 1001 + i) for i in range(max(sizes))]
    rewards = torch.stack([task.score(drawn) for drawn in tables])              # (n, N)
    fields = [torch.stack(field) for field in zip(*(vars(drawn).values() for drawn in tables))]
    points = []
    for n in sizes:
        best = rewards[:n].argmax(0)                                            # (N,)
        chosen = Rollout(*(field[best, torch.arange(samples)] for field in fields))
        kls = [baselines.best_of_kl(rewards[:, i::len(task.test)], n) for i in range(prompts)]
        change = rewards[best, torch.arange(samples)] - rewards.mean(0)
        points.append(task.point(n, sum(kls) / prompts, change, chosen))
    return {"points": points, "seconds": 0.0}


# --------------------------------------------------------------------------------------- the table

def cell(points, optimum):
    """gain ± standard error @ KL, share of the optimum"""
    if any("failed" in point for point in points):
        return f"{'no step costs it':>{24 if optimum else 17}}"
    gain = records.mean(points, "gain")
    text = f"{gain:6.3f}±{records.error_of(points, 'gain')}@{records.mean(points, 'kl'):<5.2f}"
    if optimum:
        text += f" {records.share(optimum, points):5.1f}%"
    return text


def lowest(columns, optimum):
    """The lowest single training, as % of its row's mean, at its worst budget"""
    found = []
    for points in columns:
        points = [point for point in points if "gain" in point]
        best = [records.at_kl(optimum, point["kl"]) if optimum else 1.0 for point in points]
        gains = [point["gain"] / largest for point, largest in zip(points, best)]
        mean = sum(gains) / max(len(gains), 1)
        if mean > 0 and len(gains) > 1:
            found.append(100 * min(gains) / mean)
    return f"{min(found):4.0f}" if found else "   -"


def print_row(name, lines, optimum, width):
    columns = list(zip(*(line["points"] for line in lines)))
    text = f"{name:{width}} {len(lines):2} " + " ".join(cell(points, optimum) for points in columns)
    text += f" {lowest(columns, optimum)}"
    qualities = [line["values"] for line in lines if "values" in line]
    text += f" {records.mean(qualities, 'outcome'):6.3f}" if qualities else "      -"
    last = [point for point in columns[-1] if "gain" in point]
    if last:
        text += f" {records.mean(last, 'perplexity'):5.1f} {records.mean(last, 'distinct'):.3f}"
        text += f" {records.mean(lines, 'seconds'):3.0f}"
        if "judged" in last[0]:
            text += f" {records.mean(last, 'judged'):6.3f}±{records.error_of(last, 'judged')}"
    print(text)


def print_table(free, lines, methods):
    """A row a method, a column a budget"""
    optimum = free.get("optimum")
    width = max(map(len, [*methods, "best for E[R]"]))
    print(f"{free['task']}, {free['reward']}, {free['rollouts']} rollouts a training, "
          f"{free['samples']} texts a point")
    shares = ", % of optimum" if optimum else ""
    judge = f"; judge {free['judge']}" if free["judge"] else ""
    print(f"{'method':{width}}  n   gain ± error @ KL{shares}; low, R^2, ppl, div, s{judge}")
    print(f"{'none':{width}}    reward {free['mean']:.3f}, ppl {free['perplexity']:.1f}, "
          f"div {free['distinct']:.3f}")
    if optimum:
        for name, curve in {"the optimum": optimum, "best for E[R]": free["mean value"]}.items():
            cells = []
            for nats in free.get("budgets", TASKS[free["task"]]["budgets"]):
                point = {"kl": nats, "gain": records.at_kl(curve, nats)}
                share = records.share(optimum, [point])
                cells.append(f"{point['gain']:6.3f}    @{nats:<5.2f} {share:5.1f}%")
            print(f"{name:{width}}    " + " ".join(cells))
    for method in methods:
        found = [line for line in lines if line["method"] == method]
        if found:
            print_row(method, found, optimum, width)


# -------------------------------------------------------------------------------------- the script

def constants():
    """What a training depends on besides its row"""
    names = ("RIDGE", "DECAY", "LAMBDA", "LAMBDA_END", "RATE", "EPOCHS", "BATCH")
    found = {name: getattr(train_value, name) for name in names}
    return found | {"width": ValueNet(1).body[0].out_features}


def possible(name, args, seed):
    """The oracle needs the exact values and a CPU, and as it learns nothing, it is drawn once"""
    has_exact = "start" in TASKS[args.task] and args.reward == "sentiment" and args.device == "cpu"
    return name != "oracle" or (has_exact and seed == args.first_seed)


def check_same(path, line, settings):
    """Stop, unless a file's line was made with the settings of this run"""
    ours = settings | constants()
    theirs = line | line.get("constants", {})
    for key in ours.keys() & theirs.keys():
        if theirs[key] != ours[key]:
            sys.exit(f"{path} was made with {key} {theirs[key]}, not {ours[key]}; name another --json")


def complete(args, methods):
    """Add what the file lacks: a line a (method, seed)"""
    settings = {key: vars(args)[key] for key in SETTINGS}
    free, lines = records.read(args.json)
    for line in [free or {}, *lines]:
        check_same(args.json, line, settings)
    done = {(line["method"], line["seed"]) for line in lines}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    origin = {"commit": commit, "torch": torch.__version__, "device": args.device}
    task = None
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        missing = [name for name in methods if (name, seed) not in done and possible(name, args, seed)]
        if not missing:
            continue
        task = task or Task(args)
        task.report_on(seed)
        if not free:
            free = {"method": "none", "seed": seed} | settings | origin | task.uncontrolled()
            records.add(args.json, free)
        texts = task.learn(seed) if set(missing) & set(TRAINED) else None
        for name in missing:
            method = METHODS[name]
            line = {"method": name, "seed": seed} | settings | origin | {"row": method}
            if method["fit"] in (*train_value.METHODS, "one-g"):
                line["constants"] = constants()
            if method["control"] == "best-of":
                line |= best_of(task, seed, name == "best-of-compute")
            else:
                line |= train_and_report(task, method, texts, seed)
            records.add(args.json, line)
            gains = [round(point.get("gain", math.nan), 3) for point in line["points"]]
            print(f"seed {seed} {name}: {gains}", file=sys.stderr, flush=True)


def numbers(text):
    return [float(number) for number in text.split(",")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--task", choices=TASKS, default="toy")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="trainings a method")
    parser.add_argument("--first-seed", type=int, default=1, help="101: development")
    parser.add_argument("--samples", type=int, help="texts reported on, a point")
    parser.add_argument("--rollouts", type=int, help="texts learnt from, a training")
    parser.add_argument("--budgets", type=numbers, help="nats asked: 1,2,4,8")
    parser.add_argument("--reward", default="sentiment", help="as for train_value.py")
    parser.add_argument("--judge", help="another reward, that nothing is trained or steered by")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where records are kept (out/TASK.jsonl)")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the rollouts, to add methods")
    args = parser.parse_args(argv)
    unknown = set(args.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    args.json = args.json or ROOT / "out" / f"{args.task}.jsonl"
    args.samples = args.samples or TASKS[args.task]["samples"]
    args.rollouts = args.rollouts or TASKS[args.task]["rollouts"]
    args.budgets = args.budgets or list(TASKS[args.task]["budgets"])
    return args


def main(argv=None):
    args = parse_args(argv)
    methods = args.methods.split(",")
    complete(args, methods)
    free, lines = records.read(args.json)
    asked = range(args.first_seed, args.first_seed + args.seeds)
    print_table(free, [line for line in lines if line["seed"] in asked], methods)


if __name__ == "__main__":
    run_script(main)
