"""
A chart of compare.py's records: gain against KL, with two standard errors over trainings.

    python tests/evidence/chart.py out/toy.jsonl out/toy.svg --methods q,plain,static

On the tiny language the grey curve is the exact optimum: only chance puts a method above it.
"""
import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 480, 320, 50, 40, 110
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b"]

def read(path, methods):
    """-> {method: [(kl, gain, error), ..]}, and the optimum [(kl, gain), ..]"""
    found, optimum = defaultdict(lambda: defaultdict(list)), {(0.0, 0.0)}
    for line in map(json.loads, Path(path).read_text().splitlines()):
        optimum |= set(zip(*line.get("optimum", [])))
        for point in line.get("points", []):
            if "gain" in point and (not methods or line["method"] in methods):
                found[line["method"]][point["nats"]].append((point["kl"], point["gain"]))
    def average(points):
        kl, gain = zip(*points)
        return mean(kl), mean(gain), pstdev(gain) / max(len(gain) - 1, 1) ** 0.5
    return {m: sorted(map(average, found[m].values())) for m in methods or found}, sorted(optimum)

def ticks(low, high):
    """Up to eight round numbers"""
    step = next(s for s in (.01, .02, .05, .1, .2, .5, 1, 2, 5) if high - low < 8 * s)
    return [step * i for i in range(math.ceil(low / step), int(high / step) + 1)]

def draw(curves, optimum):
    points = [point for curve in curves.values() for point in curve]
    right = 1.05 * max(kl for kl, *_ in points)
    if optimum[1:]:
        grid = np.linspace(0, right, 200)                             # its end: the best text
        optimum = [*zip(grid, np.interp(grid, *zip(*optimum)))]
    gains = [0] + [gain + sign * 2 * error for _, gain, error in points for sign in (-1, 1)]
    low, high = min(gains), 1.05 * max(gains + [gain for _, gain in optimum])

    def at(kl, gain):
        x = LEFT + kl / right * (WIDTH - LEFT - LEGEND)
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (high - gain) / (high - low):.1f}"

    def line(ends, style):
        return f'<polyline points="{" ".join(at(*end) for end in ends)}" fill="none" {style}/>'

    def text(kl, gain, words, style):
        return f'<text transform="translate({at(kl, gain)})" {style}>{words}</text>'
    parts = [line([(0, high), (0, low), (right, low)], 'stroke="#888"'),
             line([(0, 0), (right, 0)], 'stroke="#ccc"'),
             line(optimum, 'stroke="#aaa" stroke-width="4"'),
             text(*max(optimum), "optimum", 'dx="8" dy="4" fill="#888"') if optimum[1:] else "",
             f'<text x="{LEFT + 8}" y="14">gain in reward</text>',
             text(right / 2, low, "KL, nats a text", 'dy="34" text-anchor="middle"')]
    parts += [text(kl, low, f"{kl:.3g}", 'dy="16" text-anchor="middle"') for kl in ticks(0, right)]
    parts += [text(0, gain, f"{gain:.3g}", 'dx="-6" dy="4" text-anchor="end"')
              for gain in ticks(low, high)]
    for i, (method, curve) in enumerate(curves.items()):
        style = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.5"'
        parts.append(line([point[:2] for point in curve], style))
        parts += [line([(kl, gain - 2 * e), (kl, gain + 2 * e)], style) for kl, gain, e in curve]
        parts.append(f'<path d="M{WIDTH - LEGEND + 10} {42 + 18 * i}h16" {style}/>'
                     f'<text x="{WIDTH - LEGEND + 30}" y="{46 + 18 * i}">{method}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -4 {WIDTH} {HEIGHT + 4}" '
            f'font-family="sans-serif" font-size="12">\n<rect y="-4" width="{WIDTH}" '
            f'height="{HEIGHT + 4}" fill="#f4f4f4"/>\n' + "\n".join(parts) + "\n</svg>\n")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("records")
    parser.add_argument("svg", type=Path)
    parser.add_argument("--methods", default="", help="separated by commas (default: all)")
    args = parser.parse_args()
    args.svg.write_text(draw(*read(args.records, args.methods and args.methods.split(","))))
