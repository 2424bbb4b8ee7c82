"""
Is V a value function? What compare.py's records say of it, mean over trainings and standard error.

    python -m tests.evidence.values out/toy.jsonl                     # after compare.py

On texts that the nets have not seen, drawn without control, over all their states; R^2 is 1 -
squared error / variance (below 0, a constant does better).

    outcome   R^2 of V for the reward of the finished text
    so far    R^2 of the reward so far for it, without any V
    slope     of the outcome on V: 1 where V is calibrated; then the means of both in the lowest, the
              middle and the highest fifth of the forecasts
    exact     R^2 of V for the exact expected reward (tiny languages, exact.py)
"""
import sys
from pathlib import Path

from tests.evidence.records import error_of, mean, read


def r_squared(forecast, truth):
    return 1 - ((forecast - truth).square().mean() / truth.var(correction=0)).item()


def forecasts(value, texts):
    """A net and Texts (compare.py) -> V (N, T), float64"""
    so_far = texts.so_far.to(texts.rollout.hidden)
    return value(texts.rollout.hidden, so_far).double().cpu()


def quality(value, texts):
    """A net and Texts that it has not seen -> {name: number}"""
    mask = texts.rollout.mask.cpu()
    V = forecasts(value, texts)[mask]
    truth = texts.outcome[:, None].expand(mask.shape)[mask]
    centred = V - V.mean()
    found = {"outcome": r_squared(V, truth),
             "so far": r_squared(texts.so_far[mask], truth),
             "slope": ((centred * truth).mean() / centred.square().mean()).item()}
    fifths = V.argsort().chunk(5)
    for name, rows in zip(("low", "mid", "high"), fifths[::2]):
        found[f"{name} V"] = V[rows].mean().item()
        found[name] = truth[rows].mean().item()
    return found


def main():
    _, lines = read(Path(sys.argv[1]))
    lines = [line for line in lines if "values" in line]
    names = list(dict.fromkeys(name for line in lines for name in line["values"]))
    for method in dict.fromkeys(line["method"] for line in lines):
        found = [line["values"] for line in lines if line["method"] == method]
        print(f"{method}, {len(found)} trainings")
        for name in names:
            if name in found[0]:
                print(f"  {name:8} {mean(found, name):7.3f}±{error_of(found, name)}")


if __name__ == "__main__":
    main()
