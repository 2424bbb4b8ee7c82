"""
Every method side by side: reward against KL, on texts that no setting was chosen on.

    python tests/compare.py                                  # the tiny model, beside the exact optimum
    python tests/compare.py --model path/to/imdb-mini --prompts train.txt --test tests/openings.txt

One set of rollouts trains all methods, with the settings of --settings (tests/tune.py). Their step sizes
are those that cost the budgets of --kl on the states of the training rollouts (control.step_for_kl), so
nothing is tuned on the test prompts. --candidates K adds value-guided decoding and --best-of N the best
of N texts, at their own KL. The texts of all rows are drawn with the same uniforms: gains are paired
differences.

    gain      mean reward less the uncontrolled texts', with its standard error, clustered by opening
    KL        of the controlled from the uncontrolled distribution, summed over a text, nats
    ppl       perplexity of the continuations under the uncontrolled model
    share     gain over that of the exact KL-optimal controller at the same KL (the tiny model only), exact
              for the chain of grammar states with the model's own averaged probabilities; +- is the gain's
    R^2       of V against the exact value, over the states of grammatical texts not trained on (the same)
"""
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import sample                                                                         # noqa: E402
from control import Controller, Guided, Rollout, bisect, step_for_kl                 # noqa: E402
from exact import Exact                                                               # noqa: E402
from model import read_json                                                           # noqa: E402
from train_value import METHODS, roll_out, train                                      # noqa: E402
from value import load_reward                                                         # noqa: E402


