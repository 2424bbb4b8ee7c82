"""
Every method side by side: reward against KL, on texts that no setting was chosen on.

    python tests/compare.py                                  # the tiny model, beside the exact optimum
    python tests/compare.py --model path/to/imdb-mini --prompts train.txt --test tests/openings.txt

One set of rollouts trains all methods, with the settings of --settings (tests/tune.py). Their step sizes
are those that cost the budgets of --kl on the states of the training rollouts (control.step_for_kl), so
nothing is tuned on the test prompts. The texts of all rows are drawn with the same uniforms: gains are
paired differences. At their own KL, if asked for: value-guided decoding (--candidates), the best of n
(--best-of), a prefix (--prefix), both also on top of the first control of --guide, a fine-tuned model
(--tuned, from tests/finetune.py). --rounds adds policy iteration.

    KL        of the controlled from the uncontrolled distribution, nats a text, and a token
    gain      mean reward less the uncontrolled texts', with its standard error, clustered by opening
    >0        share of the texts with a reward above 0
    ppl       perplexity of the texts under the uncontrolled model, prompts not counted
    div       mean product, n = 2..4, of a text's distinct n-grams over all its n-grams
    distinct  distinct n-grams over all n-grams of all texts
    tok/s     tokens kept a second, reading the prompts included, scoring not
    fwd       forward passes of the model for each token kept
    share     gain over the largest gain any method could have at the same KL (tests/exact.py): exact on the
              tiny model, from --optimum uncontrolled texts an opening elsewhere; +- is the gain's
    check     mean of the --check reward, which nothing was trained on
    R^2       of V against the exact value, over the states of grammatical texts not trained on (tiny model)
"""
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import sample                                                                         # noqa: E402
from control import Controller, Guided, Rollout, dial_for, step_for_kl, teacher_force           # noqa: E402
from exact import Exact, Tilted                                                       # noqa: E402
from model import GPT, read_header, read_json                                         # noqa: E402
from train_value import METHODS, ball, improve, peak_memory, train            # noqa: E402
from value import fingerprint, load_reward                                            # noqa: E402


def parse_args(argv):
    parser = sample.Parser(__doc__, seed=0)
    add = parser.add_argument
    add("--test", metavar="FILE", help="prompts to report on (default: those of the rollouts, other draws)")
    add("--reward", default="sentiment", help="as in train_value.py")
    add("--rollouts", default="4000", help="texts to learn from, a round; several numbers: a table for each")
    add("--keep", metavar="FILE", help="where these texts are kept, for further runs and other rewards")
    add("--samples", type=sample.number(int, 2, 2 ** 31), default=4000, help="texts a test prompt and row")
    add("--kl", default="0.1,0.3,0.8,2", help="budgets aimed at, nats a text")
    add("--radius", type=sample.number(float, 0, math.inf), default=Controller.radius,
        help="of the ball; raw states have none")
    add("--steps", type=sample.count, default=1, help="of gradient ascent a token, each as the table says")
    add("--settings", metavar="FILE", help="of training, from tests/tune.py (default: train_value.py's)")
    add("--check", metavar="NAME", help="another reward to print beside, which nothing is trained on")
    add("--methods", default=",".join(METHODS), help="which of " + ", ".join(METHODS))
    add("--rounds", type=sample.count, default=1,
        help="of policy iteration, for methods that learn from draws")
    add("--candidates", type=sample.number(int, 0, 2 ** 20), default=0, help="of guided decoding; 0: none")
    add("--best-of", default="",
        help="numbers n: the best of n by the reward, and by V before the last token")
    add("--prefix", default="", metavar="TEXT", help="of prompting: comes before each prompt")
    add("--tuned", metavar="DIR", help="a fine-tuned model, from tests/finetune.py")
    add("--guide", choices=METHODS, default="q",
        help="whose V, of the last rollouts, guides, judges and is combined")
    add("--optimum", type=sample.count, help="uncontrolled texts an opening to estimate the best gain from")
    add("--test-seed", type=sample.number(int, 0, 2 ** 62), default=1000, help="of the draws reported on")
    add("--json", metavar="FILE", help="write every text and figure there")
    args = parser.parse_args(argv)
    args.sizes = [int(n) for n in args.rollouts.split(",") if n.isdecimal() and 16 <= int(n) < 2 ** 31]
    if len(args.sizes) < len(args.rollouts.split(",")):
        raise sample.InputError("--rollouts takes numbers from 16 on, commas between")
    return args


