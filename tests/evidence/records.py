"""
The records of compare.py, a line of JSON a (method, seed); and from them the table of README.md.

    python -m tests.evidence.records                    # prints the table, from records/*.jsonl
"""
import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).with_name("records")
COLUMNS = {"toy": "tiny language", "twist": "second", "late": "third", "reviews": "film reviews"}
LABELS = {"q": "`q`, the default", "q-end": "`q-end`: the reward at the end only",
          "best-of": "best of 3 texts drawn (reviews: of 6)",
          "guided": "look-ahead with V, 20 passes a token", "dpo": "all weights fine-tuned (DPO)",
          "rad-q": "RAD-Q's head and loss", "lm-steer": "LM-Steer",
          "one-g": "one direction for all states, from the same draws",
          "static": "one direction, by regression on hidden states",
          "plain": "`plain`: V alone, differentiated",
          "paper": "`paper`: the same, one-step targets, raw states"}


def read(path):
    """-> the line of the task, without control (or None), and the lines of its trainings"""
    if not path.exists():
        return None, []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], lines[1:]


def add(path, line):
    """Written whole or not: a run may be stopped at any time"""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    part = path.with_suffix(".part")
    part.write_text(before + json.dumps(line) + "\n")
    part.replace(path)


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def error_of(rows, key):
    """The standard error over trainings, without its 0"""
    numbers = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    return f"{numbers.std() / len(rows) ** 0.5:.3f}".lstrip("0") if len(rows) > 1 else "   -"


def at_kl(curve, kl):
    """A curve [[kl, ..], [gain, ..]] from (0, 0) up -> the gain at this KL"""
    return float(np.interp(kl, *curve))


def points_at(lines, method, nats):
    """A method's points at this budget, one a training"""
    found = [point for line in lines if line["method"] == method for point in line["points"]]
    return [point for point in found if point["nats"] == nats and "gain" in point]


def share(optimum, points):
    """The mean share of the optimum's gain at each point's KL, in percent"""
    shares = [point["gain"] / at_kl(optimum, point["kl"]) for point in points]
    return 100 * sum(shares) / len(shares)


def over_one_g(lines, points):
    """
    The gain as a multiple of one-g's, one direction for all states, at equal KL. Between its points and
    beyond, its gain is taken as a power of KL; before the first, as a multiple of sqrt(KL).
    """
    budgets = [point["nats"] for line in lines if line["method"] == "one-g" for point in line["points"]]
    rows = [points_at(lines, "one-g", nats) for nats in sorted(set(budgets))]
    kls = [mean(row, "kl") for row in rows]
    gains = [mean(row, "gain") for row in rows]
    x = np.log([kls[0] / 100, *kls])
    y = np.log([gains[0] / 10, *gains])
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    x, y = [*x, x[-1] + 1], [*y, y[-1] + slope]         # to 2.7 times the KL of its last point
    reference = np.exp(np.interp(np.log(mean(points, "kl")), x, y))
    return f"{mean(points, 'gain') / reference:.2f}"


def budget(method, optimum):
    """
    The budget that README.md shows, in nats asked. That of best of n is n: three texts cost about 0.3
    nats, six about 0.7, as q does on reviews.
    """
    if method == "best-of":
        return 3 if optimum else 6
    return 0.3 if optimum else 1.0


def readme_table(folder=FOLDER):
    """-> the lines of README.md's table: shares of the optimum; on reviews, gains over one-g's"""
    tasks = {task: read(folder / f"{task}.jsonl") for task in COLUMNS}
    rows = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    best = []
    for free, _ in tasks.values():
        if free and "mean value" in free:
            point = {"kl": 0.3, "gain": at_kl(free["mean value"], 0.3)}
            best.append(f"{share(free['optimum'], [point]):.0f}")
        else:
            best.append("")
    rows.append("| the best for E[R], exactly | " + " | ".join(best) + " |")
    for method, label in LABELS.items():
        cells = []
        for free, lines in tasks.values():
            optimum = free.get("optimum") if free else None
            points = points_at(lines, method, budget(method, optimum))
            if not points:
                cells.append("")
            elif optimum:
                cells.append(f"{share(optimum, points):.0f}")
            else:
                cells.append(over_one_g(lines, points))
        if any(cells):
            rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    print(*readme_table(), sep="\n")
