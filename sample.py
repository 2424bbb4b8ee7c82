"""
Draw texts from a frozen GPT-2 without and with control: what control gained, and where it acted.

    python sample.py                                        # after train_value.py
    python sample.py --strength 0.5,1,2,4                   # one row per strength
    python sample.py --value out/gpt2.pt --prompt "The movie was"

All rows have the same prompts and the same random numbers, so texts differ by control alone. In a
text, `truly funny(+0.6) and` says that control raised the log-probability of " funny" by 0.6 nats.
Under each word a block shows V after it: what the text will earn if it goes on without control. The
last block is the reward itself.

The table:
    reward        mean reward
    gain, +-      mean of reward with control - reward without, pair by pair; its standard error
    KL a text     KL(p_u || p), the price of control, in nats per text; KL a token: per token
    perplexity    of the texts under the model without control, at this temperature and top-p
    distinct      share of neighbouring pairs of words that are distinct (low: texts repeat)
Compare gains at equal KL, and `distinct` within one table: it falls as --samples grows.
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
SHOWN = 0.3             # nats: a word whose log-probability moved by less gets no number
BLOCKS = "▁▂▃▄▅▆▇█"

# ------------------------------------------------------------------------------- what control did

@torch.no_grad()
def trace(model, tokenizer, value, reward, prompts, rollout, i, log_probs):
    """
    What happened in text i of a rollout, of T tokens, as a dictionary:
        prompt      a string
        pieces      [(word, [t, ..]), ..], see `pieces`
        nats        log p_u(y_t) - log p(y_t), T numbers
        kl          KL(p_u || p) where y_t was drawn, T numbers
        V           the forecast after y_t, T numbers, the last one the reward; None without `reward`
        largest     what control changed where its KL was largest, a string
    reward: the one that V was trained for, or None. log_probs: hidden -> log p, log p_u.
    """
    mask, prompt = rollout.mask[i], prompts[i]
    drawn = rollout.drawn(i)
    tokens = torch.tensor([prompt + drawn], device=mask.device)
    hidden = model(tokens)[0, len(prompt) - 1:-1]                               # (T, n_embd)
    V = None
    if reward:
        texts = rollout.beginnings(tokenizer, prompts, i)                       # T + 1
        if not value.reads_so_far:                          # then only the finished text is scored
            texts = [texts[-1]] * len(texts)
        so_far = reward(texts)                                                  # (T + 1,)
        V = value(hidden[1:], so_far[1:-1].to(hidden.device)).tolist()          # after y_0, y_1, ..
        V.append(so_far[-1].item())
    kl = rollout.kl[i][mask]
    nats = (rollout.log_q - rollout.log_p)[i][mask]
    t = int(kl.argmax())
    log_p, log_q = log_probs(hidden[t:t + 1])                                   # (1, n_vocab)
    largest = changes(tokenizer, drawn[t], log_p[0].exp(), log_q[0].exp())
    return {"prompt": printable(tokenizer.decode(prompt)), "pieces": pieces(tokenizer, drawn),
            "nats": nats.tolist(), "kl": kl.tolist(), "V": V, "largest": largest}

def changes(tokenizer, drawn, p, q):
    """What control raised and lowered most at the draw of `drawn`, as probabilities p -> p_u"""
    def name(token):
        return repr(tokenizer.encoding.decode([token]))

    def moved(tokens):
        return ", ".join(f"{name(y)} {p[y]:.2f} -> {q[y]:.2f}" for y in tokens.tolist())
    raised = moved((q - p).topk(2).indices)
    lowered = moved((p - q).topk(2).indices)
    return f"most at the draw of {name(drawn)}:\n  raised {raised}; lowered {lowered}"

def printable(text):
    """The text without characters that could change the terminal"""
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

def lines(traced, low, high):
    """A trace -> its lines: the words with their nats, and under each line the blocks of V"""
    words = blocks = ""
    done = []
    for piece, places in traced["pieces"]:
        nats = sum(traced["nats"][t] for t in places)
        word = piece if abs(nats) < SHOWN else f"{piece}({nats:+.1f})"
        if width(words + word) > COLUMNS and words:
            done += [words, blocks]
            words = blocks = ""
        column = width(words) + len(piece) - len(piece.lstrip(" "))             # of the first letter
        if traced["V"]:
            blocks = blocks.ljust(column) + block(traced["V"][places[-1]], low, high)
        words += word
    done += [words, blocks]
    return [line for line in done if line]

def show_texts(traces, rewards):
    """traces {label: [trace, ..]}, rewards {label: (N,)}: print each text as it is under each label."""
    seen = []
    for of_label in traces.values():
        for traced in of_label:
            seen += traced["V"] or []
    low = min(seen, default=0.0)
    high = max(seen, default=0.0)
    if seen:
        print(f"under the words: V after each, from {low:+.2f} ({BLOCKS[0]}) to {high:+.2f} ({BLOCKS[-1]})")
    for i in range(len(traces["without control"])):
        print()
        for label in traces:
            traced = traces[label][i]
            print(f"{label}, reward {rewards[label][i]:+.2f}: {traced['prompt']} ..")
            for line in lines(traced, low, high):
                print(f"  {line}")
            spent = sum(traced["kl"])
            if spent > 0:
                print(f"  KL {spent:.2f} nats, {traced['largest']}")

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
    heads = ["reward", "gain", "+-", "KL a text", "KL a token", "perplexity", "distinct"]
    for label, row in {"": heads, **cells}.items():
        print(f"{label:18}" + "".join(f"{cell:>11}" for cell in row))

# -------------------------------------------------------------------------------------- the script

def own_reward(info):
    """The net's reward. A net may come from anyone: code is run only if the user names it, too."""
    if re.search(r"\.py(:\w+)?$", info["reward"]):
        raise InputError(f"the net's reward is code, and is run only if you name it: --reward "
                         f"{info['reward']}")
    return info["reward"]

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Draw texts from a frozen GPT-2 without and with control.",
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--value", default="out/value.pt", help="a net of train_value.py")
    parser.add_argument("--strength", default="1", help="factors of the trained step size, for example "
                        "0.5,1,2: one row per factor. To push the other way: --strength=-1")
    parser.add_argument("--steps", type=int, default=1, help="ascent steps, each of step size / steps")
    parser.add_argument("--radius", type=float, help="of the ball; None: as trained")
    parser.add_argument("--max-kl", type=float, default=math.inf, help="nats per token, at most")
    parser.add_argument("--top-p", type=float, default=1.0, help="cut p to its nucleus, then control")
    parser.add_argument("--temperature", type=float, default=1.0, help="all logits are divided by it")
    parser.add_argument("--prompt", action="append", default=[], help="can be repeated")
    parser.add_argument("--prompts", help="a text file with one prompt per line; None: prompts.txt in "
                        "the model's directory, or the empty text")
    parser.add_argument("--samples", type=int, default=1000, help="texts per row")
    parser.add_argument("--tokens", type=int, help="drawn per text, at most; None: as trained")
    parser.add_argument("--seed", type=int, default=1002, help="of the draws: not a seed of training")
    parser.add_argument("--show", type=int, default=1, help="texts shown")
    parser.add_argument("--model", help="gpt2, gpt2-medium, .. or a directory; None: as trained")
    parser.add_argument("--reward", help="see train_value.py; None: as trained, unless it is code")
    parser.add_argument("--tokenizer", help="for a --model without tokenizer files")
    parser.add_argument("--reward-tokenizer", help="for a --reward without tokenizer files")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="of the model")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args

