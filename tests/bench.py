"""
What the control costs and how fast the sampler is: ratios, all rows in one process and in turn.

    python tests/bench.py                                    # gpt2's shape on this CPU, about 25 minutes
    python tests/bench.py --dtype bfloat16 --batches 1,32,256                    # on a GPU
    OMP_NUM_THREADS=1 python tests/bench.py                  # on a CPU that others use too

Weights are random, no text ends. Every round draws one batch of texts by every row; the table has the
medians of the rounds, ratios taken within a round. All is warm: buffers, graphs.

    plain         no control
    control       one step, the default; neither KL nor V reported (report=False)
    30 steps      the same with the paper's 30
    KL reported   one step, and KL, log p, V before and after: what sample.py prints
    kl_ball       that, and a budget of nats a token
    paper         30 steps as the paper's code takes them: SGD by autograd, in Python, without a graph
    transformers  its generate: no control, sampling at temperature 1, key/value cache, the same weights

    ms      a step of the whole batch, milliseconds, reading the prompts (16 tokens) included
    tok/s   tokens drawn a second by the whole batch
    cost    time over that of `plain`
    hf      transformers' time over this row's: so many times as fast
    floor   the floor's time over this row's. Floor: all weights, and the keys and values of half the texts,
            read once a step at the measured bandwidth of this memory (summing 1 GiB); arithmetic is free
    peak    memory `control` takes at most over weights + cache (a CPU's: resident, Python and torch not)
"""
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample                                                                         # noqa: E402
from control import Controller, Decoding, Sampler, generate, uniform_table            # noqa: E402
from model import GPT, TRANSPOSED, Config                                             # noqa: E402
from value import ValueNet                                                            # noqa: E402

