"""
What the control costs and how fast the sampler is: ratios, all rows in one process and in turn.

    python tests/bench.py                                    # gpt2's shape on this CPU, about ten minutes
    python tests/bench.py --dtype bfloat16 --batches 1,32,256                    # on a GPU
    OMP_NUM_THREADS=1 python tests/bench.py                  # on a CPU that others use too

Weights are random, nothing is downloaded, no text ends. Every round draws one batch of texts by every
row; the table has the medians of the rounds, ratios taken within a round. All is warm: buffers, graphs.

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
    """A GPT of that shape with weights as before training; the end of text is no token."""
    layers, n_embd, heads = SHAPES[name]
    with torch.device("meta"):
        model = GPT(Config(50257, 1024, n_embd, layers, heads, 4 * n_embd, 1e-5, 50256, eos_token_id=-1))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        norm = "ln_" in name and name.endswith("weight")
        weight.normal_(0, 0.02) if weight.dim() == 2 else weight.fill_(float(norm))
    return model


def transformers_model(model):
    """The same weights as a GPT2LMHeadModel; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c, weight = model.config, model.wte.weight
    config = GPT2Config(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, eos_token_id=None)
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


def size(model):
    return sum(weight.nbytes for weight in model.parameters())


def sampler_run(model, batch, n_tokens, **how):
    """-> a sampler for that batch, and a function by which it draws one."""
    sampler = Sampler(model, batch, PROMPT + n_tokens, n_tokens, Decoding(), **how)
    return sampler, lambda: sampler.run([[1] * PROMPT] * batch, uniform_table(batch, n_tokens, 0))


def peak(model, value, batch, n_tokens, bare):
    """What `control` holds at most, over weights + cache; `bare` bytes were held without a model."""
    forget_peak(model.wte.weight.device)
    sampler, draw = sampler_run(model, batch, n_tokens, control=Controller(value), report=False)
    draw()
    return (memory(model.wte.weight.device) - bare) / (size(model) + 2 * sampler.cache.keys.nbytes)


def make_rows(model, theirs, value, batch, n_tokens):
    """{label: a function that draws the batch}"""
    def run(**how):
        return sampler_run(model, batch, n_tokens, **how)[1]

    slow, paper = sampler_run(model, batch, n_tokens, control=Paper(value), report=False)
    slow.graphs = None                                         # autograd from Python at every step
    rows = {"plain": run(report=False), "control": run(control=Controller(value), report=False),
            "30 steps": run(control=Controller(value, steps=30), report=False),
            "KL reported": run(control=Controller(value)),
            "kl_ball": run(control=Controller(value, max_kl=0.01)), "paper": paper}
    if theirs is not None:
        ids = torch.ones(batch, PROMPT, dtype=torch.long, device=model.wte.weight.device)
        rows["transformers"] = lambda: theirs.generate(
            ids, attention_mask=ids, max_new_tokens=n_tokens, do_sample=True, top_k=0, pad_token_id=0)
    return rows


def measure(rows, rounds, device):
    """-> {label: seconds of every round}, the first round of which is left out."""
    seconds = {label: [] for label in rows}
    for _ in range(rounds + 1):
        for label, draw in rows.items():
            started = clock(device)
            draw()
            seconds[label].append(clock(device) - started)
    return {label: taken[1:] for label, taken in seconds.items()}


def ratio(above, below):
    """Median over the rounds of above / below; NaN where `above` was not measured."""
    return statistics.median(a / b for a, b in zip(above, below)) if above else float("nan")


@torch.no_grad()
def main(argv=None):
    parser = sample.Parser(__doc__, seed=0)
    parser.set_defaults(model="gpt2", tokens=64)
    add = parser.add_argument
    add("--batches", default="1,32", help="texts side by side, commas between")
    add("--rounds", type=sample.count, default=5, help="of which the medians are printed")
    add("--width", type=sample.count, default=64, help="of V's hidden layer")
    args = parser.parse_args(argv)
    if args.model not in SHAPES:
        parser.error(f"--model takes {', '.join(SHAPES)}")
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    speed, dtype = bandwidth(device), getattr(torch, args.dtype)
    peak(random_model("tiny", device, dtype), ValueNet(64, 8).to(device), 1, 2, 0)     # loads libraries
    bare = memory(device, "VmRSS")
    model = random_model(args.model, device, dtype)
    value = ValueNet(model.config.n_embd, args.width, lift=True).to(device).requires_grad_(False)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}, {args.dtype}, {where}, {speed / 1e9:.0f} GB/s, {args.tokens} tokens, width "
          f"{args.width}, torch {torch.__version__}")
    batches = [int(batch) for batch in args.batches.split(",")]
    peaks = [peak(model, value, batch, args.tokens, bare) for batch in batches]
    theirs = transformers_model(model)                         # its memory is not ours
    if theirs is None:
        print("transformers is not installed: its row and the column hf are missing")
    for batch, share in zip(batches, peaks):
        seconds = measure(make_rows(model, theirs, value, batch, args.tokens), args.rounds, device)
        print(f"\nbatch {batch:3d}, peak {share:.2f}{'ms':>14}{'tok/s':>9}{'cost':>7}{'hf':>7}{'floor':>7}")
        c, half = model.config, PROMPT + args.tokens // 2
        floor = (size(model) + 2 * c.n_layer * batch * half * c.n_embd * model.wte.weight.itemsize) / speed
        for label, taken in seconds.items():
            step = statistics.median(taken) / args.tokens
            print(f"{label:22}{1e3 * step:10.2f}{batch / step:9.0f}{ratio(taken, seconds['plain']):7.2f}"
                  f"{ratio(seconds.get('transformers'), taken):7.2f}{floor / step:7.2f}", flush=True)


if __name__ == "__main__":
    sample.run(main)
