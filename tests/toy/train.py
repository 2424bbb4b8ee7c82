"""
Train a tiny GPT on one of the languages of grammar.py and write its checkpoint.

    python -m tests.toy.train                                 # six minutes on one core, beside this file
    python -m tests.toy.train --language twist                # the second language, in twist/
    python -m tests.toy.train --language late --steps 4000    # the third, in late/

The checkpoint has the public GPT-2 layout (config.json, model.safetensors, vocab.json, merges.txt),
so that the tiny model runs through the same code as the real ones. Ends by printing the cross-entropy
above the grammar's own, in nats a token: below 0.002 in all three.
"""
import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from model import BYTES, GPT, TRANSPOSED, Config, load_tokenizer
from tests.toy import grammar

HERE = Path(__file__).parent
LANGUAGES = {"first": (grammar.START, HERE),             # where it starts, and the checkpoint's folder
             "twist": (grammar.START_TWIST, HERE / "twist"),
             "late": (grammar.START_LATE, HERE / "late")}
CONTEXT = 64     # positions of the model
LONGEST = 48     # tokens of a review it is trained on; the few longer ones are cut, not dropped


def words_of(start):
    """Every word of the language, the end of text left out, sorted"""
    words, seen, waiting = set(), set(), [start]
    while waiting:
        state = waiting.pop()
        for _, word, following in grammar.choices(state):
            words.add(word)
            if following[0] not in seen:
                seen.add(following[0])
                waiting.append(following)
    return sorted(words - {grammar.END})


def learn_merges(words):
    """
    Byte-pair encoding (Sennrich et al. 2016): merge the most frequent pair, until each word is one
    token. Of pairs as frequent as each other, the first in the alphabet.

    words, in vocab.json's spelling -> [(left, right), ..]
    >>> learn_merges(["was", "as"])
    [('a', 's'), ('w', 'as')]
    """
    merges = []
    pieces = [list(word) for word in words]
    while max(map(len, pieces)) > 1:
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        pieces = [merge(piece, pair) for piece in pieces]
    return merges


def merge(piece, pair):
    """(["a", "s", "a"], ("a", "s")) -> ["as", "a"]"""
    merged = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def save_vocabulary(start, folder):
    """vocab.json: the 256 bytes, what merges make of them, the end of text. And merges.txt."""
    spell = {byte: character for character, byte in BYTES.items()}
    words = ["".join(spell[b] for b in word.encode()) for word in words_of(start)]
    merges = learn_merges(words)
    tokens = [spell[b] for b in range(256)]
    tokens += [left + right for left, right in merges]
    tokens.append(grammar.END)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2"] + [f"{left} {right}" for left, right in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocabulary


def encode(reviews, encoder):
    """(inputs, targets), each (size, T): the end, the review, the end; past it targets are -100."""
    reviews = [[grammar.END] + review for review in reviews]
    T = max(map(len, reviews))
    padded = torch.tensor([[encoder.encode_single_token(token) for token in review]
                           + [-100] * (T - len(review)) for review in reviews])
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


def train(model, encoder, start, steps, size, rate):
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        reviews = [grammar.sample(rng, start)[:LONGEST] for _ in range(size)]
        inputs, targets = encode(reviews, encoder)
        loss = F.cross_entropy(model.unembed(model(inputs)).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step:5d}  cross-entropy {loss.item():.4f} nats a token", flush=True)


@torch.no_grad()
def excess(model, encoder, start=grammar.START, n=20_000, seed=1):
    """Cross-entropy less the grammar's own on the same fresh reviews, nats a token."""
    total = count = 0
    for part in range(n // 500):
        reviews = [grammar.sample(random.Random(f"{seed} {part} {i}"), start)[:LONGEST]
                   for i in range(500)]
        inputs, targets = encode(reviews, encoder)
        logits = model.unembed(model(inputs)).flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        total += sum(grammar.log_probability(review, start) for review in reviews)
        count += sum(map(len, reviews))
    return total / count


def save_config(config, folder):
    raw = {"model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": config.n_vocab,
           "n_positions": config.n_positions, "n_embd": config.n_embd, "n_layer": config.n_layer,
           "n_head": config.n_head, "layer_norm_epsilon": config.eps,
           "bos_token_id": config.bos_id, "eos_token_id": config.eos_ids[0]}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def save_weights(model, folder):
    """model.safetensors (github.com/huggingface/safetensors): a header, the data"""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in model.state_dict().items():
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        more = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(more)]}
        data += more
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--language", choices=LANGUAGES, default="first")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64, help="reviews a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    torch.manual_seed(0)
    start, folder = LANGUAGES[args.language]
    vocabulary = save_vocabulary(start, folder)
    end = vocabulary[grammar.END]
    config = Config(n_vocab=len(vocabulary), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
                    n_inner=256, bos_id=end, eos_ids=[end])
    save_config(config, folder)
    model = GPT(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.05)
    encoder = load_tokenizer(folder).encoding
    train(model, encoder, start, args.steps, args.batch, args.rate)
    save_weights(model, folder)
    print(f"cross-entropy above the grammar's: {excess(model, encoder, start):.4f} nats a token")


if __name__ == "__main__":
    main()
