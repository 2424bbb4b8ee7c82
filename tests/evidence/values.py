"""
Is V a value function, and does Q keep what it promises?

    python tests/evidence/values.py                                   # the tiny language
    python tests/evidence/values.py --task reviews --seeds 3

On as many held-out texts as are reported on, over all states, means over trainings and standard
errors, of methods of compare.py that train a net in one round. R^2 is 1 - squared error / variance;
below 0, a constant does better.

    outcome   R^2 of reward so far + V for the reward of the finished text
    to come   R^2 of V for what is still to come; q-end and plain: the same as outcome
    so far    R^2 of reward so far for the outcome, without any V
    slope     of the outcome on reward so far + V, 1 where calibrated; then the means of both in
              the lowest, the middle and the highest fifth of the forecasts
    exact     R^2 of reward so far + V for the exact expected outcome (tiny language, exact.py)
    promised  sum_t E_{p_u}[Q] - V = g . (E_{p_u}[W] - E_p[W]) over controlled texts, which is what
              they gain, were Q exact (performance difference, Kakade and Langford 2002)
"""
import torch

import compare
from control import steer, step_for_kl

METHODS = "q,q-end,plain"

def r_squared(forecast, truth):
    return 1 - ((forecast - truth).square().mean() / truth.var(correction=0)).item()

def quality(method, value, rollout, partial, exact):
    """-> {name: number} of V on held-out texts; without step rewards, V forecasts all of them"""
    mask, V = rollout.mask.cpu(), value(rollout.hidden).cpu().double()
    so_far, outcome = partial[:, :-1] * (method == "q"), partial[:, -1:].expand(mask.shape)
    forecast, truth = (so_far + V)[mask], outcome[mask]
    centred = forecast - forecast.mean()
    result = {"outcome": r_squared(forecast, truth),
              "to come": r_squared(V[mask], (outcome - so_far)[mask]),
              "so far": r_squared(partial[:, :-1][mask], truth),
              "slope": ((centred * truth).mean() / centred.square().mean()).item()}
    fifths = forecast.argsort().chunk(5)
    for name, rows in zip(("low", "mid", "high"), fifths[::2]):
        result |= {f"{name} V": forecast[rows].mean().item(), name: truth[rows].mean().item()}
    if exact:
        expected, where = exact.truth()
        result["exact"] = r_squared((so_far + V)[where], expected)
    return result

@torch.no_grad()
def promise(task, value, control, rollout):
    """What Q says these controlled texts gain, from their states"""
    total, W = 0.0, task.model.wte.weight.float()
    for hidden in rollout.hidden[rollout.mask].split(512):
        log_p, log_q = steer(task.model, hidden, control)
        total += ((log_q.exp() - log_p.exp()) @ W * value.gradient(hidden)).sum().item()
    return total / len(rollout.mask)

def points_of(method, task, learned, seed):
    """One dict a training, in the place of compare.py's points"""
    control, value = compare.train(method, task, *learned, seed)
    held = task.draw(task.test, task.samples, 5000 + seed, record=True)
    result = quality(method, value, held, task.partial(task.test, held, True),
                     task.exact and task.optimum(held))
    for nats in task.budgets if value.gradient_head else ():
        step = step_for_kl(task.model, control, learned[0], nats)
        texts = task.draw(task.test, task.samples, task.seed,
                          lambda hidden: control(hidden, step), record=True)
        result[f"promised {nats}"] = promise(task, value, lambda h: control(h, step), texts)
        result[f"gained {nats}"] = (task.score(task.test, texts) - task.base).mean().item()
    return [result], 0.0

def main():
    args = compare.parse_args(__doc__, METHODS)
    args.json = args.json.with_name(f"{args.json.stem}-values.jsonl")
    _, *lines = compare.records(args.json, args.methods.split(","), args, points_of)
    rows = {method: [line["points"][0] for line in lines if line["method"] == method]
            for method in args.methods.split(",")}
    print(f"{'':12}" + "".join(f"{method:>16}" for method in rows))
    for name in max((found[0] for found in rows.values()), key=len):
        print(f"{name:12}" + "".join(
            f"{compare.mean(found, name):11.3f}±{compare.error_of(found, name)}"
            if name in found[0] else " " * 16 for found in rows.values()))

if __name__ == "__main__":
    main()