def parse_args(argv):
    parser = sample.Parser(__doc__, seed=0)
    add = parser.add_argument
    add("--test", metavar="FILE", help="prompts to report on (default: those of the rollouts, other draws)")
    add("--reward", default="sentiment", help="as in train_value.py")
    add("--rollouts", type=sample.number(int, 16, 2 ** 31), default=4000, help="texts to learn from")
    add("--samples", type=sample.number(int, 2, 2 ** 31), default=4000, help="texts a test prompt and row")
    add("--kl", default="0.1,0.3,0.8,2", help="budgets aimed at, nats a text")
    add("--radius", type=sample.number(float, 0, math.inf), default=2.0, help="of the ball; paper has none")
    add("--settings", metavar="FILE", help="of training, from tests/tune.py (default: train_value.py's)")
    add("--check", metavar="NAME", help="another reward to print beside, which nothing is trained on")
    add("--methods", default=",".join(METHODS), help="which of " + ", ".join(METHODS))
    add("--candidates", type=sample.number(int, 0, 2 ** 20), default=0, help="of guided decoding; 0: none")
    add("--best-of", default="", help="numbers n: the best of n by the reward, and by V before the last token")
    add("--guide", choices=METHODS, default="q", help="whose V guides and judges")
    add("--test-seed", type=sample.number(int, 0, 2 ** 62), default=1000, help="of the draws reported on")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    methods, budgets = args.methods.split(","), args.kl.split(",")
    if set(methods) - METHODS.keys() or not all(re.fullmatch(r"\d*\.?\d+", nats) for nats in budgets):
        raise sample.InputError("--methods takes " + ",".join(METHODS) + " and --kl numbers, commas between")
    settings = {**METHODS, **(read_json(args.settings) if args.settings else {})}
    model, encoder, _, prompts = sample.load(args)
    reward = load_reward(args.reward, args.device)
    check = load_reward(args.check, args.device) if args.check else None
    tests = prompts
    if args.test:
        _, tests = sample.encode_prompts(model, encoder, sample.read_prompts(args.test), args.tokens)
    rollout, rewards, _ = roll_out(model, encoder, reward, prompts, args.rollouts, args.tokens, args.seed,
                                   record=True, progress=sample.progress("rollouts"), batch=args.batch)
    toy = (Path(args.model) / "grammar.py").is_file()

    def rows(label, control=None, record=False):
        drawn, scores, texts = roll_out(model, encoder, reward, tests, args.samples * len(tests), args.tokens,
                                    args.test_seed, control=control, record=record,
                                    progress=sample.progress(label), batch=args.batch)
        checked = f"  {sum(check(texts)) / len(texts):7.3f}" if check else ""
        return drawn, scores, checked

    base, earned, checked = rows("uncontrolled", record=toy)
    clusters = None if toy else [i % len(tests) for i in range(len(earned))]
    exact = Exact(model, encoder, tests, base, args.tokens) if toy else None
    print(f"{len(tests)} openings x {args.samples} samples a row, {args.rollouts} rollouts of {args.tokens} "
          f"tokens, seeds {args.seed} and {args.test_seed}\n")
    print("method         step     KL  reward  gain" + " " * 16 + "ppl  distinct-1/2/3   "
          + "  check" * bool(check) + "share" * toy)
    print(line("uncontrolled", math.nan, sample.figures(base, earned, clusters), None) + checked, flush=True)

    def report(label, step, drawn, scores, checked, kl=None):
        found = sample.figures(drawn, scores, clusters)
        found["kl_text"] = found["kl_text"] if kl is None else kl
        gained = sample.mean_error(scores - earned, clusters)
        print(line(label, step, found, gained) + checked
              + (exact.share(found["kl_text"], *gained) if toy else ""), flush=True)

    fits = []
    for method in methods:
        value = train(rollout, rewards, **settings[method], seed=args.seed)
        if method == args.guide:
            guide = value
        fits.append(f"{method} {exact.r_squared(value, base):.4f}" if toy else "")
        for nats in map(float, budgets):
            ball = args.radius if settings[method].get("standardised") else math.inf
            control = Controller(value, radius=ball)
            step = control.step_size = step_for_kl(model, control, rollout, nats)
            report(method, step, *rows(f"{method} {nats}", control))
    if args.candidates:
        witness = Witness(guide, candidates=args.candidates)
        pilot, *_ = roll_out(model, encoder, reward, prompts, args.batch, args.tokens, args.seed,
                             batch=args.batch, control=witness)
        for nats in map(float, budgets):
            guided = Guided(guide, witness.step_for_kl(pilot.mask, nats), args.candidates)
            report("guided", guided.step_size, *rows(f"guided {nats}", guided))
    for n in [int(n) for n in args.best_of.split(",") if n]:
        many = args.samples * n * len(tests)
        drawn, scores, texts = roll_out(model, encoder, reward, tests, many, args.tokens, args.test_seed,
                                        record=True, progress=sample.progress(f"best of {n}"), batch=args.batch)
        last = guide(drawn.hidden[torch.arange(many), drawn.mask.sum(1) - 1])      # V before the last token
        for label, judged in (("reward", scores), ("V", last)):
            best = judged.view(n, -1).argmax(0) * (many // n) + torch.arange(many // n)
            chosen = Rollout(*(field[best] for field in vars(drawn).values()))
            checked = f"  {sum(check([texts[i] for i in best])) / len(best):7.3f}" if check else ""
            report(f"best {n} {label}", math.nan, chosen, scores[best], checked, best_of_kl(judged, n))
    if toy:
        print("\nR^2 of V against the exact value:  " + "   ".join(fits))


def best_of_kl(scores, n):
    """
    KL of the best of n from one, nats a text: sum over the levels c of P_n(c) log(P_n(c) / P(c)).

    P(c) is a level's share of the scores; without ties this is log n - (n - 1) / n.
    """
    levels, counts = scores.unique(return_counts=True)
    if len(levels) > len(scores) / 2:                          # no ties to speak of
        return math.log(n) - (n - 1) / n
    below = F.pad(counts.double().cumsum(0) / len(scores), (1, 0))                 # P(score <= c), 0 first
    p, p_n = below.diff(), (below ** n).diff()
    return (p_n * (p_n / p).log()).sum().item()


class Witness(Guided):
    """Looks ahead without re-weighting, and remembers: from what it saw follows the KL at any step size."""
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
        return bisect(cost, nats)


def line(label, step, f, gained):
    shown = f"{gained[0]:+.3f} +- {gained[1]:.3f}" if gained else ""
    return (f"{label:13}{step:6.2f}{f['kl_text']:7.3f}{f['reward']:8.3f}  {shown:18}{f['perplexity']:6.2f}  "
            + "/".join(f"{f[f'distinct_{n}']:.3f}" for n in (1, 2, 3)))


if __name__ == "__main__":
    sample.run(main)
