"""
How well a control's direction fits the rewards of texts that it has not seen: no text is drawn with it.

    python -m tests.evidence.eff --task toy --lm-steer 1e-4,1e-3,1e-2 --rad-q 1e-3,1e-2

    eff = sum E[A (R - V)] / sqrt(sum E[A^2]),   A = u(h_t) . grad_log_p(y_t),  summed over a text

A small step of a controller u gains about eff sqrt(2 nats): the step that costs so many nats is
sqrt(2 nats / sum E[A^2]). V, that of q, only takes noise away, and is the same for all. Seed 101 learns
and 201 tests, so that settings may be chosen by it.
"""
import argparse

from model import run_script
from tests.evidence import baselines
from tests.evidence.compare import TASKS, Task, numbers, parse_args
from tests.evidence.methods import METHODS, fit_net

LEARN, TEST = 101, 201


def eff(u_at, texts, V):
    """u_at(hidden (n, n_embd)) -> u; Texts; V (N, T)"""
    mask = texts.rollout.mask
    surprise = (texts.outcome.to(V)[:, None] - V)[mask]                         # (n,)
    hidden = texts.rollout.hidden[mask].split(4096)
    draws = texts.rollout.grad_log_p[mask].split(4096)
    gained = spent = 0.0
    for h, y, r in zip(hidden, draws, surprise.split(4096)):
        A = (u_at(h) * y.float()).sum(-1).double()
        gained += (A * r).sum().item()
        spent += A.square().sum().item()
    return gained / (spent * len(mask)) ** 0.5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--task", choices=TASKS, default="toy")
    parser.add_argument("--rollouts", type=int, default=4000, help="texts to learn from")
    parser.add_argument("--samples", type=int, default=4000, help="texts to test on")
    parser.add_argument("--lm-steer", type=numbers, default=[], help="rates of LM-Steer: 1e-4,1e-3")
    parser.add_argument("--rad-q", type=numbers, default=[], help="rates of RAD-Q")
    parser.add_argument("--epochs", type=int, default=4, help="of these two")
    args = parser.parse_args(argv)
    task = Task(parse_args(["--task", args.task, "--rollouts", str(args.rollouts)]))
    texts = task.learn(LEARN)
    unseen = task.roll_out(task.train, args.samples, TEST)
    q = fit_net(task, METHODS["q"], texts, LEARN)
    V = q(unseen.rollout.hidden, unseen.so_far.to(unseen.rollout.hidden.device))

    def show(name, u_at):
        print(f"{name:16} {eff(u_at, unseen, V):.3f}", flush=True)

    def show_sized(name, controller_at):
        show(name, lambda hidden: controller_at(hidden, 1.0))
    learnt = task.model, texts.rollout, texts.outcome, LEARN
    show("q", q.gradient)
    show("q-end", fit_net(task, METHODS["q-end"], texts, LEARN).gradient)
    show_sized("static", baselines.static(texts.rollout, texts.outcome))
    show_sized("one-g", baselines.one_g(task.model, texts.rollout, texts.so_far, texts.outcome, q))
    for rate in args.lm_steer:
        show_sized(f"LM-Steer {rate:g}", baselines.lm_steer(*learnt, rate, args.epochs))
    for rate in args.rad_q:
        show_sized(f"RAD-Q {rate:g}", baselines.rad_q(*learnt, rate, args.epochs))


if __name__ == "__main__":
    run_script(main)
