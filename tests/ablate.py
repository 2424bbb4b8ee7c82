"""
One setting changed at a time: what the control owes to each.

    python tests/ablate.py                                   # the tiny model, five minutes on two cores
    python tests/ablate.py --model path/to/imdb-mini --prompts train.txt --test tests/openings.txt

The rows are those of tests/compare.py at the first budget of --kl, with V's own fit at the end: R^2 of V
against the exact value on the tiny model, elsewhere 1 - (squared error to the outcome) / (its variance) on
the uncontrolled test texts.

    V alone foretells     the text so far has no say in the advantages
    no imagined draws     M is the moment of the real draws alone, 1% of the identity aside
    not white             W1 trained as it is
    Q loss, gain g        no A: one net, V climbed itself, fitted as  V + g dV/dx . psi_x = target
    slope loss, weight w  no A: one net, fitted with  delta = target - V  to
                          mean delta^2 + w mean ||dV/dx - psi_x delta||^2 / mean ||psi_x||^2
    excitation e          rollouts whose states are moved at random, up to e standard deviations
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
from value import ValueNet, bellman_targets, whitening                                # noqa: E402

TRAINED = [*[(f"lam {lam:g}", {"lam": lam}) for lam in (0.0, 0.5, 0.95, 1.0)],
           ("one direction", {"draws": "line"}), ("raw states", {"standardised": False}),
           ("no decay", {"decay": 0.0}), ("width 16", {"width": 16}), ("width 256", {"width": 256})]
ASCENDED = [("5 steps", {"steps": 5}), ("30 steps", {"steps": 30}), ("radius 0.1", {"radius": 0.1}),
            ("radius 0.3", {"radius": 0.3}), ("radius 1", {"radius": 1.0})]


def slope_loss(value, hidden, psi, targets, weight):
    """hidden, psi (states, n_embd), targets (states,) -> the loss"""
    delta, psi = targets - value(hidden), value.std * psi
    gap = value.gradient(hidden) - psi * delta.detach()[:, None]
    return delta.square().mean() + weight * gap.square().sum(-1).mean() / psi.square().sum(-1).mean()


def q_loss(value, hidden, psi, targets, gain):
    """The loss of Q = V + gain dV/dx . psi_x, likewise."""
    return (value(hidden) + gain * value.worth(hidden, psi) - targets).square().mean()


def one_net(form, weight, rollout, rewards, lam=0.95, width=64):
    """V whose own gradient is trained on the draws; epochs, rate and decay that were best for q_loss."""
    torch.manual_seed(0)
    hidden, psi, mask = rollout.hidden, rollout.psi, rollout.mask
    value = ValueNet(hidden.size(-1), width).to(mask.device)
    value.b2.data.fill_(rewards.mean())
    value.standardise([hidden[mask]])

    def loss(rows):
        seen = mask[rows]
        targets = bellman_targets(value(hidden[rows]).detach(), rewards[rows], seen, lam)
        return form(value, hidden[rows][seen], psi[rows][seen], targets[seen], weight)

    train_value.descend(value, loss, len(rewards), epochs=5, rate=0.03, decay=1.0)
    return value.requires_grad_(False)


def real_draws(batches, embedding):
    """In the place of whitening, by which "imagined" draws make 1% of the identity."""
    psi = torch.cat([*batches])
    one = (0.01 * psi.square().mean() * psi.size(1)) ** 0.5 * torch.eye(psi.size(1), device=psi.device)
    return whitening([psi], torch.cat([one, -one]))


def main(argv=None):
    args = compare.parse_args(argv)
    nats, size = float(args.kl.split(",")[0]), max(args.sizes)
    model, encoder, prompts, tests = compare.set_up(args)
    table = compare.Table(args, model, encoder, *tests)
    texts = rollout, rewards = compare.learn_from(args, table, model, encoder, prompts)
    seen, outcome, _ = table.roll_out(tests[0], args.samples * len(tests[0]), args.test_seed, record=True)

    def fit(value):
        if table.exact:
            return f"   V's fit {table.exact.r_squared(value, seen):.4f}"
        returns = outcome[:, None].expand_as(seen.mask)[seen.mask]
        error = (value(seen.hidden)[seen.mask] - returns).square().mean() / returns.var(correction=0)
        return f"   V's fit {1 - error.item():.4f}"

    def row(label, value=None, texts=texts, ascent={}, patch={}, **changed):
        before = {name: getattr(train_value, name) for name in patch}
        vars(train_value).update(patch)
        settings = {**train_value.METHODS["q"], **changed}
        value = value or train_value.train(model, *texts, **settings, seed=args.seed)
        vars(train_value).update(before)
        control = replace(Controller(value, radius=train_value.ball(settings, args.radius)), **ascent)
        try:
            control.step_size = step_for_kl(model, control, rollout, nats)
        except sample.InputError as error:
            print(f"{label:30}{str(error).split(':')[0]}{fit(value)}", flush=True)
            return value
        table.row(label, control.step_size, note=fit(value), control=control)
        return value

    q = row("q as it is")
    for label, changed in TRAINED:
        row(label, **changed)
    row("V alone foretells", texts=(replace(rollout, earned=torch.zeros_like(rollout.earned)), rewards))
    row("no imagined draws", patch={"whitening": real_draws})
    row("not white", patch={"Whitened": torch.nn.Identity})
    for gain in (0.0, 1.0, 10.0, 100.0):
        row(f"Q loss, gain {gain:g}", value=one_net(q_loss, gain, *texts))
    for weight in (0.3, 1.0, 3.0, 10.0):
        row(f"slope loss, weight {weight:g}", value=one_net(slope_loss, weight, *texts))
    for part in (16, 4):
        few = size // part
        row(f"{few} rollouts", texts=(rollout.pick(slice(few)), rewards[:few]))
    torch.manual_seed(args.seed)
    for amplitude in (0.03, 0.1, 0.3):
        excited = table.roll_out(prompts, size, args.seed, record=True, earned=True,
                                 control=train_value.excitation(rollout, amplitude))[:2]
        row("  and 5 steps", value=row(f"excitation {amplitude:g}", texts=excited), ascent={"steps": 5})
    for label, ascent in ASCENDED:
        row(label, value=q, ascent=ascent)


if __name__ == "__main__":
    sample.run(main)
