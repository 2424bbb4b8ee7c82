"""
Draw texts from a GPT-2 whose state is steered by a value function, beside uncontrolled ones.

    python sample.py                                         # the tiny model, after train_value.py
    python sample.py --model gpt2 --value out/gpt2.safetensors --prompt "The movie was"
    python sample.py --model gpt2 --value out/gpt2.safetensors --prompts openings.txt
    python sample.py --method base --prefix "I loved it. " --best-of 4         # others, or on top of control

Controlled and uncontrolled texts have the same prompts and the same random draws (control.py has the
sampler): they are pairs, and differences between them have little noise. Exit code 2 and one line on
bad input.

But: texts are cut at --tokens, not at the end of a sentence.
"""
import argparse
import codecs
import gzip
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import torch

from control import (Controller, Decoding, Guided, best_of_kl, generate, pick_best, teacher_force,
                     uniform_table)
from model import GPT, InputError, text_of
from value import RewardModel, ValueNet, load_reward, load_tokenizer, write_whole


# --------------------------------------------------------------------------------- texts and files

def read_prompts(path):
    """
    A text file, one prompt a line, or HH-RLHF's .jsonl(.gz): each "chosen" dialogue up to and
    including its last "Assistant:", so that the gold answer is not in the prompt.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); --prompts takes a text file, one prompt "
                         f"a line, or a .jsonl(.gz)") from None
    prompts = [line for line in lines if line.strip()]
    if str(path).removesuffix(".gz").endswith(".jsonl"):
        prompts = [_dialogue(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: holds no prompts; write one a line")
    return prompts


def _dialogue(path, number, line):
    turn = "\n\nAssistant:"
    try:
        text = json.loads(line)["chosen"]
        return text[:text.rindex(turn) + len(turn)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{path}, line {number}: not {{"chosen": "..Assistant:.."}} in JSON; '
                         f"mend or remove the line") from None


def encode(encoder, text, what="the prompt"):
    """A prompt, or what else -> [token, ..]. "<|endoftext|>" is a token here."""
    if text != text.encode(errors="ignore").decode():          # bytes of the command line, not text
        raise InputError(f"{what} {text!r} is not UTF-8; write it anew")
    try:
        return encoder.encode(text, allowed_special="all")
    except ValueError as error:                                # of a million spaces, for one
        raise InputError(f"{what} {text[:40]!r} .. cannot be encoded ({error}); shorten it") from None


def encode_prompts(model, encoder, texts, n_tokens):
    """
    ["The movie", ..] -> those that fit, encoded [[bos, token, ..], ..].

    A prompt that leaves no room for n_tokens more is left out with a warning; InputError if all are.
    """
    fit, prompts, room = [], [], model.config.n_positions - n_tokens
    for text in texts:
        if not (tokens := encode(encoder, text)):
            raise InputError("an empty prompt; give at least one word")
        if len(tokens) < room:
            fit.append(text)
            prompts.append([model.config.bos_token_id] + tokens)
    if len(fit) < len(texts):
        what = (f"{len(texts) - len(fit)} of {len(texts)} prompts leave no room for {n_tokens} tokens in the "
                f"model's context of {model.config.n_positions}")
        if not fit:
            raise InputError(f"{what}; shorten the prompts or --tokens")
        print(f"warning: {what}; left out", file=sys.stderr)
    return fit, prompts


def end_turns(encoder, rollout):
    """Cut continuations, in rollout.mask, before the next turn of a dialogue."""
    for tokens, mask in zip(rollout.tokens.cpu(), rollout.mask):
        pieces = [encoder.decode_single_token_bytes(token) for token in tokens[mask.cpu()].tolist()]
        turn = b"".join(pieces).find(b"\n\nHuman:")
        if turn >= 0:
            ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
            mask[max(int((ends <= turn).sum()), 1):] = False   # a text has at least one token


def decode(encoder, prompts, rollout, eos):
    """The whole texts, prompt and continuation, without the special tokens around them."""
    return [encoder.decode(prompt[1:] + [t for t in tokens[mask].tolist() if t != eos])
            for prompt, tokens, mask in zip(prompts, rollout.tokens.cpu(), rollout.mask.cpu())]


def score_beginnings(encoder, reward, prompts, rollout):
    """Reward (N, T) of each text as it stood before each draw; past its end 0."""
    rows = [prompt[1:] + tokens for prompt, tokens in zip(prompts, rollout.tokens.tolist())]
    reads = [range(len(prompt) - 1, len(prompt) - 1 + n)       # how many tokens stood there
             for prompt, n in zip(prompts, rollout.mask.sum(1).tolist())]
    if isinstance(reward, RewardModel) and reward.encoder._mergeable_ranks == encoder._mergeable_ranks \
            and max(map(len, rows)) <= reward.gpt.config.n_positions:
        along, empty = reward.along(rows), reward([""])[0]     # one pass a text, of the tokens as drawn
        scores = [row[n - 1] if n else empty for row, read in zip(along, reads) for n in read]
    else:
        scores = reward([encoder.decode(row[:n]) for row, read in zip(rows, reads) for n in read])
    earned = torch.zeros(rollout.mask.shape)
    earned[rollout.mask.cpu()] = torch.tensor(scores)
    return earned.to(rollout.mask.device)


def in_turn(prompts, n):
    """n prompts, one after the other and again from the first."""
    return [prompts[i % len(prompts)] for i in range(n)]


def roll_out(model, encoder, reward, prompts, samples, n_tokens, seed, prefix=(), best_of=1, by="reward",
             earned=False, **how):
    """
    `samples` texts, the prompts taken in turn -> (Rollout, rewards (N,), texts).

    With `earned`, the rollout has the reward of each text's beginnings too; `record` is generate's.
    `prefix` tokens come before each prompt, but are no part of the text. `best_of` so many drawn, the one
    of the highest reward is kept, or by "value": of the highest V where its last token was drawn. Then kl
    is log(p_u / p) of what was drawn, p without the prefix, and at a text's first token that of the choice.
    """
    prompts = in_turn(prompts, samples) * best_of
    openings = [*map(tuple, prompts)]
    rollout = generate(model, [[*prompt[:1], *prefix, *prompt[1:]] for prompt in prompts],
                       uniform_table(len(prompts), n_tokens, seed), **how)
    end_turns(encoder, rollout)
    texts = decode(encoder, prompts, rollout, model.config.eos_token_id)
    rewards = torch.tensor(reward(texts), device=rollout.mask.device)
    if earned:
        rollout.earned = score_beginnings(encoder, reward, prompts, rollout)
    if prefix:
        rollout.logp = teacher_force(model, prompts, rollout)
    if prefix or best_of > 1:
        rollout.kl = torch.where(rollout.mask, rollout.logq - rollout.logp, 0.0)
    if best_of > 1:
        last = rollout.mask.sum(1, keepdim=True) - 1
        judged = rewards if by == "reward" else rollout.before.gather(1, last)[:, 0]
        rows = pick_best(judged, best_of)
        for opening in set(openings):
            same = torch.tensor([other == opening for other in openings], device=rows.device)
            rollout.kl[same, 0] += best_of_kl(judged[same], best_of)
        rollout, rewards, texts = rollout.pick(rows), rewards[rows], [texts[i] for i in rows.tolist()]
    return rollout, rewards, texts


def mean_error(scores, clusters=None):
    """Mean and its standard error; `clusters` [label, ..] groups scores that are not independent."""
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu()
    labels = torch.arange(len(scores)) if clusters is None else torch.as_tensor(clusters)
    sums = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, labels, scores - scores.mean())
    groups = len(labels.unique())
    error = sums.square().sum().sqrt() / len(scores) * math.sqrt(groups / max(groups - 1, 1))
    return scores.mean().item(), error.item() if groups > 1 else math.nan


def distinct(rollout, n):
    """Distinct n-grams over all n-grams of the continuations, in [0, 1]."""
    grams = [tuple(row[i:i + n]) for tokens, mask in zip(rollout.tokens.cpu(), rollout.mask.cpu())
             for row in [tokens[mask].tolist()] for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def diversity(rollout):
    """Mean over texts of the product over n = 2, 3, 4 of a text's distinct n-grams over all its n-grams."""
    products = []
    for tokens, mask in zip(rollout.tokens.cpu(), rollout.mask.cpu()):
        row, product = tokens[mask].tolist(), 1.0
        for n in (2, 3, 4):
            grams = [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]
            product *= len(set(grams)) / len(grams) if grams else 1.0
        products.append(product)
    return sum(products) / len(products)


