"""
Draw texts from a frozen GPT-2 without and with control, and show where control acted.

    python sample.py                                        # after train_value.py
    python sample.py --radius 1000 --strength 16            # far too much: the texts break
    python sample.py --value out/gpt2.pt --prompt "The movie was" --svg out/trace.svg

Both texts of a pair have the same prompt and random draws, so they differ by control alone. The
table: mean reward and its standard error over texts; KL(p_u || p), what control costs, nats a text
and a token; perplexity under the uncontrolled model; share of distinct pairs of words (low: dull).
"""
import argparse
import html
import math
import os
import re
import sys
import unicodedata
from functools import partial
from pathlib import Path

import torch

from control import ascend, generate, read_prompts, steer, uniform_table
from model import InputError, load
from value import ValueNet, load_reward

COLUMNS = 92                                                        # of a printed line
ANSI = {1: 153, 2: 111, 3: 69, -1: 223, -2: 215, -3: 208}           # blues, oranges
WEB = {1: "#d3e5f7", 2: "#8fc1ec", 3: "#4a94db", -1: "#fde3c3", -2: "#f9bd7a", -3: "#ef8f2e"}

def pieces(tokenizer, tokens):
    """[token, ..] -> [(text, [t, ..]), ..]: tokens that share a character stay together"""
    found, data, places = [], b"", []
    for t, token in enumerate(tokens):
        data, places = data + tokenizer.encoding.decode_single_token_bytes(token), places + [t]
        text = data.decode(errors="replace")
        if "\ufffd" not in text or len(data) > 3 or t == len(tokens) - 1:
            found.append((re.sub(r"[\x00-\x1f\x7f]", "⏎", text), places))     # control characters
            data, places = b"", []
    return found

def lines(found):
    """The pieces in lines, each piece with its column: [[(column, text, [t, ..]), ..], ..]"""
    rows, column = [[]], 0
    for text, places in found:
        width = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
        if column + width > COLUMNS:
            rows, column = rows + [[]], 0
        rows[-1].append((column, text, places))
        column += width
    return rows

def level(nats):                        # -3 .. 3, on a fixed scale of 2 nats each way
    return max(-3, min(3, round(nats * 3 / 2)))

def course(text, pair):
    """The line of V: a block a token, on the scale of both texts of the pair"""
    both = [v for one in pair for v in one["V"]]
    low, size = min(both), max(max(both) - min(both), 1e-9)
    line = "".join("▁▂▃▄▅▆▇█"[int((v - low) / size * 7.99)] for v in text["V"])
    return f"V {text['V'][0]:+.2f} {line} {text['V'][-1]:+.2f}"

@torch.no_grad()
def trace(model, tokenizer, value, reward, prompt, rollout, i, steering):
    """What control did to text i: its pieces, and for each token gain, kl (nats) and V (reward)."""
    mask = rollout.mask[i]
    drawn, start = rollout.tokens[i][mask].tolist(), len(prompt)
    whole = prompt + drawn
    hidden = model(torch.tensor([whole], device=mask.device))[0, start - 1:-1]         # (T, n_embd)
    texts = [tokenizer.decode(whole[:start + t]) or " " for t in range(len(drawn))]
    kl, V = rollout.kl[i][mask], reward(texts) * value.info["step_rewards"] + value(hidden).cpu()
    t = int(kl.argmax())
    p, q = (log[0].exp() for log in steering(hidden[t:t + 1]))
    def name(token):
        return repr(tokenizer.encoding.decode([token]))
    moved = [", ".join(f"{name(token)} {p[token]:.2f} -> {q[token]:.2f}" for token in tokens)
             for tokens in ((q - p).topk(3).indices.tolist(), (p - q).topk(3).indices.tolist())]
    return {"prompt": tokenizer.decode(prompt), "reward": reward([tokenizer.decode(whole)]).item(),
            "lines": lines(pieces(tokenizer, drawn)), "V": V.tolist(), "kl": kl.tolist(),
            "gain": (rollout.logq - rollout.logp)[i][mask].tolist(),
            "largest": [f"{name(drawn[t])} {kl[t]:.2f}" for t in kl.topk(min(3, len(kl))).indices],
            "moved": [f"there control raised {moved[0]}", f"and lowered {moved[1]}"]}

