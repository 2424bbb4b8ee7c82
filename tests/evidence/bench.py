"""
Speed: tokens a second beside two engines, the price of control, and how it all grows.

    python -m tests.evidence.bench                                  # gpt2's shape, float32, CPU
    python -m tests.evidence.bench --growth                         # milliseconds a step, and slopes
    python -m tests.evidence.bench --device cuda                    # all that wants a GPU, in one call

Weights are random: speed does not depend on them. Runs take turns and medians are printed, since
the machine may be shared. A line a batch, in tokens a second, and ms a step in brackets:

    transformers, ctranslate2   their generate on the same shape, where they are installed
    no control                  this code; it records KL and log-probabilities, too
    control                     one step of ascent
    budget                      control, and at most 0.1 nats a token
    scored                      control, and the reward of every beginning of a text (train_value.py)

kernels: operations of a controlled step that are not views, nearly what a GPU launches.
"""
import argparse
import math
import tempfile
import time
from functools import partial
from statistics import median

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from control import Sampler, ascend, generate, uniform_table
from model import GPT, Config
from train_value import score
from value import ValueNet, sentiment

SHAPES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20),
          "gpt2-xl": (1600, 48, 25), "tiny": (64, 2, 4)}        # n_embd, n_layer, n_head
PROMPT = 16         # tokens
ROUNDS = 3


class Words:
    """A tokenizer: every token is a word, some of which the reward counts"""
    def decode(self, tokens):
        return " ".join(["great", "dull", "plot", "cast"][token % 4] for token in tokens)


