"""
Choose each method's settings with equal care: as many random tries each, from the same ranges.

    python tests/tune.py                                     # on the tiny model
    python tests/tune.py --model path/to/imdb-mini --prompts train.txt --dev dev.txt --rollouts 9600

The best try of each method goes to --json, for tests/compare.py --settings.

A try is trained on one set of rollouts and scored on another, of other draws and, with --dev, other prompts:

    gain    of one step that costs --nats a text, E[sum_t psi_t . u_t (R - earned_t)]: the first-order
            effect of u on the draws, at the exact KL of the step (control.step_for_kl)

No text is steered here, and nothing that is reported is drawn.
"""
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample                                                                         # noqa: E402
from control import Controller, step_for_kl                                           # noqa: E402
from sample import roll_out                                                           # noqa: E402
from train_value import METHODS, train                                                # noqa: E402
from value import load_reward, write_whole                                            # noqa: E402

NET = {"epochs": [1, 2, 3, 5, 8], "rate": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "decay": [0.0, 0.3, 1.0, 3.0],
       "width": [64, 128, 256]}
LAM, RIDGE = [0.5, 0.8, 0.95, 1.0], [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
OWN = {"q": {"lam": LAM}, "draws": {"lam": LAM}, "plain": {"lam": LAM}, "paper": {}}


def draw_tries(method, tries):
    """-> [{setting: option}, ..]: random ones, for the nets the same but for what is the method's own."""
    if method not in OWN:                                      # static: few enough to try all
        return [{"ridge": ridge} for ridge in RIDGE]
    rng, drawn = random.Random(0), []
    for _ in range(tries):
        drawn.append({name: rng.choice(options) for name, options in NET.items()})
        own = random.Random(rng.random())
        drawn[-1] |= {name: own.choice(options) for name, options in OWN[method].items()}
    return drawn


def predicted(model, value, rollout, rewards, nats):
    """-> (gain, its standard error): see above."""
    step = step_for_kl(model, Controller(value, radius=math.inf), rollout, nats, states=256)
    worth = value.worth(rollout.hidden, rollout.psi)           # psi . u at step_size 1
    later = rewards[:, None] - rollout.earned                  # what was earned before is no draw's doing
    return sample.mean_error(step * (worth * rollout.mask * later).sum(1))


def main(argv=None):
    parser = sample.Parser(__doc__, seed=500)                  # not compare.py's seeds
    add = parser.add_argument
    add("--reward", default="sentiment", help="as in train_value.py")
    add("--rollouts", type=sample.number(int, 16, 2 ** 31), default=4000, help="texts to learn from")
    add("--held-out", type=sample.number(int, 16, 2 ** 31), default=4000, help="texts to score on")
    add("--dev", metavar="FILE", help="prompts to score on (default: those of the rollouts, other draws)")
    add("--nats", type=sample.number(float, 1e-3, 100), default=0.5, help="a text: the budget to be good at")
    add("--tries", type=sample.count, default=32, help="a method")
    add("--methods", default=",".join(METHODS), help="which of " + ", ".join(METHODS))
    add("--json", default="out/tuned.json", metavar="FILE", help="where the best settings are written")
    args = parser.parse_args(argv)
    sample.check_writable(args.json)
    if set(args.methods.split(",")) - METHODS.keys():
        raise sample.InputError("--methods takes " + ",".join(METHODS) + ", commas between")
    model, encoder, _, prompts = sample.load(args)
    reward = load_reward(args.reward, args.device)
    dev = prompts
    if args.dev:
        dev = sample.encode_prompts(model, encoder, sample.read_prompts(args.dev), args.tokens)[1]
    (rollout, rewards, _), (held_out, outcome, _) = [
        roll_out(model, encoder, reward, openings, samples, args.tokens, seed, batch=args.batch, record=True,
                 earned=True, progress=sample.progress("rollouts"))
        for openings, samples, seed in ((prompts, args.rollouts, args.seed),
                                        (dev, args.held_out, args.seed + 1))]
    best = {}
    for method in args.methods.split(","):
        tried = []
        for drawn in draw_tries(method, args.tries):
            value = train(model, rollout, rewards, **{**METHODS[method], **drawn}, seed=args.seed)
            tried.append((*predicted(model, value, held_out, outcome, args.nats), drawn))
            print(f"{method:10}{tried[-1][0]:7.3f} +- {tried[-1][1]:.3f}  "
                  + "  ".join(f"{name} {setting:g}" for name, setting in drawn.items()), flush=True)
        (top, _, settings) = max(tried, key=lambda row: row[0])
        best[method] = {**METHODS[method], **settings}
        print(f"{method:10}{top:7.3f} is the best of {len(tried)}: {settings}\n", flush=True)
    write_whole(args.json, [json.dumps(best, indent=1).encode()])


if __name__ == "__main__":
    sample.run(main)