SHAPES = {"tiny": (2, 64, 4), "distilgpt2": (6, 768, 12), "gpt2": (12, 768, 12),    # n_layer, n_embd, n_head
          "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
PROMPT = 16


@dataclass
class Paper:
    """The control as the paper's official code has it: SGD on u by autograd."""
    value: ValueNet
    steps: int = 30
    step_size: float = 1.0
    max_kl: float = float("inf")
    target: float = float("inf")
    eager = True                                               # autograd from Python at every step

    def __call__(self, hidden):
        with torch.enable_grad():
            u = torch.zeros_like(hidden, dtype=torch.float32, requires_grad=True)
            optimizer = torch.optim.SGD([u], lr=self.step_size)
            for _ in range(self.steps):
                optimizer.zero_grad()
                (-self.value.climbed(hidden + u).sum()).backward()
                optimizer.step()
        return u.detach()


def random_model(name, device, dtype):
    """A GPT of that shape with weights as before training; the end of text is no token."""
    layers, n_embd, heads = SHAPES[name]
    with torch.device("meta"):
        model = GPT(Config(50257, 1024, n_embd, layers, heads, 4 * n_embd, 1e-5, 50256, eos_token_id=-1))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.normal_(0, 0.02) if weight.dim() == 2 else weight.fill_(name.endswith("weight"))
    return model


def transformers_model(model):
    """The same weights as a GPT2LMHeadModel; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return print("transformers is not installed: its row and the column hf are missing")
    ours, weight = model.config, model.wte.weight
    config = GPT2Config(n_embd=ours.n_embd, n_layer=ours.n_layer, n_head=ours.n_head, eos_token_id=None)
    theirs = GPT2LMHeadModel(config).to(weight.device, weight.dtype).eval()
    state = {f"transformer.{key}": tensor.T if key.endswith(TRANSPOSED) else tensor
             for key, tensor in model.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": weight})
    return theirs


def memory(device, since_now=False):
    """Bytes held at most since this was last asked with `since_now`; NaN where the system does not say."""
    if device.type == "cuda":
        if since_now:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not (process := Path("/proc/self")).exists():
        return float("nan")
    if since_now:
        (process / "clear_refs").write_text("5")               # the peak is now what is held
    lines = (process / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(rows, rounds, device):
    """{label: function} -> {label: seconds of every round}, the first round, a warm-up, left out."""
    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {label: [] for label in rows}
    for _ in range(rounds + 1):
        for label, draw in rows.items():
            started = clock()
            draw()
            seconds[label].append(clock() - started)
    return {label: taken[1:] for label, taken in seconds.items()}


def bandwidth(device):
    """Bytes a second of reading memory: 1 GiB, on a GPU eight times in a row."""
    numbers, times = torch.ones(2 ** 28, device=device), 8 if device.type == "cuda" else 1
    seconds = measure({"sum": lambda: [numbers.sum() for _ in range(times)]}, 5, device)["sum"]
    return times * numbers.nbytes / min(seconds)


def needed(model, batch, slots):
    """Bytes of the weights, and of the keys and values of so many tokens a text."""
    config = model.config
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in GPT(config).parameters())
    return model.wte.weight.itemsize * (weights + 2 * config.n_layer * batch * slots * config.n_embd)


def random_control(name, width, device):
    """One step, for a GPT of that shape, on a V and an A of random weights."""
    value = ValueNet(SHAPES[name][1], width, lift=width)
    return Controller(value.to(device).requires_grad_(False))


@torch.no_grad()
def peak(args, batch):
    """What `control` holds at most, over weights + cache. In a process that has held nothing else so far."""
    device, dtype = sample.device_of(args), getattr(torch, args.dtype)
    prompts, uniforms = [[1] * PROMPT] * batch, uniform_table(batch, args.tokens, 0)
    generate(random_model("tiny", device, dtype).pack(), prompts[:1], uniforms[:1, :2],    # loads libraries
             control=random_control("tiny", 8, device))
    bare, model = memory(device, since_now=True), random_model(args.model, device, dtype).pack(batch)
    control = random_control(args.model, args.width, device)
    memory(device, since_now=True)
    generate(model, prompts, uniforms, control=control, report=False)
    return (memory(device) - bare) / needed(model, batch, PROMPT + args.tokens)


def make_rows(model, theirs, control, batch, n_tokens):
    """{label: a function that draws the batch}"""
    prompts, uniforms = [[1] * PROMPT] * batch, uniform_table(batch, n_tokens, 0)
    ways = {"plain": dict(report=False), "control": dict(control=control, report=False),
            "30 steps": dict(control=replace(control, steps=30), report=False),
            "KL reported": dict(control=control), "kl_ball": dict(control=replace(control, max_kl=0.01)),
            "paper": dict(control=Paper(control.value), report=False)}
    samplers = {label: Sampler(model, batch, PROMPT + n_tokens, n_tokens, Decoding(), **how)
                for label, how in ways.items()}
    rows = {label: partial(sampler.run, prompts, uniforms) for label, sampler in samplers.items()}
    if theirs is not None:
        ids = torch.tensor(prompts, device=model.wte.weight.device)
        rows["transformers"] = partial(theirs.generate, ids, attention_mask=ids, max_new_tokens=n_tokens,
                                       do_sample=True, top_k=0, pad_token_id=0)
    return rows


def ratio(above, below):
    """Median over the rounds of above / below; NaN where `above` was not measured."""
    return statistics.median(a / b for a, b in zip(above, below)) if above else float("nan")


def counts(text):
    """An argparse type: "1,32" -> [1, 32]."""
    return [sample.count(n) for n in text.split(",")]


@torch.no_grad()
def main(argv=None):
    parser = sample.Parser(__doc__, seed=0)
    parser.set_defaults(model="gpt2", tokens=240)
    parser.add_argument("--batches", type=counts, default="1,32", help="texts side by side, commas between")
    parser.add_argument("--rounds", type=sample.count, default=5, help="of which the medians are printed")
    parser.add_argument("--width", type=sample.count, default=64, help="of V's hidden layer")
    args = parser.parse_args(argv)
    if args.model not in SHAPES:
        parser.error(f"--model takes {', '.join(SHAPES)}")
    device, dtype = sample.device_of(args), getattr(torch, args.dtype)
    speed = bandwidth(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.model}, {args.dtype}, {where}, {torch.get_num_threads()} threads, {speed / 1e9:.0f} GB/s, "
          f"{args.tokens} tokens, width {args.width}, torch {torch.__version__}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        peaks = [processes.apply(peak, (args, batch)) for batch in args.batches]
    torch.manual_seed(args.seed)
    model = random_model(args.model, device, dtype)
    theirs, control = transformers_model(model), random_control(args.model, args.width, device)
    for batch, share in zip(args.batches, peaks):
        model.pack(batch)
        seconds = measure(make_rows(model, theirs, control, batch, args.tokens), args.rounds, device)
        print(f"\nbatch {batch:3d}, peak {share:.2f}{'ms':>14}{'tok/s':>9}{'cost':>7}{'hf':>7}{'floor':>7}")
        floor = needed(model, batch, PROMPT + args.tokens // 2) / speed
        for label, taken in seconds.items():
            step = statistics.median(taken) / args.tokens
            print(f"{label:22}{1e3 * step:10.2f}{batch / step:9.0f}{ratio(taken, seconds['plain']):7.2f}"
                  f"{ratio(seconds.get('transformers'), taken):7.2f}{floor / step:7.2f}", flush=True)


if __name__ == "__main__":
    sample.run(main)
