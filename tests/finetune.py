"""
Fine-tuning on the same rollouts and the same reward, to set beside the control: DPO on all weights.

    python tests/finetune.py --model path/to/imdb-mini --prompts train.txt --rollouts 6000 --out out/tuned
    python tests/compare.py .. --tuned out/tuned

Two texts of one opening with unlike rewards are a pair (w the better one, l the other). The loss is

    -log sigmoid(beta (log p'(w) / p(w) - log p'(l) / p(l)))          p the model as it was, p' the tuned

Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290). --out is a directory in GPT-2's layout; what the
tuning cost is in the metadata of its weights.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample                                                                         # noqa: E402
from control import log_prob                                                          # noqa: E402
from model import GPT, TRANSPOSED, find                                                # noqa: E402
from train_value import peak_memory                                                   # noqa: E402
from value import load_reward, write_safetensors, write_whole                         # noqa: E402


def make_pairs(rewards, openings):
    """Rewards (N,), the openings taken in turn -> rows (pairs, 2), the better text first; each text once."""
    pairs, orders = [], torch.Generator().manual_seed(0)
    for opening in range(openings):
        rows = torch.arange(opening, len(rewards), openings)
        rows = rows[torch.randperm(len(rows), generator=orders)]
        for a, b in zip(rows[::2].tolist(), rows[1::2].tolist()):
            if rewards[a] != rewards[b]:
                pairs.append((a, b) if rewards[a] > rewards[b] else (b, a))
    return torch.tensor(pairs).view(-1, 2)


def log_likelihood(model, prompts, rollout, rows):
    """Log-probability (B,) of the texts in these rows, nats, with a gradient for the weights."""
    lengths = rollout.mask[rows].sum(1).tolist()
    texts = [torch.tensor(prompts[i % len(prompts)] + rollout.tokens[i, :n].tolist())
             for i, n in zip(rows.tolist(), lengths)]
    hidden = model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(rollout.mask.device))
    drawn_from = torch.cat([states[len(text) - 1 - n:len(text) - 1]
                            for states, text, n in zip(hidden, texts, lengths)])
    logp = log_prob(model.unembed(drawn_from), rollout.tokens[rows][rollout.mask[rows]])
    return torch.stack([part.sum() for part in logp.split(lengths)])


def tune(model, prompts, rollout, pairs, beta, rate, epochs, batch):
    """DPO on all weights, in place, by AdamW at a rate that falls to 0."""
    before = (rollout.logp * rollout.mask).sum(1)              # log p of every text, as it was drawn
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    torch.manual_seed(0)
    batches = [rows for _ in range(epochs) for rows in pairs[torch.randperm(len(pairs))].split(batch)]
    for i, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1 - i / len(batches))
        rows = rows.T.flatten()                                # (2 * B,): the better texts, then the others
        better, worse = (log_likelihood(model, prompts, rollout, rows) - before[rows]).chunk(2)
        loss = -F.logsigmoid(beta * (better - worse)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 10 == 0:
            print(f"batch {i:4d} of {len(batches)}  loss {loss.item():.4f}", flush=True)
    model.requires_grad_(False)


def save(model, name, folder, cost):
    """A directory in GPT-2's layout, the configuration and vocabulary those of the model it came from."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "vocab.json"):
        if source := find(name, file, optional=file == "vocab.json"):
            write_whole(Path(folder) / file, [Path(source).read_bytes()])
    write_safetensors(Path(folder) / "model.safetensors",
                      {key: tensor.T if key.endswith(TRANSPOSED) else tensor
                       for key, tensor in model.state_dict().items()}, {"cost": json.dumps(cost)})


def main(argv=None):
    parser = sample.Parser(__doc__, seed=0)
    add = parser.add_argument
    add("--reward", default="sentiment", help="as in train_value.py")
    add("--rollouts", type=sample.number(int, 16, 2 ** 31), default=4000, help="texts to learn from")
    add("--beta", type=sample.number(float, 1e-6, 1e3), default=0.1, help="of DPO: nats a unit of log-odds")
    add("--rate", type=sample.number(float, 0, 1), default=3e-5, help="peak learning rate")
    add("--epochs", type=sample.count, default=1, help="passes over the pairs")
    add("--pairs", type=sample.count, default=16, help="in a batch")
    add("--out", default="out/tuned", metavar="DIR", help="where the tuned model is written")
    args = parser.parse_args(argv)
    sample.check_writable(Path(args.out) / "model.safetensors")
    started = time.time()
    model, encoder, _, prompts = sample.load(args)
    reward = load_reward(args.reward, args.device)
    rollout, rewards, _ = sample.roll_out(model, encoder, reward, prompts, args.rollouts, args.tokens,
                                          args.seed, batch=args.batch, progress=sample.progress("rollouts"))
    rolled_out = time.time()
    pairs = make_pairs(rewards.cpu(), len(prompts))
    if not len(pairs):
        raise sample.InputError("no two texts of one opening differ in reward; take more --rollouts")
    print(f"{len(pairs)} pairs of {args.rollouts} rollouts, mean reward {rewards.mean():.3f}")
    model = GPT.from_pretrained(args.model, args.device, getattr(torch, args.dtype))       # one to be tuned
    tune(model, prompts, rollout, pairs, args.beta, args.rate, args.epochs, args.pairs)
    cost = {"rollout_seconds": rolled_out - started, "seconds": time.time() - rolled_out,
            "parameters": sum(p.numel() for p in model.parameters()),
            "memory": peak_memory(model.wte.weight.device)}
    save(model, args.model, args.out, cost)
    print(f"{args.out}: {cost['parameters']:,} parameters tuned; rollouts {cost['rollout_seconds']:.0f} s, "
          f"tuning {cost['seconds']:.0f} s, peak memory {cost['memory']:.0f} MiB")


if __name__ == "__main__":
    sample.run(main)
