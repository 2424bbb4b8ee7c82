"""
Reward so far (dashed) and reward so far + V (solid) along a text with a good end and a bad one.

    python tests/evidence/paths.py out/value.pt tests/evidence/paths.svg   # after train_value.py

Of 200 uncontrolled texts that end above 0.3, and of those below -0.3, the one with most ups and
downs. A point stands above the word that was drawn last; V is what the net expects after it.
"""
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from control import generate, read_prompts, uniform_table                             # noqa: E402
from model import load                                                                # noqa: E402
from train_value import partial_rewards                                               # noqa: E402
from value import ValueNet, load_reward                                               # noqa: E402

LEFT, TOP, HEIGHT, WORDS, COLOURS = 44, 16, 180, 66, ("#0072b2", "#d55e00")

def texts(value, n=200):
    """-> two texts, each (words, rewards so far, reward so far + V), from the prompt to the end"""
    info = value.info
    model, tokenizer = load(info["model"], info["tokenizer"])
    prompts = read_prompts(model, tokenizer, info["model"]) * n
    rollout = generate(model, prompts[:n], uniform_table(n, info["tokens"], 1), record=True)
    partial = partial_rewards(load_reward(info["reward"]), tokenizer, prompts[:n], rollout, True)
    V = partial[:, :-1] * info["step_rewards"] + value.fit_to(model)(rollout.hidden)
    ends, ways = partial[:, -1], partial.diff(dim=1).abs().sum(1)
    for sign in (1, -1):
        i = int(((sign * ends > 0.3) * ways).argmax())
        T = int(rollout.mask[i].sum())
        words = [tokenizer.decode([token]) for token in rollout.tokens[i, :T].tolist()]
        yield ([tokenizer.decode(prompts[i])] + words, partial[i, :T + 1].tolist(),
               V[i, :T].tolist() + [ends[i].item()])

def picture(pair):
    last = max(len(words) for words, *_ in pair) - 1
    top, step = TOP + HEIGHT, (740 - LEFT - 20) / last
    values = [v for _, *rows in pair for row in rows for v in row]
    low, high = min(values), max(values)

    def at(t, v):
        return f"{LEFT + step * t:.1f},{TOP + HEIGHT * (high - v) / (high - low):.1f}"
    parts = [f'<rect width="740" height="{top + 2 * WORDS + 20}" fill="#f4f4f4"/>']
    for v in (low, 0, high):
        parts.append(f'<polyline points="{at(0, v)} {at(last, v)}" stroke="#ccc"/>'
                     f'<text transform="translate({at(0, v)})" dx="-40" dy="4">{v:+.2f}</text>')
    for n, (words, *rows) in enumerate(pair):
        for row, dash in zip(rows, ("3 4", "none")):
            points = " ".join(at(t, v) for t, v in enumerate(row))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[n]}" '
                         f'stroke-width="2" stroke-dasharray="{dash}"/>')
        parts += [f'<text transform="translate({LEFT + step * t + 4:.1f} '
                  f'{top + WORDS * (n + 1)}) rotate(-60)" fill="{COLOURS[n]}">'
                  f'{escape(word.strip())}</text>' for t, word in enumerate(words)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {top + 2 * WORDS + 20}" '
            f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n')

if __name__ == "__main__":
    net, path = sys.argv[1:]
    Path(path).write_text(picture(list(texts(ValueNet.load(net)))), encoding="utf-8")