def figures(rollout, rewards, clusters=None):
    """What a set of texts earned and what it cost: {name: number}, NaN where not defined."""
    mask = rollout.mask
    reward, error = mean_error(rewards, clusters)
    return {"reward": reward, "error": error,
            "positive": (torch.as_tensor(rewards) > 0).double().mean().item(),
            "kl_token": rollout.kl[mask].mean().item(),
            "kl_text": (rollout.kl * mask).sum(1).mean().item(),
            "perplexity": math.exp(-rollout.logp[mask].mean().item()),
            "before": rollout.before[mask].mean().item(), "after": rollout.after[mask].mean().item(),
            "diversity": diversity(rollout),
            **{f"distinct_{n}": distinct(rollout, n) for n in (1, 2, 3)}}


def show(rows):
    """Print {label: figures} as a table; KL at temperature 0 is not defined and shown as n/a."""
    print(f"\n{'':14}{'reward':>16}{'positive':>10}{'KL a token':>12}{'KL a text':>11}{'perplexity':>12}"
          f"{'V before':>10}{'V after':>9}{'diversity':>11}   distinct-1/2/3")
    for label, f in rows.items():
        cells = [f"{f[name]:.{digits}f}" if math.isfinite(f[name]) else "n/a" for name, digits in
                 (("kl_token", 4), ("kl_text", 3), ("perplexity", 2), ("before", 3), ("after", 3))]
        print(f"{label:14}{f['reward']:8.3f} +-{f['error']:6.3f}{f['positive']:10.2f}{cells[0]:>12}"
              f"{cells[1]:>11}{cells[2]:>12}{cells[3]:>10}{cells[4]:>9}{f['diversity']:11.2f}   "
              + "/".join(f"{f[f'distinct_{n}']:.2f}" for n in (1, 2, 3)))