def show(label, text, pair, colour):
    """Print a trace: the tinted tokens, or a row of signs below them; V; what control cost."""
    print(f"{label}, reward {text['reward']:+.2f}: {text['prompt']} ..")
    for row in text["lines"]:
        tints = [(column, piece, level(sum(text["gain"][t] for t in places)))
                 for column, piece, places in row]
        if colour:
            print("  " + "".join(f"\033[30;48;5;{ANSI[n]}m{piece}\033[0m" if n else piece
                                 for _, piece, n in tints))
            continue
        print("  " + "".join(piece for _, piece, _ in tints))
        signs = ""
        for column, piece, n in tints:
            signs = signs.ljust(column + (piece[0] == " ")) + "+-"[n < 0] * abs(n)
        if signs.strip():
            print("  " + signs.rstrip())
    print(f"  {course(text, pair)}")
    if sum(text["kl"]) > 0:
        print(f"  KL {sum(text['kl']):.2f} nats, most at {', '.join(text['largest'])}",
              *text["moved"], sep="\n  ")

def show_pairs(traces):
    """Print {label: [trace, ..]}, text by text."""
    colour = "FORCE_COLOR" in os.environ or sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("control made a token likelier: + or blue, less likely: - or orange, a sign or shade for "
          "each 2/3 nat")
    for pair in zip(*traces.values()):
        print()
        for label, text in zip(traces, pair):
            show(label, text, pair, colour)

def svg(texts):
    """{label: trace} -> the same as a picture, readable on white and on dark"""
    out, y, font = [], 4, 'font-family="monospace" font-size="13"'
    for label, text in texts.items():
        y += 22
        out.append(f'<text x="8" y="{y}" font-weight="bold">{html.escape(label)}, reward '
                   f'{text["reward"]:+.2f}: {html.escape(text["prompt"])} ..</text>')
        for row in text["lines"]:
            y += 24
            for column, piece, places in row:
                gain = sum(text["gain"][t] for t in places)
                x, width = 8 + 7.8 * column, 7.8 * len(piece)
                tint = WEB.get(level(gain), "#f4f4f4")
                piece = html.escape(piece).replace(" ", "\u00a0")       # a plain one is trimmed
                out.append(f'<rect x="{x:.1f}" y="{y - 15}" width="{width:.1f}" height="20" '
                           f'fill="{tint}"><title>{piece} {gain:+.2f} nats</title></rect>'
                           f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}">{piece}</text>')
        y += 22
        out.append(f'<text x="16" y="{y}" fill="#555">{course(text, texts.values())}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {y + 14}" {font}>'
            f'<rect width="740" height="{y + 14}" fill="#f4f4f4"/>{"".join(out)}</svg>')

# -------------------------------------------------------------------------------------- the script

def progress(label, done, total):
    if sys.stderr.isatty():
        print(f"\r\033[K{label} {done} of {total}", end="\n" * (done == total), file=sys.stderr)

def figures(rollout, rewards, texts):
    """What a set of texts earned and cost: the columns of the table"""
    mask, words = rollout.mask, [text.split() for text in texts]
    pairs = [pair for row in words for pair in zip(row, row[1:])]
    error = rewards.std().item() / math.sqrt(len(rewards))
    return [f"{rewards.mean():+.3g}", f"{error:.2g}" if len(rewards) > 1 else "n/a",
            f"{(rollout.kl * mask).sum(1).mean():.3g}", f"{rollout.kl[mask].mean():.2g}",
            f"{(-rollout.logp[mask].mean()).exp():.3g}",
            f"{len(set(pairs)) / len(pairs):.2g}" if pairs else "n/a"]

