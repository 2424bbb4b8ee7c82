"""
A controller of one's own: its share of the best possible gain on the three tiny languages.

    python -m tests.course.leaderboard DIR ..               # for the teacher: a seed nobody knows
    python -m tests.course.leaderboard DIR --seed 7         # for students: a trial

DIR/controller.py has a function like `static` and `q` below, the marks to beat:

    def make(model, tokenizer, prompts, n_tokens):      # learn, from texts that you draw yourself
        ..
        return controller_at                            # (hidden (B, n_embd), step_size) -> u

The step size is the one that costs NATS a text. Texts are then drawn with the seed. A share is the
gain in reward over the largest gain of all controllers at the KL that these texts cost (exact.py).
Each runs in a process of its own, SECONDS of CPU time a language; grade.py says what is not safe.
"""
import argparse
import ast
import runpy
import secrets
import tempfile
from functools import partial
from pathlib import Path

import torch

from control import ascend, generate, step_for_kl, uniform_table
from model import in_turn, load, read_prompts
from tests.course.exercises import explain
from tests.course.grade import flagged, run_apart
from tests.course.handout import ROOT, CourseError, last_commit, run_script
from tests.evidence.exact import Exact
from tests.toy import grammar
from train_value import METHODS, rewards_at_end, score, train
from value import load_reward

NATS = 0.3          # a text
SECONDS = 300
TEXTS = 4000
LANGUAGES = {"first": (".", 32, grammar.START),             # folder in tests/toy, tokens, start
             "twist": ("twist", 24, grammar.START_TWIST),
             "late": ("late", 32, grammar.START_LATE)}
REWARD = load_reward("sentiment")


def static(model, tokenizer, prompts, n_tokens):
    """One direction for all states: mean of (reward - its mean) grad_log_p"""
    rows = in_turn(prompts, TEXTS, 1)
    rollout = generate(model, rows, uniform_table(TEXTS, n_tokens, 1), record=True)
    reward = REWARD(rollout.texts(tokenizer, rows)).float()
    surprise = (reward - reward.mean())[:, None, None]
    direction = (surprise * rollout.grad_log_p)[rollout.mask].mean(0)
    return lambda hidden, step_size: (step_size * direction).expand_as(hidden)


def q(model, tokenizer, prompts, n_tokens):
    """train_value.py's default"""
    rows = in_turn(prompts, TEXTS, 1)
    rollout = generate(model, rows, uniform_table(TEXTS, n_tokens, 1), record=True)
    so_far, outcome = score(REWARD, tokenizer, rows, rollout)
    settings = dict(METHODS["q"])
    radius = settings.pop("radius")
    value = train(model, rollout, so_far, rewards_at_end(outcome, rollout.mask), **settings, seed=1)
    return lambda hidden, step_size: ascend(value, hidden, 1, step_size, radius)


class Language:
    """A tiny model, its texts without control at this seed, and its exact optimum"""

    def __init__(self, folder, n_tokens, start, seed, texts):
        path = ROOT / "tests" / "toy" / folder
        self.n_tokens = n_tokens
        self.model, self.tokenizer = load(path)
        self.prompts = read_prompts(self.model, self.tokenizer, path)
        self.rows = in_turn(self.prompts, texts, seed)
        self.table = uniform_table(texts, n_tokens, seed)
        self.free = generate(self.model, self.rows, self.table, record=True)
        self.before = self.reward(self.free)
        self.exact = Exact(self.model, self.tokenizer, self.prompts, self.free, n_tokens, start)

    def reward(self, rollout):
        return REWARD(rollout.texts(self.tokenizer, self.rows)).mean().item()

    def share(self, make):
        """-> share of the largest gain, gain, KL in nats a text"""
        controller_at = make(self.model, self.tokenizer, self.prompts, self.n_tokens)
        step_size = step_for_kl(self.model, controller_at, self.free, NATS)
        controller = partial(controller_at, step_size=step_size)
        drawn = generate(self.model, self.rows, self.table, controller)
        kl = (drawn.kl * drawn.mask).sum(1).mean().item()
        gain = self.reward(drawn) - self.before
        return gain / self.exact.best(kl), gain, kl


def measure(languages, source):
    """A function like `q`, or a controller.py's path -> {language: (share, gain, KL)}, an error"""
    results = {}
    for name, language in languages.items():
        def work(tell):
            try:
                make = source if callable(source) else runpy.run_path(str(source))["make"]
                tell(*language.share(make))
            except Exception as error:                      # foreign code may raise anything
                tell(explain(error))
        with tempfile.TemporaryDirectory() as folder:
            told, end = run_apart(work, folder, SECONDS)
        if not told or len(told[0]) != 3:
            return results, f"{name}: {told[0][0] if told else end}"
        results[name] = told[0]
    return results, ""


def show(name, results, error, look_at):
    cells = [f"{language} {share:4.0%} ({gain:+.3f} @ {kl:.2f})"
             for language, (share, gain, kl) in results.items()]
    print(f"{name:16}", *cells, error, *look_at, sep="  ", flush=True)


def main(argv):
    parser = argparse.ArgumentParser(prog="leaderboard", description=__doc__.split("\n")[1])
    parser.add_argument("folders", nargs="*", metavar="DIR")
    parser.add_argument("--seed", type=int, help="of the texts; None: a new one, printed last")
    parser.add_argument("--texts", type=int, default=4000)
    args = parser.parse_args(argv)
    paths = [Path(folder, "controller.py").resolve() for folder in args.folders]
    for path in paths:
        if not path.is_file():
            raise CourseError(f"{path}: not there; name folders with a controller.py")
    seed = args.seed
    if seed is None:
        last_commit(ROOT)                                   # earlier entrants may have changed it
        seed = secrets.randbelow(10 ** 9) + 10
    torch.set_num_threads(1)
    languages = {name: Language(*row, seed, args.texts) for name, row in LANGUAGES.items()}
    table = {"(static)": (*measure(languages, static), []), "(q)": (*measure(languages, q), [])}
    for folder, path in zip(args.folders, paths):
        try:
            look_at = flagged([ast.parse(path.read_bytes()).body], path.name)
        except (SyntaxError, ValueError) as error:
            table[folder] = ({}, f"{path.name}: {error}", [])
            continue
        table[folder] = (*measure(languages, path), look_at)

    def mean(name):
        return sum(share for share, *_ in table[name][0].values()) / len(LANGUAGES)
    for name in sorted(table, key=mean, reverse=True):
        show(name, *table[name])
    print(f"seed {seed}; share of the largest gain at that KL (gain @ KL in nats a text)")


if __name__ == "__main__":
    run_script(main)