# -------------------------------------------------------------------------------------- the script

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to each option's help its default, where it has one."""
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one line, without the usage."""
    def __init__(self, doc, seed):
        super().__init__(description=doc.strip().split("\n")[0], formatter_class=Help)
        add = self.add_argument
        add("--model", type=named, default="tests/toy", metavar="NAME",
            help="a GPT-2: gpt2, gpt2-medium, .., org/name of the hub, or a directory")
        add("--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
        add("--prompts", type=named, metavar="FILE",
            help="one prompt a line, or HH-RLHF's .jsonl(.gz) (default: prompts.txt in the model's "
                 "directory; none: texts from their beginning on)")
        add("--dialogue", action="store_true", help="each prompt is what a human says to an assistant, "
                                                        "or a dialogue already")
        add("--tokens", type=count, default=32, help="tokens drawn a text, at most")
        add("--seed", type=number(int, 0, 2 ** 62), default=seed, help="of the draws: same seed, same texts")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
        add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's weights")
        add("--batch", type=count, help="texts drawn side by side (default: as many as fit, up to 256 on a "
                                        "CPU and 1024 on a GPU)")
        add("--max-memory", type=number(float, 1e-6, 1e6), metavar="GIB",
            help="what model, texts and states may take (default: four fifths of the device's)")

    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind, low, high):
    """An argparse type: a number of that kind from low to high, which nan is not."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


count = number(int, 1, 2 ** 31)


def named(text):
    """An argparse type: the name of something, which "" is not."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return text


def device_of(args):
    """--device, a GPU made the current one: graphs are captured there. InputError where there is none."""
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"--device {args.device}: use cuda or cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: this machine has no CUDA device; use --device cpu")
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}; use --device cpu") from None
    return device


def load(args, samples=2 ** 31):
    """
    -> model, encoder, prompt texts, encoded prompts; says on which device. Sets in args what was left open:
    batch (at most all texts, so many `samples` a prompt), max_memory, and `spare`, its bytes beside the
    weights.
    """
    device = device_of(args)
    args.max_memory = args.max_memory or 0.8 * memory_of(device)
    model = GPT.from_pretrained(args.model, device, getattr(torch, args.dtype))
    encoder = load_tokenizer(args.model)
    if encoder.n_vocab != model.config.n_vocab:
        raise InputError(f"{args.model}: a vocabulary of {encoder.n_vocab} tokens for a model of "
                         f"{model.config.n_vocab}; fetch both from one model")
    texts, prompts = asked(args, model, encoder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {parameters:,} parameters, frozen, {args.dtype} on {device}; {len(texts)} prompts")
    args.spare = args.max_memory * 2 ** 30 - sum(weight.nbytes for weight in model.parameters())       # bytes
    prefix, longest = encode(encoder, getattr(args, "prefix", ""), "--prefix"), max(map(len, prompts))
    if prefix and len(prefix) + longest + args.tokens > model.config.n_positions:
        raise InputError(f"--prefix: its {len(prefix)} tokens, a prompt of {longest} and {args.tokens} more "
                         f"go past the model's context of {model.config.n_positions}; shorten one of them")
    batch = args.batch or fit_batch(model, len(prefix) + longest, args.tokens, args.spare / 2)
    args.batch = min(batch, samples * len(prompts))
    return model.pack(args.batch), encoder, texts, prompts


def asked(args, model, encoder):
    """The prompts of the options, or the model's own -> their texts, and encoded."""
    own = Path(args.model) / "prompts.txt"
    texts = (args.prompt or []) + (read_prompts(args.prompts) if args.prompts else [])
    if not texts and own.is_file():
        texts = read_prompts(own)
    if not texts:
        return [""], [[model.config.bos_token_id]]             # texts from their beginning on
    if args.dialogue:
        texts = [text if text.startswith("\n\nHuman:") else f"\n\nHuman: {text}\n\nAssistant:"
                 for text in texts]
    return encode_prompts(model, encoder, texts, args.tokens)


