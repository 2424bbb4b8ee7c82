"""
The methods that compare.py compares: how each learns from the rollouts, and how it controls.

A new method is a row of METHODS; a new way to learn is a function in FITS, a new way to control one in
CONTROLS. A fit returns a net, a function of the state or a model; a control returns draw() -> a Rollout
to report on. Fit and control are timed, draw is not.
"""
import functools
import math

import train_value
from control import RADIUS, ascend, generate, step_for_kl, uniform_table
from model import in_turn
from tests.evidence import baselines, finetune
from tests.evidence.exact import Oracle
from value import ValueNet


def row(fit, control="push", steps=1, radius=RADIUS, rounds=1):
    """
    A method. fit: what learns from the rollouts, a row of train_value.METHODS or of FITS. control:
    how that is used, a row of CONTROLS, or best-of (compare.py). The steps of ascent share the step
    size. rounds: how often a net is trained; from the second on, on texts drawn under the last net's
    control, whose nats are taken off the rewards.
    """
    return dict(fit=fit, control=control, steps=steps, radius=radius, rounds=rounds)


METHODS = {
    "q": row("q"),
    "q-end": row("q-end"),
    "plain": row("plain"),
    "paper": row("paper", radius=math.inf),
    "static": row("static"),
    "one-g": row("one-g"),
    "lm-steer": row("lm-steer"),
    "rad-q": row("rad-q"),
    "q-30": row("q", steps=30),
    "rounds-2": row("q", rounds=2),
    "guided": row("plain", control="look-ahead"),
    "dpo": row("dpo", control="weights"),
    "oracle": row("none", control="oracle"),
    "best-of": row("none", control="best-of"),
    "best-of-compute": row("none", control="best-of"),
}
TRAINED = [name for name in METHODS if METHODS[name]["fit"] != "none"]


def fit_net(task, method, texts, seed, price=0.0):
    """-> a net of train_value.METHODS; price: of a nat that the texts' own control has cost"""
    rollout = texts.rollout
    settings = dict(train_value.METHODS[method["fit"]])
    del settings["radius"]
    rewards = train_value.rewards_at_end(texts.outcome, rollout.mask.cpu())
    if price:
        rewards = rewards - price * (rollout.kl * rollout.mask).cpu()
    return train_value.train(task.model, rollout, texts.so_far, rewards, **settings, seed=seed)


def fit_static(task, method, texts, seed):
    return baselines.static(texts.rollout, texts.outcome)


def fit_one_g(task, method, texts, seed):
    value = fit_net(task, METHODS["q"], texts, seed)
    return baselines.one_g(task.model, texts.rollout, texts.so_far, texts.outcome, value)


def fit_lm_steer(task, method, texts, seed):
    return baselines.lm_steer(task.model, texts.rollout, texts.outcome, seed,
                              task.settings["lm_steer"])


def fit_rad_q(task, method, texts, seed):
    return baselines.rad_q(task.model, texts.rollout, texts.outcome, seed, task.settings["rad_q"])


def fit_dpo(task, method, texts, seed):
    return finetune.dpo(task.model, texts.prompts, texts.rollout, texts.outcome, seed,
                        **task.settings["dpo"])


FITS = dict.fromkeys(train_value.METHODS, fit_net)
FITS |= {"static": fit_static, "one-g": fit_one_g, "lm-steer": fit_lm_steer,
         "rad-q": fit_rad_q, "dpo": fit_dpo, "none": lambda task, method, texts, seed: None}


def controller_of(fitted, method):
    """What a fit returned -> controller_at(hidden, size) -> u"""
    if not isinstance(fitted, ValueNet):
        return fitted
    steps = method["steps"]
    return lambda hidden, size: ascend(fitted, hidden, steps, size / steps, method["radius"])


def push(task, method, texts, fitted, seed, nats):
    """Control by a function of the state, of the size that costs these nats -> draw() -> a Rollout"""
    controller_at = controller_of(fitted, method)
    step = step_for_kl(task.model, controller_at, texts.rollout, nats)
    for i in range(1, method["rounds"]):
        texts = task.roll_out(task.train, task.args.rollouts, seed + 100 * i,
                              functools.partial(controller_at, size=step))
        fitted = fit_net(task, method, texts, seed + 100 * i, price=1 / step)
        controller_at = controller_of(fitted, method)
        step = step_for_kl(task.model, controller_at, texts.rollout, nats)
    return lambda: task.draw(task.test, task.args.samples, task.seed,
                             functools.partial(controller_at, size=step))


def sized(task, texts_at, seed, nats):
    """texts_at(prompts, samples, seed, size) -> draw(); the size is searched on a few texts"""
    few = functools.partial(texts_at, task.train, 256, seed)
    size = baselines.size_for_kl(few, nats)
    return lambda: texts_at(task.test, task.args.samples, task.seed, size)


def look_ahead(task, method, texts, fitted, seed, nats):
    def texts_at(prompts, samples, seed, size):
        sampler = functools.partial(baselines.LookAhead, value=fitted, size=size)
        return task.draw(prompts, samples, seed, make_sampler=sampler)
    return sized(task, texts_at, seed, nats)


def oracle(task, method, texts, fitted, seed, nats):
    def texts_at(prompts, samples, seed, size):
        sampler = functools.partial(Oracle, exact=task.exact, size=size)
        return task.draw(prompts, samples, seed, make_sampler=sampler)
    return sized(task, texts_at, seed, nats)


def weights(task, method, texts, fitted, seed, nats):
    def texts_at(prompts, samples, seed, size):
        rows = in_turn(prompts, samples, seed)
        other = finetune.between(task.model, fitted, size)
        drawn = generate(other, rows, uniform_table(samples, task.tokens, seed))
        return finetune.compared(drawn, task.model, rows, other)
    return sized(task, texts_at, seed, nats)


CONTROLS = {"push": push, "look-ahead": look_ahead, "oracle": oracle, "weights": weights}
