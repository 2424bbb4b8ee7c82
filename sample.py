"""
Draw texts from a frozen GPT-2 without and with control: what control gained, and where it acted.

    python sample.py                                        # after train_value.py
    python sample.py --strength 0.5,1,2,4                   # a row each: gain at a price in nats
    python sample.py --value out/gpt2.pt --prompt "The movie was"

All rows have the same prompts and the same random draws, so texts differ by control alone. In a
text, `truly funny(+0.6) and` says that control raised log p of " funny" by 0.6 nats. Blocks stand
under the words: V after each word, what the text will earn if it goes on without control.

The table: mean reward; the gain and its standard error over pairs of texts; KL(p_u || p), what
control costs, in nats a text and a token; perplexity under the model without control; the share of
pairs of words that are distinct (low: dull). Compare gains at equal KL.
"""
import argparse
import math
import re
import unicodedata
from functools import partial

import torch

from control import ascend, controlled_log_probs, generate, uniform_table
from model import InputError, in_turn, load, read_prompts, run_script, show_progress
from value import ValueNet, load_reward

COLUMNS = 92            # of a printed line
SHOWN = 0.3             # nats: a token that moved by less gets no number
BLOCKS = "▁▂▃▄▅▆▇█"

# ------------------------------------------------------------------------------- what control did

@torch.no_grad()
def trace(model, tokenizer, value, reward, prompts, rollout, i, log_probs):
    """
    What happened in text i of a rollout -> {prompt, pieces, nats, kl, V, largest}.

    pieces: see below; nats (T,): log p_u(y_t) - log p(y_t); kl (T,); V (T,): the forecast after
    y_t, and after the last token the reward. `reward` None: V cannot be told, and is None.
    `log_probs`: hidden -> log p, log p_u.
    """
    mask, prompt = rollout.mask[i], prompts[i]
    drawn = rollout.tokens[i][mask].tolist()
    tokens = torch.tensor([prompt + drawn], device=mask.device)
    hidden = model(tokens)[0, len(prompt) - 1:-1]                               # (T, n_embd)
    V = None
    if reward:
        texts = rollout.beginnings(tokenizer, prompts, i)                       # T + 1
        if not value.reads_so_far:
            texts = texts[-1:] * len(texts)                 # a reward may judge finished texts only
        so_far = reward(texts)
        V = value(hidden[1:], so_far[1:-1].to(hidden.device)).tolist() + [so_far[-1].item()]
    kl = rollout.kl[i][mask]
    nats = (rollout.log_q - rollout.log_p)[i][mask]
    t = int(kl.argmax())
    log_p, log_q = log_probs(hidden[t:t + 1])                                   # (1, n_vocab)
    largest = changes(tokenizer, drawn[t], log_p[0].exp(), log_q[0].exp())
    return {"prompt": printable(tokenizer.decode(prompt)), "pieces": pieces(tokenizer, drawn),
            "nats": nats.tolist(), "kl": kl.tolist(), "V": V, "largest": largest}

def changes(tokenizer, drawn, p, q):
    """What control raised and lowered most where `drawn` was drawn, as probabilities p -> q"""
    def name(token):
        return repr(tokenizer.encoding.decode([token]))

    def moved(tokens):
        return ", ".join(f"{name(y)} {p[y]:.2f} -> {q[y]:.2f}" for y in tokens.tolist())
    raised = moved((q - p).topk(2).indices)
    lowered = moved((p - q).topk(2).indices)
    return f"most before {name(drawn)}: {raised}; {lowered}"

def printable(text):
    """The text without control characters, which a terminal would obey"""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", "⏎", text)

def pieces(tokenizer, tokens):
    """[token, ..] -> [(text, [t, ..]), ..]: tokens that share a character stay together"""
    found = []
    data = b""
    places = []
    for t, token in enumerate(tokens):
        data += tokenizer.encoding.decode_single_token_bytes(token)
        places.append(t)
        text = data.decode(errors="replace")
        if "\ufffd" not in text or len(data) > 3 or t == len(tokens) - 1:
            found.append((printable(text), places))
            data = b""
            places = []
    return found

