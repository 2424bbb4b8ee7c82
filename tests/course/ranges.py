"""
What the measuring exercises give over trainings 1 to 3: the ranges of README.md here.

    python -m tests.course.ranges               # about 15 minutes on one core
    python -m tests.course.ranges ridge         # one exercise

As a student would: a constant is changed, then train_value.py and sample.py run.
"""
import contextlib
import io
import math
import re
import sys
from pathlib import Path

import sample
import train_value

TOY = Path(train_value.TOY)
TRAININGS = 1, 2, 3
SHORT = "def short(texts): return [-len(text.split()) for text in texts]\n"
TWO = "def two(texts): return [-abs(text.split().count('the') - 2) for text in texts]\n"
STRENGTHS = ["--radius", "1000", "--strength", "1,2,4,8,16,32,64"]
# exercise: [(what, {constant: value}, arguments of train_value.py, of sample.py)]
EXERCISES = {
    "so-far": [("q", {}, [], []), ("q-end", {}, ["--method", "q-end"], [])],
    "lambda": [(f"{method} lambda {lam}", {"lam": lam}, ["--method", method], [])
               for method in ("q", "q-end") for lam in (0.0, 0.5, 1.0)],
    "ridge": [(f"{model.name} ridge {ridge}", {"RIDGE": ridge, "DECAY": 0.0},
               ["--model", str(model)], [])
              for model in (TOY, TOY / "late") for ridge in (0.0, 0.3, 30.0)],
    "slope": [(method, {}, ["--method", method], []) for method in ("plain", "paper")],
    "strength": [("q", {}, [], STRENGTHS)],
    "reward": [("short", {}, ["--reward", "out/my.py:short"], ["--reward", "out/my.py:short"])],
    "fails": [("two", {}, ["--reward", "out/my.py:two"], ["--reward", "out/my.py:two"])],
}


def quietly(main, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(arguments)
    return output.getvalue().splitlines()


def run(constants, train, draw, seed):
    """-> [(row of sample.py's table, gain, KL a text)], R^2 of V for the outcome"""
    before = {name: getattr(train_value, name) for name in ("RIDGE", "DECAY", "METHODS")}
    changed = dict(constants)
    lam = changed.pop("lam", None)
    if lam is not None:
        train_value.METHODS = {name: row | {"lam": lam} for name, row in before["METHODS"].items()}
    try:
        for name, number in changed.items():
            setattr(train_value, name, number)
        lines = quietly(train_value.main, [*train, "--seed", str(seed), "--out", "out/ranges.pt"])
    finally:
        for name, item in before.items():
            setattr(train_value, name, item)
    fit = re.search(r"R\^2 of V for the outcome ([-.\d]+\d)", "\n".join(lines))
    rows = []
    for line in quietly(sample.main, ["--value", "out/ranges.pt", "--show", "0", *draw]):
        if line.startswith("strength"):
            _, strength, _, gain, _, kl, *_ = line.split()
            rows.append((strength, float(gain), float(kl)))
    return rows, float(fit[1]) if fit else math.nan


def report(label, runs):
    """runs: what `run` gave, a training each -> a line a row of the table"""
    fits = [fit for _, fit in runs]
    for trainings in zip(*(rows for rows, _ in runs)):
        gains = [gain for _, gain, _ in trainings]
        kls = [kl for *_, kl in trainings]
        print(f"{label:20} strength {trainings[0][0]:3}"
              f" gain {min(gains):+.2f} to {max(gains):+.2f} @ {min(kls):.2f} to {max(kls):.2f}"
              f" nats, R^2 of V {min(fits):.2f} to {max(fits):.2f}", flush=True)


def main(chosen):
    Path("out").mkdir(exist_ok=True)
    Path("out/my.py").write_text(SHORT + TWO)
    for name in chosen or EXERCISES:
        print(f"\n{name}")
        for label, constants, train, draw in EXERCISES[name]:
            report(label, [run(constants, train, draw, seed) for seed in TRAININGS])


if __name__ == "__main__":
    main(sys.argv[1:])
