"""
The tables and pictures of the evidence, made again from an empty out/. (Not: sweeps of settings, which
RESULTS.md has commands for; what needs a GPU; PUBLISHED.md.)

    python -m tests.evidence.all                    # goes on where it was stopped
    python -m tests.evidence.all --list             # what there is, and how long each takes
    python -m tests.evidence.all --only toy,trace

A step's output goes to out/tables/STEP.txt when it is done, and it is not done again; within a step
compare.py goes on at the training where it was stopped. Minutes are of one core (OMP_NUM_THREADS=1)
of a shared machine; those of reviews-9600 are an estimate. At the end the records and pictures stand in
out/: look at them, then copy them to tests/evidence.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out"
COMPARE = "tests.evidence.compare --cache out/cache"
REVIEWS = f"{COMPARE} --task reviews --seeds 3"
JUDGE = "--judge ../shared/imdb-reward"
# step: (minutes, modules and their arguments)
STEPS = {
    "toy": (60, f"{COMPARE} --task toy", "tests.evidence.values out/toy.jsonl"),
    "twist": (50, f"{COMPARE} --task twist", "tests.evidence.values out/twist.jsonl"),
    "late": (50, f"{COMPARE} --task late", "tests.evidence.values out/late.jsonl"),
    "frontier": (1, "tests.evidence.chart out/toy.jsonl out/frontier.svg "
                    "--methods q,one-g,lm-steer,static,plain",),
    "front": (6, "tests.evidence.front out/front.svg",),
    "trace": (1, "train_value --out out/trace.pt", "tests.evidence.trace out/trace.pt out/trace.svg"),
    "reviews": (60, f"{REVIEWS} --methods q,q-end,one-g,static,plain,paper,lm-steer,rad-q,best-of {JUDGE}",
                "tests.evidence.values out/reviews.jsonl"),
    # look-ahead runs the model 20 times a token: one budget, a quarter of the texts
    "guided": (10, f"{REVIEWS} --methods q,guided --samples 300 --budgets 1 --json out/guided.jsonl",),
    "overdose": (10, f"{REVIEWS} --methods q --budgets 1,2,4,8,16,32 --samples 400 {JUDGE} "
                     "--json out/overdose.jsonl",
                 "tests.evidence.chart out/overdose.jsonl out/overdose.svg --methods q "
                 "--shown gain,judged,perplexity,distinct"),
    # reward and judge change places
    "learned": (25, f"{REVIEWS} --methods q,q-end,one-g,static --reward ../shared/imdb-reward "
                    "--judge sentiment --rollouts 2400 --samples 800 --json out/learned.jsonl",),
    "reviews-9600": (90, f"{REVIEWS} --methods q,q-end,one-g,static --rollouts 9600 --samples 2400 "
                         "--budgets 0.1,0.3,0.8,1 --json out/reviews-9600.jsonl",),
    "bench": (10, "tests.evidence.bench --batches 1,32",),
}


def run(step):
    """Run a step's commands; False if one failed. Its table is written when all went well."""
    minutes, *commands = STEPS[step]
    table = OUT / "tables" / f"{step}.txt"
    if table.exists():
        print(f"{step}: done, {table.relative_to(ROOT)}")
        return True
    print(f"{step}: about {minutes} minutes", flush=True)
    started = time.time()
    printed = ""
    for command in commands:
        result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE)
        printed += f"$ python -m {command}\n{result.stdout}\n"
        if result.returncode:
            print(f"{step}: failed\n{printed}")
            return False
    took = (time.time() - started) / 60
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(f"{printed}{took:.1f} minutes\n", encoding="utf-8")
    print(f"{printed}{step}: {took:.1f} minutes", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--list", action="store_true", help="print the steps and do nothing")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    args = parser.parse_args()
    steps = args.only.split(",")
    if not set(steps) <= set(STEPS):
        parser.error("steps are " + ",".join(STEPS))
    if args.list:
        for step in steps:
            minutes, *commands = STEPS[step]
            print(f"{step}, about {minutes} minutes")
            print(*(f"    python -m {command}" for command in commands), sep="\n")
        return
    done = [run(step) for step in steps]
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
