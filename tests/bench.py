"""
What the control costs and how fast the sampler is: ratios, all rows in one process and in turn. No download.

    python tests/bench.py                                    # gpt2's shape, float32, on this CPU: ten minutes
    python tests/bench.py --dtype bfloat16 --batches 1,32,256                    # the same on a GPU
    OMP_NUM_THREADS=1 python tests/bench.py --batches 1                          # on a CPU that others use too

Weights are random, no text ends. Every round draws one batch of texts by every row; the table has the
medians of the rounds, ratios taken within a round. Samplers are warm: buffers, and graphs, are there.

    plain         no control
    control       one step, the default; neither KL nor V reported (report=False)
    30 steps      the same with the paper's 30
    KL reported   one step, and KL, log p, V before and after: what sample.py prints
    kl_ball       that, and a budget of nats a token
    paper         the same 30 steps as the paper's code takes them: SGD by autograd, in Python, without a graph
    transformers  its generate: no control, sampling at temperature 1, key/value cache, the same weights

    ms      a step of the whole batch, milliseconds, reading the prompts (16 tokens) included
    tok/s   tokens drawn a second by the whole batch
    cost    time over that of `plain`
    hf      transformers' time over this row's: so many times as fast
    floor   the floor's time over this row's. Floor: all weights, and the keys and values of half the tokens,
            read once a step at the measured bandwidth of this memory (reading 1 GiB); arithmetic is free
    peak    memory at most taken by `control`, over weights + cache (a CPU's: resident, Python and torch not)
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample                                                                         # noqa: E402
from control import Controller, Decoding, Sampler, uniform_table                      # noqa: E402
from model import GPT, TRANSPOSED, Config                                             # noqa: E402
from value import ValueNet                                                            # noqa: E402

SHAPES = {"tiny": (2, 64, 4), "distilgpt2": (6, 768, 12), "gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16),
          "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}                   # n_layer, n_embd, n_head
PROMPT = 16


@dataclass
class Paper:
    """The control as the paper's official code has it: SGD on u by autograd."""
    value: ValueNet
    steps: int = 30
    step_size: float = 1.0
    max_kl: float = float("inf")

    def __call__(self, hidden):
        hidden = hidden.float()
        with torch.enable_grad():
            u = torch.zeros_like(hidden, requires_grad=True)
            optimizer = torch.optim.SGD([u], lr=self.step_size)
            for _ in range(self.steps):
                optimizer.zero_grad()
                (-self.value.climbed(hidden + u).sum()).backward()
                optimizer.step()
        return u.detach()


def random_model(name, device, dtype):
    """A GPT of that shape, weights as GPT-2's before training; its end of text is a token that never comes."""
    layers, n_embd, heads = SHAPES[name]
    with torch.device("meta"):
        model = GPT(Config(50257, 1024, n_embd, layers, heads, 4 * n_embd, 1e-5, 50256, eos_token_id=-1))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.zero_() if name.endswith("bias") else weight.fill_(1) if "ln_" in name else weight.normal_(0, 0.02)
    return model


def transformers_model(model):
    """The same weights as a GPT2LMHeadModel; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c, weight = model.config, model.wte.weight
    config = GPT2Config(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, eos_token_id=None, bos_token_id=None)
    theirs = GPT2LMHeadModel(config).to(weight.device, weight.dtype).eval()
    state = {f"transformer.{key}": tensor.T if key.endswith(TRANSPOSED) else tensor
             for key, tensor in model.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": weight})
    return theirs


def memory(device, field="VmHWM"):
    """Bytes this process holds (VmRSS), or held at most (VmHWM) since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
    except OSError:                                            # no Linux
        return float("nan")


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device):
    """Bytes a second of reading memory."""
    numbers, seconds = torch.ones(2 ** 28, device=device), []
    for _ in range(5):
        started = clock(device)
        numbers.sum()
        seconds.append(clock(device) - started)
    return numbers.nbytes / min(seconds)


def make_rows(model, theirs, value, batch, n_tokens, bare):
    """{label: a function that draws the batch}, and what `control` held at most over weights + cache."""
    prompts, uniforms = [[1] * PROMPT] * batch, uniform_table(batch, n_tokens, 0)
    control, rows, device = Controller(value), {}, model.wte.weight.device

    def add(label, **how):
        sampler = Sampler(model, batch, PROMPT + n_tokens, n_tokens, Decoding(), **how)
        rows[label] = lambda: sampler.run(prompts, uniforms)
        return sampler

    forget_peak(device)
    sampler = add("control", control=control, report=False)
    rows["control"]()
    needed = sum(weight.nbytes for weight in model.parameters()) + 2 * sampler.cache.keys.nbytes
    peak = (memory(device) - bare) / needed
    add("plain", report=False)
    add("30 steps", control=Controller(value, steps=30), report=False)
    add("KL reported", control=control)
    add("kl_ball", control=Controller(value, max_kl=0.01))
    add("paper", control=Paper(value), report=False).graphs = None
    if theirs is not None:
        ids = torch.tensor(prompts, device=device)
        rows["transformers"] = lambda: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=True, top_k=0,
            pad_token_id=0)
    return rows, peak, sampler.cache.keys.nbytes               # half of keys and values: those are as many


def main(argv=None):
    parser = sample.Parser(__doc__, seed=0)
    parser.set_defaults(model="gpt2", tokens=64)
    add = parser.add_argument
    add("--batches", default="1,32", help="texts side by side, commas between")
    add("--rounds", type=sample.count, default=5, help="of which the medians are printed")
    add("--width", type=sample.count, default=64, help="of V's hidden layer")
    args = parser.parse_args(argv)
    if args.model not in SHAPES:
        raise sample.InputError(f"--model takes {', '.join(SHAPES)}")
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    speed, bare = bandwidth(device), memory(device, "VmRSS")
    model = random_model(args.model, device, getattr(torch, args.dtype))
    value = ValueNet(model.config.n_embd, args.width, lift=True).to(device).requires_grad_(False)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}, {args.dtype}, {where}, {args.tokens} tokens, width {args.width}, torch {torch.__version__}, "
          f"{speed / 1e9:.0f} GB/s")
    weights, theirs = sum(weight.nbytes for weight in model.parameters()), None
    for i, batch in enumerate(map(int, args.batches.split(","))):
        rows, peak, cached = make_rows(model, theirs, value, batch, args.tokens, bare)
        if i == 0:                                             # after the first peak, not to be part of it
            theirs = transformers_model(model)
            rows = make_rows(model, theirs, value, batch, args.tokens, bare)[0]
            if theirs is None:
                print("transformers is not installed: its row is left out")
        seconds = {label: [] for label in rows}
        for round in range(args.rounds + 1):
            for label, draw in rows.items():
                started = clock(device)
                draw()
                seconds[label].append(clock(device) - started)
        print(f"\nbatch {batch}, peak {peak:.2f}{'ms':>16}{'tok/s':>9}{'cost':>7}{'hf':>7}{'floor':>7}")
        for label, taken in seconds.items():
            step = statistics.median(taken[1:]) / args.tokens
            cost, hf = (statistics.median([a / b for a, b in zip(*pair)][1:]) if pair[0] and pair[1] else float("nan")
                        for pair in ((taken, seconds["plain"]), (seconds.get("transformers"), taken)))
            print(f"{label:22}{1e3 * step:10.2f}{batch / step:9.0f}{cost:7.2f}{hf:7.2f}"
                  f"{(weights + cached) / speed / step:7.2f}", flush=True)


if __name__ == "__main__":
    sample.run(main)
