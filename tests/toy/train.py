"""
Train the tiny GPT on the toy language and write its checkpoint beside this file.

    python tests/toy/train.py            # ten minutes on two CPU cores
    python tests/toy/train.py --twist    # the second language, in twist/

The checkpoint has the public GPT-2 layout (config.json, model.safetensors, vocab.json), so that
the tiny model runs through the same code as the real ones. Ends by printing the cross-entropy above
the grammar's own, in nats a token, which tests/test_toy.py holds below 0.002.
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import grammar                                                                        # noqa: E402
from model import BYTES, GPT, TRANSPOSED, Config, load_tokenizer                      # noqa: E402

CONTEXT = 64     # positions of the model
LONGEST = 48     # tokens of a review it is trained on; the few longer ones are cut, not dropped


def vocabulary(start):
    """The 256 bytes, every word of the grammar, the end of text: in vocab.json's spelling."""
    words, seen, frontier = [], set(), [start]
    while frontier:
        state = frontier.pop()
        seen.add(state[0])
        for _, word, following in grammar.choices(state):
            words += [word] if word not in words else []
            frontier += [following] if following[0] not in seen else []
    spell = {byte: character for character, byte in BYTES.items()}
    words = sorted(set(words) - {grammar.END} - {chr(b) for b in range(256)})
    tokens = [spell[b] for b in range(256)]
    tokens += ["".join(spell[b] for b in word.encode()) for word in words] + [grammar.END]
    return {token: i for i, token in enumerate(tokens)}


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
           "bos_token_id": config.bos, "eos_token_id": config.ends[0]}
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
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--twist", action="store_true", help="the second language")
    parser.add_argument("--batch", type=int, default=64, help="reviews a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    torch.manual_seed(0)
    start, folder = (grammar.START_TWIST, HERE / "twist") if args.twist else (grammar.START, HERE)
    tokens = vocabulary(start)
    (folder / "vocab.json").write_text(json.dumps(tokens, indent=0) + "\n", encoding="utf-8")
    end = len(tokens) - 1
    config = Config(n_vocab=len(tokens), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
                    n_inner=256, bos=end, ends=[end])
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