def show_table(results):
    """Print {label: (rollout, rewards, texts)} as rows, and the gain."""
    heads = ("", "reward", "+-", "KL a text", "a token", "perplexity", "distinct")
    print()
    for cells in (heads, *((label, *figures(*result)) for label, result in results.items())):
        print(f"{cells[0]:18}" + "".join(f"{cell:>11}" for cell in cells[1:]))
    gain = results["with control"][1] - results["without control"][1]
    error = f"{gain.std() / math.sqrt(len(gain)):.2g}" if len(gain) > 1 else "n/a"
    print(f"gain {gain.mean():+.3g} +- {error}, paired")

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], usage=argparse.SUPPRESS,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser._negative_number_matcher = re.compile(r"-\.?\d")     # else -1e-1 is taken for an option
    dial = parser.add_argument_group("control").add_argument
    dial("--strength", type=float, default=1.0, help="1 as trained, -1 the other way, 0 none")
    dial("--max-kl", type=float, default=math.inf, help="the most control may cost, nats a token")
    dial("--steps", type=int, default=1, help="of gradient ascent; they share the step size")
    dial("--radius", type=float, help="of the ball around the state; 1: a state's typical distance "
         "from the mean state; None: the net's")
    what = parser.add_argument_group("texts").add_argument
    what("--prompt", action="append", default=[], help="may be given again")
    what("--prompts", help="a file, one prompt a line; None: the model's prompts.txt, or one empty")
    what("--samples", type=int, default=1000, help="texts, the prompts in turn")
    what("--tokens", type=int, default=32, help="tokens drawn a text, at most")
    what("--temperature", type=float, default=1.0, help="divides the logits before each draw")
    what("--seed", type=int, default=1002, help="of the draws")
    what("--show", type=int, default=2, help="pairs of texts shown")
    what("--svg", type=Path, help="the first pair as a picture")
    where = parser.add_argument_group("the model and the net").add_argument
    where("--value", default="out/value.pt", help="from train_value.py")
    where("--model", help="gpt2, gpt2-medium, .. or a directory; None: the net's")
    where("--reward", help="as in train_value.py; None: the net's")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    where("--device", choices=devices, default=devices[0], help="where the model runs")
    args = parser.parse_args(argv)
    if min(args.samples, args.tokens, args.steps, args.seed) < 1 or args.svg and args.show < 1:
        parser.error("--samples, --tokens, --steps, --seed and, with --svg, --show are 1 or more")
    above = args.temperature, args.max_kl, 1.0 if args.radius is None else args.radius
    if not (all(number > 0 for number in above) and abs(args.strength) < 1e6):
        parser.error("--temperature, --max-kl and --radius are above 0, --strength within +-1e6")
    return args

def main(argv=None):
    args = parse_args(argv)
    value = ValueNet.load(args.value)
    info, name = value.info, args.model or value.info["model"]
    model, tokenizer = load(name, info["tokenizer"], args.device, getattr(torch, info["dtype"]))
    value = value.fit_to(model)
    if model.wte.weight.numel() < 1e6:
        torch.set_num_threads(1)        # see train_value.py
    reward = load_reward(args.reward or info["reward"], args.device, info["tokenizer"])
    prompts = read_prompts(model, tokenizer, name, args.prompt, args.prompts)
    rows = [prompts[i % len(prompts)] for i in range(args.samples)]
    step_size = args.strength * info["step_size"] / args.steps
    print(f"model {name}, {len(prompts)} prompts; net {args.value}, {info['method']}\nreward "
          f"{args.reward or info['reward']}; control: {args.steps} x step size {step_size:.3g}")

    def controller(hidden):
        return ascend(value, hidden, args.steps, step_size, args.radius or info["radius"])

    results, traces = {}, {}
    for label, control in (("without control", None), ("with control", controller)):
        how = dict(controller=control, temperature=args.temperature, max_kl=args.max_kl)
        rollout = generate(model, rows, uniform_table(args.samples, args.tokens, args.seed), **how,
                           progress=partial(progress, label))
        texts = [tokenizer.decode(prompt + tokens[mask].tolist()) for prompt, tokens, mask
                 in zip(rows, rollout.tokens.cpu(), rollout.mask.cpu())]
        results[label] = rollout, reward([text or " " for text in texts]), texts
        traces[label] = [trace(model, tokenizer, value, reward, rows[i], rollout, i, partial(
            steer, model, **how)) for i in range(min(args.show, args.samples))]
    show_pairs(traces)
    show_table(results)
    if args.svg:
        try:
            args.svg.parent.mkdir(parents=True, exist_ok=True)
            args.svg.write_text(svg({label: texts[0] for label, texts in traces.items()}), "utf-8")
        except OSError as error:
            raise InputError(f"--svg {args.svg}: {error.strerror}; name another file") from None

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # where the terminal has no ▁ or é
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