def set_up(args):
    """-> model, encoder, the prompts of the rollouts, (prompts, their texts) to report on"""
    model, encoder, asked, prompts = sample.load(args)
    tests = prompts
    if args.test:
        asked, tests = sample.encode_prompts(model, encoder, sample.read_prompts(args.test), args.tokens)
    return model, encoder, prompts, (tests, asked)


def learn_from(args, table, model, encoder, prompts):
    """The most rollouts asked for -> (Rollout, rewards): drawn, or those of --keep, scored by --reward."""
    size, asked = max(args.sizes), {"model": fingerprint(model), "prompts": prompts, "seed": args.seed,
                                    "tokens": args.tokens}
    if not args.keep or not Path(args.keep).is_file():
        if args.keep:
            sample.check_writable(args.keep)
        rollout, rewards, _ = table.roll_out(prompts, size, args.seed, record=True, earned=True,
                                             progress=sample.progress("rollouts"))
        if args.keep:
            torch.save((asked, vars(rollout)), f"{args.keep}.part")
            os.replace(f"{args.keep}.part", args.keep)
        return rollout, rewards
    try:
        kept, columns = torch.load(args.keep, args.device, mmap=True, weights_only=True)
    except Exception:               # of a foreign file torch.load may raise anything
        kept, columns = None, None
    if kept != asked or len(columns["mask"]) < size:
        raise sample.InputError(f"{args.keep}: other rollouts than those asked for; choose another --keep")
    rollout, prompts = Rollout(**columns).pick(slice(size)), sample.in_turn(prompts, size)
    rewards = table.reward(sample.decode(encoder, prompts, rollout, model.config.eos_token_id))
    rollout.earned = sample.score_beginnings(encoder, table.reward, prompts, rollout)
    return rollout, torch.tensor(rewards, device=rollout.mask.device)


