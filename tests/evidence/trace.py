"""
A picture of one text without control and with it: its words, their nats, and V along them.

    python -m tests.evidence.trace out/value.pt tests/evidence/trace.svg      # after train_value.py

It reads what sample.trace returns. Both texts have the same prompt and the same random draws: the
first of 100 pairs in which control turns a reward below 0 into one above, and that fits the page.
"""
import sys
from functools import partial
from html import escape
from pathlib import Path

import sample
from control import ascend, controlled_log_probs, generate, uniform_table
from model import InputError, in_turn, load, read_prompts, run_script
from tests.evidence.chart import svg
from value import ValueNet, load_reward

WIDTH, LEFT, LETTER = 760, 62, 7.3
TITLE, NATS, WORDS, AXIS, BELOW = 20, 46, 62, 112, 166       # places below a text's top edge
HALF = 36                                                   # height of the tallest block
SHOWN = 0.1                                                 # nats: smaller ones get no number
UP, DOWN = "#0060a0", "#b84a00"
LEGEND = [("+0.6", "nats: by how much control changed log p of the word"),
          ("V", "block: the reward to expect after the word, if the text goes on without control;"),
          ("", "the last block is the reward of the finished text")]


def traces(net, samples=100, seed=1002):
    """-> {label: [what sample.trace returns, ..]} without control and with it"""
    value = ValueNet.load(net)
    info = value.info
    model, tokenizer = load(info["model"], info["tokenizer"])
    value.check_model(model)
    reward = load_reward(sample.own_reward(info), tokenizer=info["reward_tokenizer"])
    rows = in_turn(read_prompts(model, tokenizer, info["model"]), samples, seed)
    table = uniform_table(samples, info["tokens"], seed)
    control = partial(ascend, value, step_size=info["step_size"], radius=info["radius"])
    found = {}
    for label, controller in {"without control": None, "with control": control}.items():
        rollout = generate(model, rows, table, controller)
        log_probs = partial(controlled_log_probs, model, controller=controller)
        found[label] = [sample.trace(model, tokenizer, value, reward, rows, rollout, i, log_probs)
                        for i in range(samples)]
    return found


def choose(found):
    """-> {label: trace} of the first pair that shows what control does, and fits"""
    for pair in zip(*found.values()):
        lengths = [sum(len(piece) for piece, _ in text["pieces"]) for text in pair]
        before, after = (text["V"][-1] for text in pair)
        if before < 0 < after and max(lengths) * LETTER < WIDTH - LEFT - 10:
            return dict(zip(found, pair))
    raise InputError("no such pair of texts; train another net, or change the seed")


def draw_text(label, text, top, largest):
    """A trace -> the parts of its picture; `largest` |V| is as tall as a block may be"""
    parts = [f'<text x="10" y="{top + TITLE}" font-weight="bold">{label}</text>'
             f'<text x="{LEFT + 62}" y="{top + TITLE}">reward {text["V"][-1]:+.2f}, '
             f'KL {sum(text["kl"]):.2f} nats; prompt: {escape(text["prompt"])} ..</text>',
             f'<text x="10" y="{top + NATS}">nats</text><text x="10" y="{top + WORDS}">words</text>',
             f'<path d="M{LEFT} {top + AXIS}H{WIDTH - 10}" stroke="#666"/>',
             f'<text x="10" y="{top + AXIS + 4}">V</text>']
    for v in (largest, 0, -largest):
        parts.append(f'<text x="{LEFT - 5}" y="{top + AXIS + 4 - HALF * v / largest:.1f}" '
                     f'font-size="10" text-anchor="end">{v:+.1f}</text>')
    x = LEFT
    for piece, places in text["pieces"]:
        word = piece.strip().replace("<|endoftext|>", "(end)")
        x += LETTER * (len(piece) - len(piece.lstrip()))
        length = LETTER * len(word)
        nats = sum(text["nats"][t] for t in places)
        v = text["V"][places[-1]]
        parts += draw_word(word, x, length, nats, HALF * v / largest, top)
        x += length
    return parts


def draw_word(word, x, length, nats, height, top):
    """The word at x, its nats above it, and below it a block of this height, from the line of V = 0"""
    parts = [f'<text x="{x:.1f}" y="{top + WORDS}" textLength="{length:.1f}" '
             f'font-family="monospace">{escape(word)}</text>']
    colour = UP if height > 0 else DOWN
    above = max(height, 0)
    parts.append(f'<rect x="{x:.1f}" y="{top + AXIS - above:.1f}" width="{length:.1f}" '
                 f'height="{max(abs(height), 1):.1f}" fill="{colour}"/>')
    if abs(nats) >= SHOWN:
        parts.append(f'<text x="{x + length / 2:.1f}" y="{top + NATS}" font-weight="bold" '
                     f'font-size="11" text-anchor="middle">{nats:+.1f}</text>')
    return parts


def picture(chosen):
    largest = max(abs(v) for text in chosen.values() for v in text["V"])
    parts = []
    for i, (label, text) in enumerate(chosen.items()):
        parts += draw_text(label, text, BELOW * i, largest)
    bottom = BELOW * len(chosen) + 12
    for i, (sign, words) in enumerate(LEGEND):
        parts.append(f'<text x="{LEFT}" y="{bottom + 16 * i}" font-weight="bold" '
                     f'text-anchor="end">{sign}</text>'
                     f'<text x="{LEFT + 10}" y="{bottom + 16 * i}">{words}</text>')
    return svg(parts, WIDTH, bottom + 16 * len(LEGEND) - 4)


def main():
    net, path = sys.argv[1:]
    Path(path).write_text(picture(choose(traces(net))), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
