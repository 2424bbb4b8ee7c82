"""
Charts of compare.py's records: gain against KL, with two standard errors over trainings.

    python -m tests.evidence.chart out/toy.jsonl out/frontier.svg --methods q,one-g,lm-steer,static,plain
    python -m tests.evidence.chart out/overdose.jsonl tests/evidence/overdose.svg --methods q \
        --shown gain,judged,perplexity,distinct

One panel for each of --shown. On the tiny languages the grey line is the exact optimum, which only
chance puts a method above; the dotted one is control by the exact mean value (exact.py).
"""
import argparse
import math
from pathlib import Path
from statistics import mean, stdev

from tests.evidence import records

WIDTH, HEIGHT, GAP = 350, 290, 20
LEFT, TOP, BOTTOM, LEGEND = 52, 26, 42, 120
COLOURS = ["#0060a0", "#b84a00", "#007a55", "#a0408a", "#8a6a00", "#505050"]
SIGNS = ["●", "▲", "■", "◆", "▼", "+"]         # told apart without colour
NAMES = {"gain": "gain in reward", "judged": "gain of the judge", "perplexity": "perplexity",
         "distinct": "distinct pairs of tokens"}


def curve(lines, method, key):
    """-> [(kl, mean, standard error), ..] of a method, a point a budget"""
    rows = [line["points"] for line in lines if line["method"] == method]
    found = []
    for points in zip(*rows):
        points = [point for point in points if key in point]
        if points:
            numbers = [point[key] for point in points]
            error = stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
            found.append((mean(point["kl"] for point in points), mean(numbers), error))
    return sorted(found)


def ticks(low, high):
    """Up to eight round numbers"""
    sizes = [digit * 10 ** power for power in range(-3, 4) for digit in (1, 2, 5)]
    step = next(size for size in sizes if high - low < 8 * size)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thinned(line, right, n=60):
    """An exact line -> at n KLs from 0 to right"""
    return [(right * i / n, records.at_kl(line, right * i / n)) for i in range(n + 1)]


class Panel:
    """Axes from (left, low) to (right, high), whose left upper corner is at (x, y) of the picture"""

    def __init__(self, x, y, right, low, high, name, left=0.0, across="KL, nats a text"):
        self.x, self.y = x + LEFT, y + TOP
        self.left, self.right, self.low, self.high = left, right, low, high
        self.parts = []
        self.line([(left, high), (left, low), (right, low)], 'stroke="#666"')
        self.text(left, high, name, 'dx="-46" dy="-10"')
        self.text((left + right) / 2, low, across, 'dy="34" text-anchor="middle"')
        for place in ticks(left, right):
            self.text(place, low, f"{place:.3g}", 'dy="16" text-anchor="middle"')
        for height in ticks(low, high):
            self.line([(left, height), (right, height)], 'stroke="#ddd"')
            self.text(left, height, f"{height:.3g}", 'dx="-6" dy="4" text-anchor="end"')

    def at(self, place, height):
        x = self.x + (place - self.left) / (self.right - self.left) * (WIDTH - LEFT)
        y = self.y + (self.high - height) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
        return x, y

    def line(self, points, style):
        ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self.parts.append(f'<polyline points="{ends}" fill="none" {style}/>')

    def text(self, place, height, words, style):
        x, y = self.at(place, height)
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>')

    def draw(self, points, number):
        colour = COLOURS[number % len(COLOURS)]
        self.line([point[:2] for point in points], f'stroke="{colour}" stroke-width="1.5"')
        for place, height, error in points:
            ends = [(place, height - 2 * error), (place, height + 2 * error)]
            self.line(ends, f'stroke="{colour}"')
            sign = SIGNS[number % len(SIGNS)]
            self.text(place, height, sign, f'dy="4" font-size="11" text-anchor="middle" fill="{colour}"')


def panel(free, lines, methods, key, x, y):
    """One of --shown -> Panel"""
    curves = [curve(lines, method, key) for method in methods]
    right = 1.05 * max(kl for points in curves for kl, *_ in points)
    exact = {}
    if key == "gain" and "optimum" in free:
        exact = {name: thinned(free[name], right) for name in ("optimum", "mean value")}
    start = {"gain": 0.0, "judged": 0.0}.get(key, free.get(key))        # without control
    heights = [h + sign * 2 * e for points in curves for _, h, e in points for sign in (-1, 1)]
    heights += [start] + [h for points in exact.values() for _, h in points]
    low, high = min(heights), max(heights)
    room = 0.05 * (high - low)
    drawn = Panel(x, y, right, low if low == 0 else low - room, high + room, NAMES[key])
    drawn.text(0, start, "○", 'dy="4" text-anchor="middle"')
    for name, points in exact.items():
        style = 'stroke="#999" stroke-width="5"' if name == "optimum" else \
            'stroke="#000" stroke-dasharray="1 4"'
        drawn.line(points, style)
    for number, points in enumerate(curves):
        drawn.draw(points, number)
    return drawn


def legend(methods, exact, x):
    """-> the parts of a legend; ○ is the text without control"""
    parts = []
    rows = [(SIGNS[i % len(SIGNS)], COLOURS[i % len(COLOURS)], name) for i, name in enumerate(methods)]
    rows.append(("○", "#000", "no control"))
    if exact:
        rows += [("▬", "#999", "optimum"), ("⋯", "#000", "best for E[R]")]
    for i, (sign, colour, name) in enumerate(rows):
        parts.append(f'<text x="{x}" y="{TOP + 20 + 19 * i}" fill="{colour}">{sign}</text>'
                     f'<text x="{x + 18}" y="{TOP + 20 + 19 * i}">{name}</text>')
    return parts


def svg(parts, width, height):
    """A grey ground of its own: readable on a white page and on a dark one"""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" font-size="12" fill="#111">\n'
            f'<rect width="{width}" height="{height}" rx="6" fill="#f4f4f4"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("records", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--methods", help="separated by commas (default: all)")
    parser.add_argument("--shown", default="gain", help="a panel each: " + ",".join(NAMES))
    args = parser.parse_args(argv)
    free, lines = records.read(args.records)
    if not lines:
        parser.error(f"{args.records} has no records; compare.py makes them")
    methods = list(dict.fromkeys(line["method"] for line in lines))
    if args.methods:
        known, methods = methods, args.methods.split(",")
        if not set(methods) <= set(known):
            parser.error(f"--methods: {args.records} has {','.join(known)}")
    shown = args.shown.split(",")
    for key in shown:
        if not any(key in point for line in lines for point in line["points"]):
            parser.error(f"--shown {key}: {args.records} has no such number")
    parts = []
    for i, key in enumerate(shown):
        x, y = i % 2 * (WIDTH + GAP), i // 2 * HEIGHT
        parts += panel(free, lines, methods, key, x, y).parts
    columns = min(len(shown), 2)
    width = columns * WIDTH + (columns - 1) * GAP
    parts += legend(methods, "optimum" in free, width + GAP)
    height = math.ceil(len(shown) / 2) * HEIGHT
    args.svg.write_text(svg(parts, width + GAP + LEGEND, height), encoding="utf-8")


if __name__ == "__main__":
    main()