class Kernels(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def random_model(shape, device, dtype, n_vocab=50257):
    torch.manual_seed(0)
    n_embd, n_layer, n_head = SHAPES[shape]
    with torch.device(device):
        model = GPT(Config(n_vocab, 1024, n_embd, n_layer, n_head, 4 * n_embd)).to(dtype)
    return model.eval().requires_grad_(False)


def random_control(model):
    value = ValueNet(model.config.n_embd).to(model.wte.weight.device).requires_grad_(False)
    torch.nn.init.normal_(value.gradient_head.weight, std=0.1)
    return partial(ascend, value)


def seconds(run, device):
    """Of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(runs, device):
    """{name: a run} -> {name: seconds}; the first call warms up and captures"""
    times = {name: [] for name in runs}
    for _ in range(1 + ROUNDS):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: median(rounds[1:]) for name, rounds in times.items()}


def sampler_run(model, batch, tokens, **how):
    """-> a call that draws `tokens` tokens of `batch` texts, with a sampler made once"""
    sampler = Sampler(model, batch, PROMPT + tokens, tokens, **how)
    prompts = [[1] * PROMPT] * batch
    return torch.no_grad()(lambda: sampler.run(prompts, uniform_table(batch, tokens, 0)))


def scored_run(model, batch, tokens, controller):
    draw = sampler_run(model, batch, tokens, controller=controller)
    prompts = [[1] * PROMPT] * batch
    return lambda: score(lambda texts: torch.tensor(sentiment(texts)), Words(), prompts, draw())


def kernels(model, batch, controller):
    sampler = Sampler(model, batch, 64, 8, controller=controller)
    with torch.no_grad():
        sampler.prefill([[1] * PROMPT] * batch, uniform_table(batch, 8, 0))
        with Kernels() as mode:
            sampler.step()
    return mode.count


def peers(shape, batch, tokens, device, dtype):
    """-> {engine: a run} of the engines that are installed"""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return {}
    n_embd, n_layer, n_head = SHAPES[shape]
    config = GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head, eos_token_id=None, pad_token_id=0)
    model = GPT2LMHeadModel(config).to(device, dtype).eval()
    ids = torch.full((batch, PROMPT), 1, device=device)
    runs = {"transformers": lambda: model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens,
        min_new_tokens=tokens)}
    try:
        import ctranslate2
    except ImportError:
        return runs
    with tempfile.TemporaryDirectory() as folder:
        spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
            n_layer, n_head, pre_norm=True, activation=ctranslate2.specs.Activation.GELUTanh)
        copy_weights(spec.decoder, model.transformer)
        spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
        spec.validate()
        spec.save(folder)
        engine = ctranslate2.Generator(folder, device=device, compute_type=str(dtype)[6:])
    runs["ctranslate2"] = lambda: engine.generate_batch(
        [["1"] * PROMPT] * batch, max_length=tokens, min_length=tokens, sampling_topk=0,
        include_prompt_in_result=False, max_batch_size=batch)
    return runs


def copy_weights(spec, gpt):
    """transformers' GPT-2 -> a decoder of ctranslate2"""
    def norm(ours, theirs):
        ours.gamma, ours.beta = theirs.weight.detach().numpy(), theirs.bias.detach().numpy()

    def linear(ours, theirs):                                   # theirs is (in, out)
        ours.weight = np.ascontiguousarray(theirs.weight.detach().numpy().T)
        ours.bias = theirs.bias.detach().numpy()
    gpt = gpt.float().cpu()
    spec.scale_embeddings = False
    spec.embeddings.weight = gpt.wte.weight.detach().numpy()
    spec.projection.weight = gpt.wte.weight.detach().numpy()
    spec.position_encodings.encodings = gpt.wpe.weight.detach().numpy()
    norm(spec.layer_norm, gpt.ln_f)
    for ours, theirs in zip(spec.layer, gpt.h):
        norm(ours.self_attention.layer_norm, theirs.ln_1)
        linear(ours.self_attention.linear[0], theirs.attn.c_attn)
        linear(ours.self_attention.linear[1], theirs.attn.c_proj)
        norm(ours.ffn.layer_norm, theirs.ln_2)
        linear(ours.ffn.linear_0, theirs.mlp.c_fc)
        linear(ours.ffn.linear_1, theirs.mlp.c_proj)


def speed(shape, batches, tokens, device, dtype):
    """A line a batch"""
    model = random_model(shape, device, dtype)
    push = random_control(model)
    for batch in batches:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs = {"no control": sampler_run(model, batch, tokens),
                "control": sampler_run(model, batch, tokens, controller=push),
                "budget": sampler_run(model, batch, tokens, controller=push, max_kl=0.1),
                "scored": scored_run(model, batch, tokens, push)}
        runs |= peers(shape, batch, tokens, device, dtype)
        line = f"{shape} {str(dtype)[6:]} batch {batch:3}"
        for name, spent in medians(runs, device).items():
            line += f"  {name} {batch * tokens / spent:.0f} ({spent / tokens * 1e3:.2f} ms)"
        line += f"  kernels {kernels(model, batch, push)}"
        if device == "cuda":
            line += f"  peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"
        print(line, flush=True)


# Growth: {what grows: its sizes}; the others stay at the first of each
GROWTH = {"batch": [8, 16, 32, 64], "tokens": [32, 64, 128, 256], "vocabulary": [8192, 16384, 32768, 65536],
          "rollouts": [128, 256, 512, 1024]}


def growth(device, dtype):
    """Seconds against size, the others fixed: the slope is 1 where twice the size takes twice the time"""
    for grows, sizes in GROWTH.items():
        spent = []
        for size in sizes:
            at = {"batch": 8, "tokens": 32, "vocabulary": 8192, "rollouts": None} | {grows: size}
            model = random_model("tiny", device, dtype, at["vocabulary"])
            push = random_control(model)
            if grows == "rollouts":
                rows = [[1] * PROMPT] * size
                run = partial(generate, model, rows, uniform_table(size, 32, 0), push)
            else:
                run = sampler_run(model, at["batch"], at["tokens"], controller=push)
            spent.append(medians({grows: run}, device)[grows])
        slope = np.polyfit(np.log(sizes), np.log(spent), 1)[0]
        cells = "  ".join(f"{size}: {s * 1e3:.0f} ms" for size, s in zip(sizes, spent))
        print(f"{grows:10}  {cells}  slope {slope:.2f}", flush=True)


def parity(dtype):
    """Captured steps beside eager ones on a GPU: 50 unequal prompts, four windows of the cache"""
    model = random_model("gpt2", "cuda", dtype)
    push = random_control(model)
    prompts = [[1 + i % 7] * (1 + i % 23) for i in range(50)]
    table = uniform_table(50, 220, 1)
    for max_kl in (math.inf, 0.1):
        captured = generate(model, prompts, table, push, max_kl=max_kl, record=True)
        eager = generate(model, prompts, table, push, max_kl=max_kl, record=True, make_sampler=Eager)
        equal = [name for name, column in vars(captured).items() if torch.equal(column, getattr(eager, name))]
        print(f"parity {str(dtype)[6:]} max_kl {max_kl}: equal to the bit: {', '.join(equal)} of "
              f"{len(vars(captured))}", flush=True)
    return captured


class Eager(Sampler):
    step_or_replay = Sampler.step


def on_a_gpu():
    """The list of checks that want a GPU: parity, types, three shapes at three batches, memory"""
    exact = parity(torch.float32)
    rounded = parity(torch.bfloat16)
    same = (exact.tokens == rounded.tokens).float().mean()
    print(f"bfloat16 draws {same:.1%} of float32's tokens; KL a text {exact.kl.sum(1).mean():.4f} and "
          f"{rounded.kl.sum(1).mean():.4f}", flush=True)
    for shape in ("gpt2", "gpt2-medium", "gpt2-xl"):
        for dtype in (torch.float32, torch.bfloat16):
            speed(shape, [1, 32, 256], 64, "cuda", dtype)
    growth("cuda", torch.float32)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: all checks")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--tokens", type=int, default=32, help="drawn a text")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; None: torch's choice")
    parser.add_argument("--growth", action="store_true", help="the table of growth alone")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.growth:
        growth(args.device, torch.float32)
    elif args.device == "cuda":
        on_a_gpu()
    else:
        speed(args.shape, [int(batch) for batch in args.batches.split(",")], args.tokens, "cpu",
              torch.float32)


if __name__ == "__main__":
    main()