def memory_of(device):
    """What is free of a GPU's memory, or what this machine or container has, GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 ** 30
    limit = text_of(Path("/sys/fs/cgroup/memory.max"))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(whole, int(limit) if limit.isdecimal() else whole) / 2 ** 30


def fit_batch(model, longest, n_tokens, spare):
    """
    How many texts side by side, a power of two, fit into `spare` bytes, drawn after up to `longest` tokens;
    beyond a bound it gains little.
    """
    config, W = model.config, model.wte.weight
    cached = 2 * config.n_layer * (longest + n_tokens) + 4 * n_tokens      # recorded states and psi too
    reading = longest * (3 * 4 * config.n_head * longest + 4 * config.n_inner * W.itemsize)
    text = cached * config.n_embd * W.itemsize + reading + 12 * 4 * config.n_vocab  # rows of float32 logits
    if spare < text:
        raise InputError(f"{text / 2 ** 30:.4f} GiB for a text beside the weights, and --max-memory leaves "
                         f"{max(spare, 0) / 2 ** 30:.4f}; allow more, or take shorter prompts or a smaller "
                         f"--model")
    return min(1024 if W.is_cuda else 256, 2 ** int(math.log2(spare // text)))


def check_writable(path):
    """InputError now rather than after the work, where a file could not be written later."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = Path(f"{target}.{os.getpid()}.part")
        probe.touch()
        probe.unlink()
        if target.exists() and not target.is_file():
            raise OSError(0, "is no regular file")             # a directory, a device
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def stream(encoder, eos, beginning):
    """A `watch` for generate: prints the first row's tokens as they are drawn."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")     # a character may span tokens
    print(f"\n{beginning}", end="", flush=True)

    def watch(tokens):
        if tokens[0] != eos:
            print(decoder.decode(encoder.decode_single_token_bytes(tokens[0].item())), end="", flush=True)
    return watch


# The options that only some methods have. (At its default one is as good as not given.)
OF = {"step_size": ("control", "guided"), "sign": ("control", "guided"), "candidates": ("guided",),
      **dict.fromkeys(("steps", "radius", "max_kl", "target"), ("control",))}


def parse_args(argv):
    """The options; what only the model or the value net can tell is checked in main."""
    parser = Parser(__doc__, seed=1000)      # other draws than those V was trained on
    add = parser.add_argument
    add("--value", type=weighted, action="append", metavar="FILE[:WEIGHT]", help="from train_value.py "
        "(default: out/value.safetensors); given again: the weighted sum of the V, and of their rewards")
    add("--reward", type=named, metavar="NAME", help="as for train_value.py (default: V's own)")
    add("--samples", type=count, default=100, help="texts a prompt")
    add("--show", type=number(int, 0, 2 ** 31), default=4, help="pairs of texts printed")
    add("--temperature", type=number(float, 0, 100), default=1.0, help="0: the most probable token")
    add("--top-k", type=int, help="draw from the k most probable tokens (and their equals) only")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="draw from the fewest tokens of this mass")
    add("--json", type=named, metavar="FILE", help="write every text and figure there")
    add("--only", action="store_true", help="skip the uncontrolled texts")
    add("--method", choices=("control", "guided", "base"), default="control", help="control: u, by gradient "
        "ascent on V; guided: candidates re-weighted by exp(step size * V) of the state each leads to; base: "
        "none")
    add("--candidates", type=count, default=20, help="of guided: so many of the most probable tokens")
    add("--prefix", default="", metavar="TEXT", help="comes before each prompt, but not into the text or "
                                                     "its KL")
    add("--best-of", type=count, default=1, metavar="N", help="draw N texts for each one kept: the best")
    add("--by", choices=("reward", "value"), default="reward", help="what is best: value is V at the last "
                                                                    "token")
    add("--steps", type=count, default=1, help="of gradient ascent on V, a token")
    add("--step-size", type=number(float, 0, 1e6), help="of all steps together, 1 / beta (default: "
        "saved with V, see NATS in train_value.py; of guided: 1)")
    add("--radius", type=number(float, 0, math.inf), help="of the ball around the state; 1: the typical "
                                                          "distance from the mean (default: saved with V)")
    add("--max-kl", type=number(float, 0, math.inf), default=math.inf, help="of the control, nats a token")
    add("--target", type=number(float, -1e9, math.inf), default=math.inf,
        help="of V: no more control than reaches it")
    add("--sign", type=int, choices=(1, -1), default=1, help="-1 steers towards low V")
    args = parser.parse_args(argv)
    if 0 < args.temperature < 1e-3:
        raise InputError(f"--temperature {args.temperature:g}: choose 0 (most probable token) or 0.001 up")
    if args.target < math.inf and args.temperature == 0:
        raise InputError("--target: of the draw on average, and --temperature 0 draws none; leave it out")
    if idle := [name for name, methods in OF.items()
                if args.method not in methods and getattr(args, name) != parser.get_default(name)]:
        names = " and no --".join(idle).replace("_", "-")
        raise InputError(f"--method {args.method} has no --{names}; leave it out")
    if args.by == "value" and args.best_of == 1:
        raise InputError("--by: without --best-of there is nothing to choose from; leave it out")
    return args


def weighted(text):
    """An argparse type: "FILE" or "FILE:WEIGHT" -> (file, weight)."""
    file, colon, weight = named(text).rpartition(":")
    try:
        weight = float(weight) if file else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text}: no such weight")
    return file or text, weight


def load_values(args, model):
    """-> the value net, a weighted sum of several; what is saved with each; the reward to report."""
    if args.method == "base" and args.by == "reward" and args.reward and not args.value:
        return None, [], load_reward(args.reward, args.device)             # nothing to steer or judge with
    files, weights = zip(*(args.value or [("out/value.safetensors", 1.0)]))
    values, rewards = [ValueNet.load(file, model) for file in files], []
    wanted = {"reward": str, "method": str, "step_size": float, "radius": float}
    for file, weight, value in zip(files, weights, values):
        said = {key: value.info.get(key) for key in wanted}
        if missing := [key for key, x in said.items() if type(x) is not wanted[key] or x != x]:       # NaN
            raise InputError(f"{file}: does not say its {', '.join(missing)}; train it again")
        rewards.append(load_reward(args.reward or value.info["reward"], args.device))
        print(f"{file}: weight {weight:g}, method {value.info['method']}, reward {value.info['reward']}")

    def reward(texts):
        """The weighted sum of the nets' own rewards."""
        scores = zip(*(reward(texts) for reward in rewards))
        return [sum(w * score for w, score in zip(weights, row)) for row in scores]
    return (values[0] if weights == (1.0,) else ValueNet.sum(values, weights),
            [{**value.info, "weight": weight} for value, weight in zip(values, weights)],
            rewards[0] if args.reward or len(rewards) == 1 else reward)