class Table:
    """The rows: texts of the same prompts and draws, by every method, and what they earned and cost."""

    def __init__(self, args, model, encoder, prompts, asked):
        self.args, self.model, self.encoder, self.prompts, self.asked = args, model, encoder, prompts, asked
        self.reward = load_reward(args.reward, args.device)
        self.check = args.check and load_reward(args.check, args.device)
        toy = (Path(args.model) / "grammar.py").is_file()
        self.clusters = None if toy else sample.in_turn(range(len(prompts)), args.samples * len(prompts))
        self.results, self.figures, self.frontier = {}, {}, None
        print(f"{len(prompts)} openings x {args.samples} samples a row, {args.rollouts} rollouts of "
              f"{args.tokens} tokens, seeds {args.seed} and {args.test_seed}\n\n"
              f"{'method':30}{'step':>8}{'KL':>7}{'a token':>8}{'reward':>8}  {'gain':16}{'>0':>5}{'ppl':>8}"
              f"{'div':>6}  {'distinct-1/2/3':17}{'tok/s':>7}{'fwd':>5}"
              f"{'  check' if args.check else ''}{'  share' if toy or args.optimum else ''}")
        base, earned = self.row("uncontrolled", record=toy)
        if toy:
            self.frontier = Exact(model, encoder, prompts, base, args.tokens)
        elif args.optimum:
            _, scores, _ = self.roll_out(prompts, args.optimum * len(prompts), args.test_seed + 1)
            self.frontier = Tilted(scores, sample.in_turn(range(len(prompts)), len(scores)))
        self.exact = self.frontier if toy else None

    def roll_out(self, prompts, samples, seed, gpt=None, **how):
        return sample.roll_out(gpt or self.model, self.encoder, self.reward, prompts, samples,
                               self.args.tokens, seed, batch=self.args.batch, **how)

    def row(self, label, step=math.nan, forwards=1, gpt=None, note="", **how):
        """Draw a row's texts, print and keep its figures -> (Rollout, rewards)."""
        clock = [time.perf_counter()]
        drawn, scores, texts = self.roll_out(self.prompts, self.args.samples * len(self.prompts),
                                             self.args.test_seed, gpt,
                                             progress=lambda *_: clock.append(time.perf_counter()), **how)
        if gpt:                                                # another model: its KL by teacher forcing
            drawn.logp = teacher_force(self.model, sample.in_turn(self.prompts, len(scores)), drawn)
            drawn.kl = torch.where(drawn.mask, drawn.logq - drawn.logp, 0.0)
        f = sample.figures(drawn, scores, self.clusters)
        self.results[label], self.figures[label] = (drawn, scores, texts), f
        gain, error = sample.mean_error(scores - self.results["uncontrolled"][1], self.clusters)
        f |= {"step": step, "gain": gain, "gain_error": error, "forwards": forwards * how.get("best_of", 1),
              "tokens_per_second": drawn.mask.sum().item() / (clock[-1] - clock[0])}
        cells = f"{gain:+.3f} +- {error:.3f}" if len(self.results) > 1 else ""
        tail = ""
        if self.check:
            f["check"] = sum(self.check(texts)) / len(texts)
            tail += f"{f['check']:7.3f}"
        if self.frontier:
            f["share"], f["share_error"] = (x / self.frontier.best(f["kl_text"]) for x in (gain, error))
            tail += f"  {f['share']:.3f} +- {f['share_error']:.3f}"
        print(f"{label:30}{step:8.2f}{f['kl_text']:7.3f}{f['kl_token']:8.4f}{f['reward']:8.3f}  {cells:16}"
              f"{f['positive']:5.2f}{f['perplexity']:8.2f}{f['diversity']:6.3f}  "
              + f"{'/'.join(f'''{f[f'distinct_{n}']:.3f}''' for n in (1, 2, 3)):17}"
              + f"{f['tokens_per_second']:7.0f}{f['forwards']:5d}{tail}{note}", flush=True)
        return drawn, scores

    def show_texts(self, label, few=2):
        """The best and the worst texts, and the oddest of those the reward likes best: is it gamed?"""
        drawn, scores, texts = self.results[label]
        surprise = -(drawn.logp * drawn.mask).sum(1) / drawn.mask.sum(1)           # nats a token
        top = scores >= scores.topk(max(len(scores) // 20, 1)).values[-1]
        odd = torch.where(top, surprise, -torch.inf)
        for name, rows in (("best", scores.topk(few)[1]), ("worst", scores.topk(few, largest=False)[1]),
                           ("least likely of the best twentieth", odd.topk(few)[1])):
            print(f"\n{label}, {name}:")
            for i in rows.tolist():
                print(f"  {scores[i]:+.2f}  {' '.join(texts[i].split())}")


def main(argv=None):
    args = parse_args(argv)
    methods, budgets = args.methods.split(","), args.kl.split(",")
    if set(methods) - METHODS.keys() or not all(re.fullmatch(r"\d*\.?\d+", nats) for nats in budgets):
        raise sample.InputError("--methods takes " + ",".join(METHODS) + " and --kl numbers, commas between")
    if (args.candidates or args.best_of) and args.guide not in methods:
        raise sample.InputError(f"--guide {args.guide}: name it among the --methods")
    if args.json:
        sample.check_writable(args.json)
    settings = {**METHODS, **(read_json(args.settings) if args.settings else {})}
    model, encoder, prompts, tests = set_up(args)
    tuned = GPT.from_pretrained(args.tuned, args.device).pack() if args.tuned else None
    table, started = Table(args, model, encoder, *tests), time.perf_counter()
    everything, all_rewards = learn_from(args, table, model, encoder, prompts)
    costs, fits, guide = {"rollouts": (time.perf_counter() - started, 0)}, [], None
    for size in args.sizes:
        note = f", {size} rollouts" * (len(args.sizes) > 1)
        first, rewards = everything.pick(slice(size)), all_rewards[:size]
        for method in methods:
            started = time.perf_counter()
            value = train(model, first, rewards, **settings[method], seed=args.seed)
            costs[method + note] = time.perf_counter() - started, sum(p.numel() for p in value.parameters())
            fits += [f"{method}{note} {table.exact.r_squared(value, table.results['uncontrolled'][0]):.4f}"
                     ] if table.exact else []
            controls = curve(args, table, prompts, method, value, first, settings[method], note)
            guide = controls[0] if method == args.guide else guide
        show_equal_kl(table.figures, methods, budgets, note)
    own_kl(args, table, prompts, guide, list(map(float, budgets)))
    if tuned:
        table.row("tuned", gpt=tuned)
        cost = json.loads(read_header(Path(args.tuned) / "model.safetensors")[1]["cost"])
        costs["tuned"] = cost["seconds"], cost["parameters"]
    print(f"\n{'preparation':24}   seconds  parameters")
    for label, (seconds, parameters) in costs.items():
        print(f"{label:24}{seconds:10.1f}{parameters:12,}")
    print(f"peak memory {peak_memory(model.wte.weight.device):.0f} MiB"
          + (f"; of the tuning {cost['memory']:.0f} MiB" if tuned else ""))
    if table.exact:
        print("\nR^2 of V against the exact value:  " + "   ".join(fits))
    table.show_texts(f"{methods[0]} {float(budgets[len(budgets) // 2]):g}{note}")
    if args.json:
        sample.write_json(args.json, {**vars(args), "preparation": costs},
                          sample.in_turn(table.asked, args.samples * len(table.asked)),
                          table.results, table.figures)


def curve(args, table, prompts, method, value, first, settings, note):
    """A row for each budget, and one more after --rounds -> the Controllers of the first rounds."""
    controls = []
    for nats in map(float, args.kl.split(",")):
        control = Controller(value, args.steps, radius=ball(settings, args.radius))
        control.step_size = step_for_kl(table.model, control, first, nats)
        table.row(f"{method} {nats:g}{note}", control.step_size, control=control)
        controls.append(control)
        if args.rounds > 1 and "draws" in settings:
            for i in range(1, args.rounds):
                texts = table.roll_out(prompts, len(first.mask), args.seed + 10_000 * i, record=True,
                                       earned=True, control=control)
                control = improve(table.model, control, *texts[:2], first, nats, settings, args.radius,
                                  args.seed)
            table.row(f"{method} {nats:g}, {args.rounds} rounds{note}", control.step_size, control=control)
    return controls


def show_equal_kl(figures, methods, budgets, note=""):
    """
    Gains at the very KL of the budgets, and over them the first method's gain.

    Between a method's rows, and on beyond them, its gain is taken to be linear in the root of the KL, as
    every gain is for small controls.
    """
    print(f"\n{'gain at equal KL' + note:30}" + "".join(f"{nats + ' nats':>22}" for nats in budgets))
    ours = {}
    for method in methods:
        drawn = [figures[f"{method} {float(nats):g}{note}"] for nats in budgets]
        rows = sorted((f["kl_text"] ** 0.5, f["gain"]) for f in drawn)
        cells = []
        for nats in budgets:
            root, points = float(nats) ** 0.5, [(0.0, 0.0), *rows]
            i = min(max(sum(at < root for at, _ in points), 1), len(points) - 1)
            (left, low), (right, high) = points[i - 1], points[i]
            gain = low + (high - low) * (root - left) / (right - left)
            ratio = ours.setdefault(nats, gain) / gain
            cells.append(f"{gain:12.3f}" + (f"  ({ratio:4.2f}x)  " if method != methods[0] else " " * 10))
        print(f"{method:30}" + "".join(f"{cell:>22}" for cell in cells))
    print(flush=True)


def own_kl(args, table, prompts, guide, budgets):
    """The rows whose KL is not a dial, or not the control's: alone, and on top of the control `guide`."""
    if args.candidates:
        witness = Witness(guide.value, candidates=args.candidates)
        pilot, *_ = table.roll_out(prompts, min(args.batch, 256), args.seed, control=witness)
        for nats in budgets:
            guided = Guided(guide.value, witness.step_for_kl(pilot.mask, nats), args.candidates)
            table.row(f"guided {nats:g}", guided.step_size, 1 + args.candidates, control=guided)
    name = f"{args.guide} {budgets[0]:g}"
    prefix = sample.encode(table.encoder, args.prefix)
    if prefix:
        table.row("prefix", prefix=prefix)
        if guide:
            table.row(f"{name} + prefix", guide.step_size, prefix=prefix, control=guide)
    for n in [int(n) for n in args.best_of.split(",") if n]:
        for by, short in (("reward", "reward"), ("value", "V")):
            table.row(f"best {n} {short}", best_of=n, by=by, control=replace(guide, step_size=0.0))
        table.row(f"{name} + best {n} V", guide.step_size, best_of=n, by="value", control=guide)


class Witness(Guided):
    """Looks ahead without re-weighting, and remembers: from what it saw follows the KL at any step size."""
    eager = True                                               # Python at every step: no CUDA graph

    def __call__(self, model, cache, hidden, logits):
        best, _, gains = self.look_ahead(model, cache, hidden, logits)
        log_p = best - logits.logsumexp(-1, keepdim=True)
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
        self.seen = getattr(self, "seen", []) + [(torch.cat([log_p, rest], -1), F.pad(gains, (0, 1)))]
        return torch.zeros_like(logits)

    def step_for_kl(self, mask, nats):
        log_p, gains = (torch.stack(column, 1)[mask[:, :len(self.seen)]] for column in zip(*self.seen))

        def cost(step_size):
            log_q = (log_p + step_size * gains).log_softmax(-1)
            return (log_q.exp() * (log_q - log_p)).sum().item() / len(mask)
        return dial_for(cost, nats)


if __name__ == "__main__":
    sample.run(main)