def check_args(parser, args):
    """What argparse does not check; --strength becomes a list of numbers"""
    try:
        args.strength = [float(word) for word in args.strength.split(",")]
    except ValueError:
        parser.error(f"--strength {args.strength} is no list of numbers such as 0.5,1,2")
    for name in ("samples", "steps", "tokens", "seed"):
        number = getattr(args, name)
        if number is not None and not 1 <= number < 2 ** 63:
            parser.error(f"--{name} must be 1 or more, and below 2^63")
    for name in ("temperature", "max_kl", "top_p", "radius"):
        number = getattr(args, name)
        if number is not None and not number > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.show < 0:
        parser.error("--show must be 0 or more")
    if not all(abs(strength) < 1e6 for strength in args.strength):
        parser.error("--strength must be within +-1e6")

def fill_in(args, info):
    """
    Fill missing options from the net. True if reward, tokens, temperature and top-p are those of
    training: only then V may be shown.
    """
    if args.model is None:
        args.model = info["model"]
        args.tokenizer = args.tokenizer or info["tokenizer"]
    if args.reward is None:
        args.reward = own_reward(info)
        args.reward_tokenizer = args.reward_tokenizer or info["reward_tokenizer"]
    args.tokens = args.tokens or info["tokens"]
    args.radius = args.radius or info["radius"]
    same = args.reward == info["reward"] and args.tokens == info["tokens"]
    return same and args.temperature == 1 and args.top_p >= 1

def main(argv=None):
    args = parse_args(argv)
    value = ValueNet.load(args.value)
    info = value.info
    as_trained = fill_in(args, info)
    model, tokenizer = load(args.model, args.tokenizer, args.device, getattr(torch, info["dtype"]))
    value = value.check_model(model)
    prompts = read_prompts(model, tokenizer, args.model, args.prompt, args.prompts)
    rows = in_turn(prompts, args.samples, args.seed)
    reward = load_reward(args.reward, args.device, args.reward_tokenizer)
    print(f"net {args.value}: {info['method']}, step size {info['step_size']:.3g}; reward "
          f"{args.reward}; {len(prompts)} prompts")
    if not as_trained:
        print(f"V is not shown: it was trained for the reward {info['reward']}, {info['tokens']} tokens, "
              f"temperature 1 and top-p 1")

    strengths = {"without control": 0.0}
    strengths |= {f"strength {strength:g}": strength for strength in args.strength}
    uniforms = uniform_table(args.samples, args.tokens, args.seed)
    rewards = {}
    traces = {}
    cells = {}
    for label, strength in strengths.items():
        controller = None
        if strength != 0:
            controller = partial(ascend, value, steps=args.steps, radius=args.radius,
                                 step_size=strength * info["step_size"] / args.steps)
        how = dict(controller=controller, temperature=args.temperature, top_p=args.top_p,
                   max_kl=args.max_kl)
        rollout = generate(model, rows, uniforms, **how, progress=partial(show_progress, label))
        texts = rollout.texts(tokenizer, rows)
        rewards[label] = reward(texts)
        cells[label] = metrics(rollout, rewards[label], rewards["without control"], texts)
        log_probs = partial(controlled_log_probs, model, **how)
        traces[label] = [trace(model, tokenizer, value, reward if as_trained else None, rows, rollout,
                               i, log_probs) for i in range(min(args.show, args.samples))]
    show_texts(traces, rewards)
    show_table(cells)

if __name__ == "__main__":
    run_script(main)
