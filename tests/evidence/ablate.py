"""
One setting of q changed at a time: what the gain owes to each.

    python tests/evidence/ablate.py                                   # the tiny language
    python tests/evidence/ablate.py --task reviews --seeds 3 --methods q,real,none

Rows are those of compare.py, one set of rollouts a seed for all; records are kept as there.

    q         as it is
    no-head   V differentiated, trained on the same step rewards
    real      whitening by the drawn scores alone; uniform: by uniformly chosen tokens alone
    none      no whitening
    lam-..    TD(lambda); epochs-..; width-.. of the hidden layer; no-decay of the weights
    steps-..  of gradient ascent, which share the step size; open: without the ball; ball-..: with
              another radius, in typical distances of a state from the mean
"""
import math
from functools import partial

import torch

import compare
import train_value
from value import ValueNet

whitening = train_value.whitening
# {row: (constants of train_value, settings of its train, how control climbs)}
ROWS = {"q": ({}, {}, {}), "no-head": ({}, {"gradient_head": False}, {}),
        "real": ({"whitening": lambda scores, W: whitening(scores, W[:1])}, {}, {}),
        "uniform": ({"whitening": lambda scores, W: whitening(0 * scores[:1], W)}, {}, {}),
        "none": ({"whitening": lambda scores, W: torch.eye(len(W[0]), device=W.device)}, {}, {}),
        **{f"lam-{lam:g}": ({}, {"lam": lam}, {}) for lam in (0.0, 0.5, 0.95, 1.0)},
        **{f"epochs-{n}": ({"EPOCHS": n}, {}, {}) for n in (1, 2, 8)},
        **{f"width-{n}": ({"ValueNet": partial(ValueNet, width=n)}, {}, {}) for n in (16, 256)},
        "no-decay": ({"DECAY": 0.0}, {}, {}),
        **{f"steps-{n}{end}": ({}, {}, {"steps": n, "radius": radius}) for n in (1, 5, 30)
           for end, radius in (("", train_value.RADIUS), ("-open", math.inf)) if n > 1 or end},
        **{f"ball-{radius:g}": ({}, {}, {"radius": radius}) for radius in (0.3, 1.0)}}

def prepare(row, task, learned, seed):
    """In the place of compare.prepare"""
    constants, changed, climb = ROWS[row]
    before = {name: getattr(train_value, name) for name in constants}
    vars(train_value).update(constants)
    settings = dict(train_value.METHODS["q"]) | changed
    del settings["step_rewards"]
    value = train_value.train(task.model, learned[0], compare.rewards_of(*learned), **settings,
                              seed=seed)
    vars(train_value).update(before)
    return compare.setting_of(compare.climbing(value, **climb), task, learned[0])

if __name__ == "__main__":
    args = compare.parse_args(__doc__, ",".join(ROWS))
    args.json = args.json.with_name(f"{args.json.stem}-ablate.jsonl")
    methods = args.methods.split(",")
    free, *lines = compare.records(args.json, methods, args,
                                   partial(compare.trained_points, prepare=prepare))
    compare.table(free, lines, methods)
