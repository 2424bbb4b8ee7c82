"""
The protocol of DExperts' sentiment tables (Liu et al. 2021), for those who have the weights and a GPU.

    python -m tests.evidence.published --value out/large.pt --prompts neutral.txt --scorer gpt2-xl \
        --judge FILE.py:FUNCTION --strength 0,0.5,1,2

A row a strength: positive, the share of texts, with their prompts, that the judge puts above 0; ppl,
the mean over texts of the continuation's perplexity under the scorer, those above 10,000 left out;
dist-1, 2, 3, different words, pairs, triples by the words of a prompt's texts, mean over prompts;
and KL in nats a text. PUBLISHED.md has the numbers of others, and what differs.
"""
import argparse
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from control import ascend, generate, uniform_table
from model import load, read_prompts, run_script, show_progress
from value import ValueNet, load_reward


def distinct(texts, n):
    """Different groups of n words by all words, of one prompt's texts"""
    words = [text.split(" ") for text in texts]
    groups = {tuple(row[i:i + n]) for row in words for i in range(len(row) - n + 1)}
    return len(groups) / sum(len(row) for row in words)


@torch.no_grad()
def perplexity(scorer, prompts, drawn, group=16):
    """Tokens of prompts and of what was drawn after them -> the mean over texts, as published"""
    found = []
    for i in range(0, len(drawn), group):
        rows = [torch.tensor(p + d) for p, d in zip(prompts[i:i + group], drawn[i:i + group])]
        tokens = pad_sequence(rows, batch_first=True).to(scorer.wte.weight.device)
        log_p = scorer.unembed(scorer(tokens[:, :-1])).log_softmax(-1)          # (B, T - 1, n_vocab)
        log_p = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
        for row, prompt, text in zip(log_p, prompts[i:i + group], drawn[i:i + group]):
            start = len(prompt) - 1
            found.append((-row[start:start + len(text)].mean()).exp())
    found = torch.stack(found)
    return found[found < 1e4].mean().item()


def measure(rollout, tokenizer, prompts, each, scorer, judge):
    """-> the numbers of a row"""
    drawn = [rollout.drawn(i) for i in range(len(prompts))]
    texts = [tokenizer.decode(tokens) for tokens in drawn]
    groups = [texts[i:i + each] for i in range(0, len(texts), each)]
    row = [100 * (judge(rollout.texts(tokenizer, prompts)) > 0).double().mean().item(),
           perplexity(scorer, prompts, drawn)]
    row += [sum(distinct(group, n) for group in groups) / len(groups) for n in (1, 2, 3)]
    return row + [(rollout.kl * rollout.mask).sum(1).mean().item()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--value", required=True, help="a net of train_value.py")
    parser.add_argument("--prompts", required=True, help="a text file, a prompt a line")
    parser.add_argument("--scorer", required=True, help="the model that perplexity is read from")
    parser.add_argument("--judge", required=True, help="as --reward of train_value.py; positive: > 0")
    parser.add_argument("--judge-tokenizer", help="of a classifier without tokenizer files")
    parser.add_argument("--strength", default="0,1", help="times the trained step size")
    parser.add_argument("--each", type=int, default=25, help="texts a prompt")
    parser.add_argument("--tokens", type=int, default=20, help="drawn a text")
    parser.add_argument("--top-p", type=float, default=0.9, help="cut p before control")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    value = ValueNet.load(args.value)
    info = value.info
    dtype = getattr(torch, info["dtype"])
    model, tokenizer = load(info["model"], info["tokenizer"], args.device, dtype)
    value = value.check_model(model)
    scorer, _ = load(args.scorer, info["tokenizer"], args.device, dtype)
    judge = load_reward(args.judge, args.device, args.judge_tokenizer)
    prompts = read_prompts(model, tokenizer, info["model"], path=args.prompts)
    rows = [prompt for prompt in prompts for _ in range(args.each)]
    table = uniform_table(len(rows), args.tokens, 1)
    print("strength  positive    ppl  dist-1  dist-2  dist-3    KL")
    for strength in map(float, args.strength.split(",")):
        control = partial(ascend, value, step_size=strength * info["step_size"], radius=info["radius"])
        rollout = generate(model, rows, table, control if strength else None, top_p=args.top_p,
                           progress=partial(show_progress, f"strength {strength:g}"))
        positive, ppl, *dist, kl = measure(rollout, tokenizer, rows, args.each, scorer, judge)
        print(f"{strength:8g} {positive:8.1f}% {ppl:6.1f}" + "".join(f"{d:8.2f}" for d in dist)
              + f"{kl:6.2f}", flush=True)


if __name__ == "__main__":
    run_script(main)
