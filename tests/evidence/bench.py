"""
Speed: ms a step and tokens a second, without control, with it, and with a budget of KL, beside
transformers' generate where that is installed, in one run.

    python -m tests.evidence.bench                                   # gpt2's shape, float32, CPU
    python -m tests.evidence.bench --device cuda --dtype bfloat16 --batches 1,32,256 --shape gpt2-xl

Random weights: speed does not depend on them. Rounds are interleaved and medians printed, since the
machine may be shared. floor: the time to read weights and cache once, at the bandwidth of a large
sum. kernels: operations of a step that are not views, nearly what a GPU launches; KL is part of
every step. The last line is JSON.
"""
import argparse
import json
import time
from functools import partial
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from control import Sampler, ascend, uniform_table
from model import GPT, Config
from value import ValueNet

SHAPES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20),
          "gpt2-xl": (1600, 48, 25)}
PROMPT = 16         # tokens
ROUNDS = 3


def seconds(run, device):
    """Of one call, the device's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


class Kernels(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(sampler):
    """Of one step."""
    with Kernels() as mode:
        sampler.step()
    return mode.count


def bandwidth(device):
    """Bytes a second of a sum over 400 MB."""
    numbers = torch.zeros(100_000_000, device=device)
    return numbers.nbytes / min(seconds(numbers.sum, device) for _ in range(5))


def samplers(model, batch, tokens):
    """-> {name: a run of `tokens` steps}, {name: kernels}"""
    value = ValueNet(model.config.n_embd).to(model.wte.weight.device).requires_grad_(False)
    prompts = [[50256] * PROMPT] * batch
    table = uniform_table(batch, tokens, 0)
    one_step = partial(ascend, value)
    ways = {"plain": dict(), "control": dict(controller=one_step),
            "max-kl": dict(controller=one_step, max_kl=0.1),
            "30 steps": dict(controller=partial(ascend, value, steps=30, step_size=1 / 30))}
    runs = {}
    counts = {}
    for name, options in ways.items():
        sampler = Sampler(model, batch, PROMPT + tokens, tokens, **options)
        runs[name] = partial(sampler.run, prompts, table)
        sampler.prefill(prompts, table)
        counts[name] = kernels(sampler)
    return runs, counts


def transformers_run(shape, batch, tokens, device, dtype):
    """transformers' generate on the same shape, or None."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    n_embd, n_layer, n_head = SHAPES[shape]
    config = GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head, eos_token_id=None,
                        pad_token_id=0)
    model = GPT2LMHeadModel(config).to(device, dtype).eval()
    ids = torch.full((batch, PROMPT), 11, device=device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                                  max_new_tokens=tokens, min_new_tokens=tokens)

@torch.no_grad()
def medians(runs, device, tokens):
    """{name: run} -> {name: ms a step}, the runs in turn"""
    for run in runs.values():                                   # warm up, and capture
        run()
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(seconds(run, device) / tokens * 1e3)
    return {name: median(rounds) for name, rounds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--tokens", type=int, default=64, help="drawn a text")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    n_embd, n_layer, n_head = SHAPES[args.shape]
    config = Config(n_vocab=50257, n_positions=1024, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                    n_inner=4 * n_embd)
    with torch.device(args.device):
        model = GPT(config).to(dtype).eval().requires_grad_(False)
    weights = sum(weight.nbytes for weight in model.parameters())
    speed = bandwidth(args.device)
    results = []
    for batch in map(int, args.batches.split(",")):
        with torch.no_grad():
            runs, counts = samplers(model, batch, args.tokens)
        other = transformers_run(args.shape, batch, args.tokens, args.device, dtype)
        if other:
            runs["transformers"] = other
        ms = medians(runs, args.device, args.tokens)
        cache = 2 * n_layer * batch * (PROMPT + args.tokens) * n_embd * dtype.itemsize
        ms["floor"] = (weights + cache) / speed * 1e3
        results.append({"batch": batch, "kernels": counts, **ms})
        print(f"batch {batch:4}  " + "  ".join(f"{name} {t:.2f} ms" for name, t in ms.items())
              + f"  {batch / ms['control'] * 1e3:.0f} tokens/s with control")
    print("kernels    " + "  ".join(f"{name} {count}" for name, count in counts.items()))
    print(json.dumps({**vars(args), "ms_a_step": results}))


if __name__ == "__main__":
    main()
