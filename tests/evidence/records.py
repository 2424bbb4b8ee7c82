"""The records of compare.py, one line of JSON a (method, seed): reading, adding, means and errors."""
import json

import numpy as np
import torch


def read(path):
    """-> the line of the task, without control (or None), and the lines of its trainings"""
    if not path.exists():
        return None, []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], lines[1:]


def add(path, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def error_of(rows, key):
    """The standard error over trainings, without its 0"""
    numbers = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    return f"{numbers.std() / len(rows) ** 0.5:.3f}".lstrip("0") if len(rows) > 1 else "   -"


def at_kl(curve, kl):
    """A curve [[kl, ..], [gain, ..]] from (0, 0) up -> the gain at this KL"""
    return float(np.interp(kl, *curve))