def make_control(args, model, value, infos):
    """The Controller, or Guided, that the options describe; where they are silent, as saved with V."""
    if args.method == "base":
        return value and Controller(value, step_size=0.0)      # no control, but V is read
    if args.method == "guided":
        scale = args.sign * (1.0 if args.step_size is None else args.step_size)
        print(f"value-guided decoding: {args.candidates} candidates a token, re-weighted by "
              f"exp({scale:.3g} V)")
        return Guided(value, scale, min(args.candidates, model.config.n_vocab))
    radius = min(info["radius"] for info in infos) if args.radius is None else args.radius
    # The root of KL is, to first order, a norm of u: so the sum costs no more than the dearest net by itself
    # does at its own step.
    saved = 1 / max(sum(abs(info["weight"]) / max(info["step_size"], 1e-9) for info in infos), 1e-9)
    step_size = args.sign * (saved if args.step_size is None else args.step_size) / args.steps
    print(f"control: {args.steps} step{'s' * (args.steps > 1)} of {step_size:.3g}, radius {radius:g}, at "
          f"most {args.max_kl:g} nats a token" + f", up to V = {args.target:g}" * (args.target < math.inf))
    return Controller(value, args.steps, step_size, radius, args.max_kl, args.target)


def main(argv=None):
    """Draw the texts without and with control, show pairs of them and what they earned and cost."""
    args = parse_args(argv)
    if args.json:
        check_writable(args.json)
    model, encoder, texts, prompts = load(args, args.samples * args.best_of)
    n_vocab, eos = model.config.n_vocab, model.config.eos_token_id
    if args.top_k is not None and not 1 <= args.top_k <= n_vocab:
        raise InputError(f"--top-k {args.top_k}: choose 1 to {n_vocab}, the size of the vocabulary")
    value, infos, reward = load_values(args, model)
    control = make_control(args, model, value, infos)
    prefix = encode(encoder, args.prefix)
    plans = {"uncontrolled": {}} if not args.only else {}
    if args.method != "base" or prefix or args.best_of > 1 or args.only:
        label = "controlled" if args.method == "control" else args.method
        plans[label] = dict(control=control, prefix=prefix, best_of=args.best_of, by=args.by)
        print(f"prefix: {args.prefix!r}\n" * bool(prefix)
              + f"best of {args.best_of} by {args.by}\n" * (args.best_of > 1), end="")
    decoding, samples = Decoding(args.temperature, args.top_k, args.top_p), args.samples * len(prompts)
    kl_known = decoding == Decoding() or not prefix and args.best_of == 1 and args.temperature > 0
    results, table = {}, {}
    for label, plan in plans.items():
        watched = samples == 1 and plan.get("best_of", 1) == 1
        watch = stream(encoder, eos, f"{label}: {texts[0]}") if watched else None
        results[label] = rollout, scores, _ = roll_out(
            model, encoder, reward, prompts, samples, args.tokens, args.seed, decoding=decoding, watch=watch,
            batch=args.batch, progress=progress(f"{label} texts"), **plan)
        table[label] = figures(rollout, scores)
        if args.temperature == 0 or plan and not kl_known:     # KL is not defined, or not known
            table[label]["kl_token"] = table[label]["kl_text"] = math.nan
        if args.temperature == 0:                              # nor is what a draw is worth on average
            table[label]["after"] = math.nan
    if samples > 1:
        show_pairs(results, range(min(args.show, samples)))
    show(table)
    if args.json:
        settings = {name: setting for name, setting in vars(args).items() if name != "spare"}
        write_json(args.json, settings, in_turn(texts, samples), results, table)


