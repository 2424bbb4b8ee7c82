"""
Speed: ms a step and tokens a second, without control, with it, and with a budget of KL, beside
transformers' generate where that is installed, in one run.

    python tests/evidence/bench.py                                   # gpt2's shape, float32, CPU
    python tests/evidence/bench.py --device cuda --dtype bfloat16 --batches 1,32,256 --shape gpt2-xl

Random weights: speed does not depend on them. Rounds are interleaved and medians printed, since the
machine may be shared. floor: the time to read weights and cache once, at the bandwidth of a large
sum. kernels: operations of a step that are not views, nearly what a GPU launches; KL is part of
every step. The last line is JSON.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from control import Sampler, ascend, steer, uniform_table                             # noqa: E402
from model import GPT, Config                                                         # noqa: E402
from value import ValueNet                                                            # noqa: E402

SHAPES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20),
          "gpt2-xl": (1600, 48, 25)}
PROMPT, ROUNDS = 16, 3

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
    prompts, table = [[50256] * PROMPT] * batch, uniform_table(batch, tokens, 0)

    def push(hidden, steps=1):
        return ascend(value, hidden, steps, 1.0 / steps)
    how = {"plain": (None, math.inf), "control": (push, math.inf), "max-kl": (push, 0.1),
           "30 steps": (lambda hidden: push(hidden, 30), math.inf)}
    runs, counts = {}, {}
    for name, (controller, max_kl) in how.items():
        sampler = Sampler(model, batch, PROMPT + tokens, tokens, False, lambda hidden, c=controller,
                          k=max_kl: steer(model, hidden, c, 1.0, k))
        runs[name] = lambda sampler=sampler: sampler.run(prompts, table)
        sampler.begin(prompts, table)
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

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--tokens", type=int, default=64, help="drawn a text")
    args = parser.parse_args()
    dtype, (n_embd, n_layer, n_head) = getattr(torch, args.dtype), SHAPES[args.shape]
    with torch.device(args.device):
        model = GPT(Config(50257, 1024, n_embd, n_layer, n_head, 4 * n_embd)).to(dtype).eval()
    model.requires_grad_(False)
    speed, results = bandwidth(args.device), []
    for batch in map(int, args.batches.split(",")):
        with torch.no_grad():
            runs, counts = samplers(model, batch, args.tokens)
        if other := transformers_run(args.shape, batch, args.tokens, args.device, dtype):
            runs["transformers"] = other
        with torch.no_grad():
            for run in runs.values():                           # warm up, and capture
                run()
            times = {name: [] for name in runs}
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    times[name].append(seconds(run, args.device) / args.tokens * 1e3)
        ms = {name: median(rounds) for name, rounds in times.items()}
        cache = 2 * n_layer * batch * (PROMPT + args.tokens) * n_embd * dtype.itemsize
        ms["floor"] = (sum(p.nbytes for p in model.parameters()) + cache) / speed * 1e3
        results.append({"batch": batch, "kernels": counts, **ms})
        print(f"batch {batch:4}  " + "  ".join(f"{name} {t:.2f} ms" for name, t in ms.items()) +
              f"  {batch / ms['control'] * 1e3:.0f} tokens/s with control")
    print("kernels    " + "  ".join(f"{name} {count}" for name, count in counts.items()))
    print(json.dumps({**vars(args), "ms_a_step": results}))

if __name__ == "__main__":
    main()