def width(text):
    """Columns of a terminal that the text takes"""
    columns = 0
    for c in text:
        if not unicodedata.combining(c):
            columns += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return columns

def block(v, low, high):
    """V on a scale of eight blocks from low to high"""
    share = (v - low) / max(high - low, 1e-9)
    return BLOCKS[int(7.99 * share)]

def lines(text, low, high):
    """A trace -> its lines: the words with their nats, and under each line the blocks of V"""
    words = blocks = ""
    done = []
    for piece, places in text["pieces"]:
        nats = sum(text["nats"][t] for t in places)
        word = piece if abs(nats) < SHOWN else f"{piece}({nats:+.1f})"
        if width(words + word) > COLUMNS and words:
            done += [words, blocks]
            words = blocks = ""
        column = width(words) + len(piece) - len(piece.lstrip(" "))
        if text["V"]:
            blocks = blocks.ljust(column) + block(text["V"][places[-1]], low, high)
        words += word
    done += [words, blocks]
    return [line for line in done if line]

def show_texts(traces, rewards):
    """Print {label: [trace, ..]}, text by text, with their {label: rewards (N,)}."""
    seen = []
    for texts in traces.values():
        for text in texts:
            seen += text["V"] or []
    low = min(seen, default=0.0)
    high = max(seen, default=0.0)
    if seen:
        print(f"under the words: V after each, from {low:+.2f} ({BLOCKS[0]}) to {high:+.2f} ({BLOCKS[-1]})")
    for i in range(len(traces["without control"])):
        print()
        for label in traces:
            text = traces[label][i]
            print(f"{label}, reward {rewards[label][i]:+.2f}: {text['prompt']} ..")
            for line in lines(text, low, high):
                print(f"  {line}")
            spent = sum(text["kl"])
            if spent > 0:
                print(f"  KL {spent:.2f} nats, {text['largest']}")

# --------------------------------------------------------------------------------------- the table

def metrics(rollout, rewards, base, texts):
    """What texts earned and cost -> the cells of a row; base (N,): the rewards without control"""
    mask = rollout.mask
    gains = rewards - base
    error = gains.std(correction=0) / math.sqrt(len(gains))
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:])
    distinct = len(set(pairs)) / max(len(pairs), 1)
    perplexity = (-rollout.log_p[mask].mean()).exp()
    kl_text = (rollout.kl * mask).sum(1).mean()
    kl_token = rollout.kl[mask].mean()
    return [f"{rewards.mean():+.3g}", f"{gains.mean():+.3f}", f"{error:.2g}", f"{kl_text:.3f}",
            f"{kl_token:.2g}", f"{perplexity:.3g}", f"{distinct:.2g}"]

def show_table(cells):
    """Print {label: [cell, ..]}, a row each."""
    print()
    heads = ["reward", "gain", "+-", "KL a text", "a token", "perplexity", "distinct"]
    for label, row in {"": heads, **cells}.items():
        print(f"{label:18}" + "".join(f"{cell:>11}" for cell in row))

# -------------------------------------------------------------------------------------- the script