def show_pairs(results, rows):
    """The same prompt and the same draws, without and with control."""
    for i in rows:
        print()
        for label, (_, scores, written) in results.items():
            print(f"{label:13}{scores[i]:+.2f}  {' '.join(written[i].split())}")


def write_json(path, settings, prompts, results, table):
    """All of it, for machines; what is not defined or has no bound is null."""
    def clean(row):
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    whole = {"settings": clean(settings)}
    for label, (rollout, scores, written) in results.items():
        kl = (rollout.kl * rollout.mask).sum(1).tolist()
        entries = [{"prompt": prompt, "text": text, "reward": score,
                    "kl": nats if math.isfinite(table[label]["kl_text"]) else None}
                   for prompt, text, score, nats in zip(prompts, written, scores.tolist(), kl)]
        whole[label] = {"figures": clean(table[label]), "texts": entries}
    write_whole(path, [json.dumps(whole, indent=1).encode()])


def progress(label):
    """A line on stderr that counts texts, where stderr is a terminal."""
    start = time.time()

    def report(done, total):
        if sys.stderr.isatty():
            left = (time.time() - start) * (total - done) / done
            print(f"\r{label}: {done}/{total}, {left:.0f} s left ", end="" if done < total else "\r\033[K",
                  file=sys.stderr, flush=True)
    return report


def run(main):
    """Run a script: InputError is one line and exit code 2, an interrupt exit code 130."""
    clear = "\033[K" * sys.stderr.isatty()                     # of a progress line
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")               # a terminal that has not all characters
    try:
        main()
    except (InputError, OSError) as error:                     # OSError: a disk that is full or forbidden
        print(f"{clear}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{clear}interrupted; every file is the whole old one or the whole new one", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
