"""
Two rewards at once, praise and length: the front between them at equal KL, by adding two nets' g.

    python -m tests.evidence.front out/front.svg            # six minutes of CPU; prints the table, draws it

    R = cos(a) praise / its deviation + sin(a) length / its deviation

The sum of two nets controls by g = cos(a) g_praise / deviation + sin(a) g_length / deviation: two
trainings serve every angle a. Beside it are nets that were trained on R itself, one for each angle. All
learn from the same rollouts of the tiny language; a step size is searched that makes texts cost NATS.
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch

import train_value
from control import RADIUS, ascend, generate, uniform_table
from model import in_turn, load, read_prompts
from tests.evidence import baselines, records
from tests.evidence.chart import GAP, HEIGHT, LEGEND, WIDTH, Panel, legend, svg
from value import load_reward

ANGLES = (-90, -60, -30, 0, 30, 60, 90)     # degrees; 0: praise alone, 90: long texts, -90: short ones
NATS = 0.3
TOKENS = 32
ROLLOUTS = SAMPLES = 4000
FEW = 400                                   # texts that a step size is searched on
REPORT = 1000                               # the texts of training 1 have seed 1, of its report 1001
SUM, SINGLE = "sum of two nets", "trained on R"


class Sum:
    """Two nets that control at once: weights times their g"""

    def __init__(self, nets, weights):
        self.nets, self.weights = nets, weights
        self.std = nets[0].std              # of the hidden states: the same for nets of one seed

    def gradient(self, hidden):
        return sum(weight * net.gradient(hidden) for net, weight in zip(self.nets, self.weights))


praise = load_reward("sentiment")


def length(texts):
    """-> the number of words and full stops of each text"""
    return torch.tensor([len(text.split()) for text in texts], dtype=torch.float64)


def one_training(seed):
    """-> {(method, angle): gains in praise and in words, and KL}"""
    model, tokenizer = load(train_value.TOY)
    prompts = read_prompts(model, tokenizer, train_value.TOY)
    rows = in_turn(prompts, ROLLOUTS, seed)
    rollout = generate(model, rows, uniform_table(ROLLOUTS, TOKENS, seed), record=True)
    praise_so_far, praises = train_value.score(praise, tokenizer, rows, rollout)
    words_so_far, words = train_value.score(length, tokenizer, rows, rollout)
    settings = dict(train_value.METHODS["q"])
    del settings["radius"]

    def fit(weights):
        """A net for the weighted sum of both rewards"""
        so_far = weights[0] * praise_so_far + weights[1] * words_so_far
        outcome = weights[0] * praises + weights[1] * words
        rewards = train_value.rewards_at_end(outcome, rollout.mask)
        return train_value.train(model, rollout, so_far, rewards, **settings, seed=seed)

    def draw(value=None, size=0.0, samples=SAMPLES, draw_seed=REPORT + seed):
        rows = in_turn(prompts, samples, draw_seed)
        controller = None
        if value is not None:
            controller = partial(ascend, value, step_size=size, radius=RADIUS)
        return rows, generate(model, rows, uniform_table(samples, TOKENS, draw_seed), controller)

    def measure(rows, drawn):
        texts = drawn.texts(tokenizer, rows)
        kl = (drawn.kl * drawn.mask).sum(1).mean().item()
        return praise(texts).mean().item(), length(texts).mean().item(), kl

    free = measure(*draw())
    nets = [fit((1, 0)), fit((0, 1))]
    found = {}
    for angle in ANGLES:
        a = math.radians(angle)
        weights = (math.cos(a) / praises.std().item(), math.sin(a) / words.std().item())
        for method, value in {SUM: Sum(nets, weights), SINGLE: fit(weights)}.items():
            size = baselines.size_for_kl(lambda size: draw(value, size, FEW, seed)[1], NATS)
            praised, long, kl = measure(*draw(value, size))
            found[method, angle] = {"praise": praised - free[0], "words": long - free[1], "kl": kl}
    return found


def print_table(trainings):
    print(f"gain in praise, in words, @ KL: mean and standard error over {len(trainings)} trainings\n"
          f"angle  {SUM:32} {SINGLE}")
    for angle in ANGLES:
        cells = []
        for method in (SUM, SINGLE):
            rows = [found[method, angle] for found in trainings]
            cells.append(f"{records.mean(rows, 'praise'):6.3f}±{records.error_of(rows, 'praise')} "
                         f"{records.mean(rows, 'words'):6.2f}±{records.error_of(rows, 'words')} "
                         f"@{records.mean(rows, 'kl'):<7.2f}")
        print(f"{angle:5}  " + " ".join(cells))


def picture(trainings):
    curves = {}
    for method in (SUM, SINGLE):
        rows = [[found[method, angle] for found in trainings] for angle in ANGLES]
        curves[method] = [(records.mean(row, "praise"), records.mean(row, "words")) for row in rows]
    points = sum(curves.values(), [])
    low, high = min(words for _, words in points), max(words for _, words in points)
    left, right = min(0.0, *(x for x, _ in points)), max(x for x, _ in points)
    panel = Panel(0, 0, 1.05 * right, 1.05 * low, 1.05 * high, "gain in words", left=1.05 * left,
                  across=f"gain in praise, at about {NATS} nats a text")
    panel.text(0, 0, "○", 'dy="4" text-anchor="middle"')
    for number, row in enumerate(curves.values()):
        panel.draw([(*point, 0.0) for point in row], number)
    width = WIDTH + GAP + LEGEND + 40
    return svg(panel.parts + legend(list(curves), False, WIDTH + GAP), width, HEIGHT)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("svg", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="trainings")
    args = parser.parse_args(argv)
    trainings = [one_training(seed) for seed in range(1, args.seeds + 1)]
    print_table(trainings)
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(picture(trainings), encoding="utf-8")


if __name__ == "__main__":
    main()