def own_reward(info):
    """The reward that the net names. A net may come from anyone: code in a file is not run for it."""
    if ".py" in info["reward"]:
        raise InputError(f"the net's reward is code, and is run only if you name it: --reward "
                         f"{info['reward']}")
    return info["reward"]

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], usage=argparse.SUPPRESS,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--value", default="out/value.pt", help="a net of train_value.py")
    parser.add_argument("--strength", default="1", help="times the trained step size, a row each: "
                        "0.5,1,2; the other way: --strength=-1")
    parser.add_argument("--steps", type=int, default=1, help="of ascent; they share the step size")
    parser.add_argument("--radius", type=float, help="of the ball around the state; None: the net's")
    parser.add_argument("--max-kl", type=float, default=math.inf, help="nats a token, at most")
    parser.add_argument("--top-p", type=float, default=1.0, help="cut p to its nucleus, then control")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides all logits")
    parser.add_argument("--prompt", action="append", default=[], help="may be given again")
    parser.add_argument("--prompts", help="a text file, a prompt a line; None: the model's own")
    parser.add_argument("--samples", type=int, default=1000, help="texts a row")
    parser.add_argument("--tokens", type=int, help="drawn a text, at most; None: the net's")
    parser.add_argument("--seed", type=int, default=1002, help="of the draws")
    parser.add_argument("--show", type=int, default=1, help="texts shown")
    parser.add_argument("--model", help="gpt2, gpt2-medium, .. or a directory; None: the net's")
    parser.add_argument("--reward", help="as in train_value.py; None: the net's, unless it is code")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="of the model")
    args = parser.parse_args(argv)
    try:
        args.strength = [float(word) for word in args.strength.split(",")]
    except ValueError:
        parser.error(f"--strength {args.strength} is no list of numbers such as 0.5,1,2")
    whole = [args.samples, args.steps, args.seed, 1 if args.tokens is None else args.tokens]
    if min(whole) < 1 or args.seed >= 2 ** 63 or args.show < 0:
        parser.error("--samples, --steps, --tokens and --seed are 1 or more, --seed below 2^63")
    above = [args.temperature, args.max_kl, args.top_p, 1.0 if args.radius is None else args.radius]
    if not all(number > 0 for number in above):
        parser.error("--temperature, --max-kl, --top-p and --radius are above 0")
    if not all(abs(strength) < 1e6 for strength in args.strength):
        parser.error("--strength is within +-1e6")
    return args

def main(argv=None):
    args = parse_args(argv)
    value = ValueNet.load(args.value)
    info = value.info
    name = args.model or info["model"]
    tokens = args.tokens or info["tokens"]
    radius = info["radius"] if args.radius is None else args.radius
    model, tokenizer = load(name, info["tokenizer"], args.device, getattr(torch, info["dtype"]))
    value = value.check_model(model)
    prompts = read_prompts(model, tokenizer, name, args.prompt, args.prompts)
    rows = in_turn(prompts, args.samples, args.seed)
    reward_name = args.reward or own_reward(info)
    reward = load_reward(reward_name, args.device, info["reward_tokenizer"])
    print(f"net {args.value}: {info['method']}, step size {info['step_size']:.3g}; reward "
          f"{reward_name}; {len(prompts)} prompts")
    own = reward if (reward_name, tokens) == (info["reward"], info["tokens"]) else None
    if not own:
        print(f"no line of V: it forecasts {info['reward']} of texts of {info['tokens']} tokens")

    strengths = {"without control": 0.0}
    strengths |= {f"strength {strength:g}": strength for strength in args.strength}
    table = uniform_table(args.samples, tokens, args.seed)
    rewards = {}
    traces = {}
    cells = {}
    for label, strength in strengths.items():
        how = dict(controller=None, temperature=args.temperature, top_p=args.top_p, max_kl=args.max_kl)
        if strength != 0:
            step_size = strength * info["step_size"] / args.steps
            how["controller"] = partial(ascend, value, steps=args.steps, step_size=step_size,
                                        radius=radius)
        rollout = generate(model, rows, table, **how, progress=partial(show_progress, label))
        texts = rollout.texts(tokenizer, rows)
        rewards[label] = reward(texts)
        cells[label] = metrics(rollout, rewards[label], rewards["without control"], texts)
        log_probs = partial(controlled_log_probs, model, **how)
        traces[label] = [trace(model, tokenizer, value, own, rows, rollout, i, log_probs)
                         for i in range(min(args.show, args.samples))]
    show_texts(traces, rewards)
    show_table(cells)

if __name__ == "__main__":
    run_script(main)
