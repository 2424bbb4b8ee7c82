"""
One setting changed at a time: what the control owes to each.

    python tests/ablate.py                                   # the tiny model, three minutes on two cores
    python tests/ablate.py --model path/to/imdb-mini --prompts train.txt --test tests/openings.txt --radius 1

The rows are those of tests/compare.py at the first budget of --kl, with V's own fit at the end: R^2 of V
against the exact value on the tiny model, elsewhere 1 - (squared error to the outcome) / (its variance) on
the uncontrolled test texts. `one net`: V is climbed itself,
its gradient weighs `gain` times in Q. Form A is another way to train one net, `weight` that of its second term:

    mean delta^2 + gain mean ||dV/dx - psi_x delta||^2 / mean ||psi_x||^2,   delta = target - V
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import compare                                                                        # noqa: E402
import sample                                                                         # noqa: E402
import train_value                                                                    # noqa: E402
from control import Controller, step_for_kl                                           # noqa: E402
from value import bellman_targets, value_loss                                         # noqa: E402

ALONE = dict(lift=False, epochs=5, rate=0.03)      # what was best for one net that is both V and A
TRAINED = [("lam 0", {"lam": 0.0}), ("lam 0.5", {"lam": 0.5}), ("lam 0.95", {"lam": 0.95}),
           *[(f"one net, gain {gain:g}", {**ALONE, "gain": gain}) for gain in (1.0, 3.0, 10.0, 30.0, 100.0)], ("raw states", {"standardised": False}),
           ("no decay", {"decay": 0.0}), ("width 16", {"width": 16}), ("width 256", {"width": 256})]
ASCENDED = [("5 steps", {"steps": 5}), ("30 steps", {"steps": 30}), ("radius 0.1", {"radius": 0.1}),
            ("radius 0.3", {"radius": 0.3}), ("no ball", {"radius": float("inf")})]


def form_a(value, hidden, psi, rewards, mask, lam, gain, costs=None):
    """In the place of value_loss."""
    v = value(hidden)
    delta = (bellman_targets(v.detach(), rewards, mask, lam, costs) - v)[mask]
    psi = (value.std * psi)[mask]
    gap = value.gradient(hidden)[mask] - psi * delta.detach()[:, None]
    return delta.square().mean() + gain * gap.square().sum(-1).mean() / psi.square().sum(-1).mean()


def main(argv=None):
    args = compare.parse_args(argv)
    nats = float(args.kl.split(",")[0])
    model, encoder, asked, prompts = sample.load(args)
    tests = prompts
    if args.test:
        asked, tests = sample.encode_prompts(model, encoder, sample.read_prompts(args.test), args.tokens)
    table = compare.Table(args, model, encoder, tests, asked)
    rollout, rewards, _ = table.roll_out(prompts, args.rollouts, args.seed, record=True)
    seen, outcome, _ = table.roll_out(tests, args.samples * len(tests), args.test_seed, record=True)
    settings = train_value.METHODS["q"]

    def fit(value):
        if table.exact:
            return f"   V's fit {table.exact.r_squared(value, seen):.4f}"
        returns = outcome[:, None].expand_as(seen.mask)[seen.mask]
        error = (value(seen.hidden)[seen.mask] - returns).square().mean() / returns.var(correction=0)
        return f"   V's fit {1 - error.item():.4f}"

    def row(label, texts=(rollout, rewards), loss=value_loss, ascent={}, **changed):
        train_value.value_loss = loss
        value = train_value.train(*texts, **{**settings, **changed}, seed=args.seed)
        control = replace(Controller(value, radius=args.radius), **ascent)
        try:
            control.step_size = step_for_kl(model, control, rollout, nats)
        except sample.InputError as error:
            print(f"{label:20}{str(error).split(':')[0]}{fit(value)}", flush=True)
            return
        table.row(label, control.step_size, note=fit(value), control=control)

    row("q as it is")
    for label, changed in TRAINED:
        row(label, **changed)
    for weight in (0.3, 1.0, 3.0, 10.0):
        row(f"form A, weight {weight:g}", loss=form_a, **{**ALONE, "gain": weight})
    for part in (16, 4):
        few = args.rollouts // part
        row(f"{few} rollouts", (rollout.pick(slice(few)), rewards[:few]))
    torch.manual_seed(args.seed)
    for size in (0.03, 0.1, 0.3):
        excited = table.roll_out(prompts, args.rollouts, args.seed, record=True,
                                 control=train_value.excitation(rollout, size))[:2]
        row(f"excitation {size:g}", excited)
        row("  and 5 steps", excited, ascent={"steps": 5})
    for label, ascent in ASCENDED:
        row(label, ascent=ascent)


if __name__ == "__main__":
    sample.run(main)
