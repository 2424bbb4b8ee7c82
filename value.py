"""
V(h): the expected reward of the finished text, read off the hidden state; vocabularies and rewards.

    V(h_t) = E[V(h_{t+1})]          the Bellman equation of the uncontrolled system
    reward(text)                    stands in for V(h_{t+1}) where the text ends or is cut, both alike

Source: Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control
Perspective" (arXiv 2406.05954), its value function.

    hidden  h_t, the state from which token y_t is drawn                     (B, T, n_embd)
    values  V(h_t)                                                            (B, T)
    mask    True where t < L, the text's own length in tokens                 (B, T)
    psi     W[y_t] - E_p[W], p the distribution y_t was drawn from; E[psi]=0  (B, T, n_embd)
    lift    A(h_t), a second net: its slope along psi is the worth of y_t     (B, T)
    earned  reward of the text before y_t, known while learning               (B, T)
    x       (h - mean) / std; then u = std * u_x, dA/dx = std * dA/dh and psi_x = std * psi

The half of the equation the paper leaves out. Control acts only on the draw, p_u(y) ~ exp(w_y.(h+u)),
so all it can change is which token comes next. Values alone leave dV/dh free in every direction the
data does not span, and ascent goes exactly there. So what is climbed is trained on the draws, as A in

    Q(h, y) = V(h) + dA/dx . psi_x

the value of drawing y: one Bellman equation for states and tokens, Q(h_t, y_t) = V(h_{t+1}), which
averaged over y_t is the one above, as E[psi] = 0. Its KL-optimal policy, p(y) exp(Q(h, y) / beta), is
exactly softmax(W (h + u)) with u_x = dA/dx / beta: one gradient step. A is a net like V, its `lift`. The
value of a controlled state is E[Q] under its draw; the paper has A = V and reads V(h + u), as if control
led to the state h + u, but no text leads there. One net for both depends on how its two losses are weighed
(tests/ablate.py); two need no weight.

A learns from the advantage of each draw, how much higher the forecast of the reward stands after it. V
reads one state, which hardly holds what the text has said so far; while learning, the text is at hand,
so the forecast is made from V(h_t) and the reward of the text up to there (`advantages`).

Deviations from the paper: TD(lambda) instead of one step; A beside V, fitted to the draws, where these are
white (`whitening`); standardised states. `train_value.py --method paper` switches all off, and the ball;
what stays even so: a small tanh net with weight decay, targets without gradient, one step of control.
But: V reads one state, not the text; what the state does not hold, V cannot know.
"""
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn

from model import (DTYPES, GPT, PUBLIC, InputError, find, read_config, read_header, read_json,
                   read_safetensors)


class ValueNet(nn.Module):
    """V(h) = w2 . phi(W1 x + b1) + b2, x = (h - mean) / std, phi = tanh. Always float32."""

    def __init__(self, n_embd, width, lift=0):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(width, n_embd) / math.sqrt(n_embd))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.randn(width) / width)
        self.b2 = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(n_embd))      # of the training states
        self.register_buffer("std", torch.ones(n_embd))
        self.lift = ValueNet(n_embd, lift) if lift else None   # A, so wide; without one V itself is climbed
        self.info = {}                                         # what it was trained on, saved along

    @property
    def climbed(self):
        """The net whose gradient the control follows."""
        return self.lift or self

    def preactivation(self, hidden):
        """hidden (..., n_embd) -> z = W1 x + b1 (..., width)"""
        return (hidden.float() - self.mean) / self.std @ self.w1.T + self.b1

    def slope(self, z):
        """z (..., width) -> dV/dz = w2 * phi'(z) (..., width)"""
        return self.w2 * (1 - z.tanh() ** 2)

    def read(self, z):
        """z (..., width) -> V (...)"""
        return z.tanh() @ self.w2 + self.b2

    def forward(self, hidden):
        """hidden (..., n_embd) -> V (...)"""
        return self.read(self.preactivation(hidden))

    def gradient(self, hidden):
        """hidden (..., n_embd) -> dV/dx = std * dV/dh (..., n_embd), in closed form."""
        return self.slope(self.preactivation(hidden)) @ self.w1

    def worth(self, hidden, psi):
        """hidden, psi (..., n_embd) -> Q(h, y) - V(h) = dA/dx . psi_x (...), the worth of drawing y."""
        climbed = self.climbed
        slope = climbed.slope(climbed.preactivation(hidden))
        return (slope * ((climbed.std * psi) @ climbed.w1.T)).sum(-1)

    def standardise(self, batches):
        """Take x from the mean and the standard deviation of states, batches of (n, n_embd)."""
        mean, std = moments(batches)
        for net in (self, self.climbed):
            net.mean.copy_(mean)
            net.std.copy_(std.clamp(min=1e-6))

    def beside(self, width):
        """A fresh net in the coordinates of this one."""
        net = ValueNet(self.w1.size(1), width).to(self.w1.device)
        net.mean.copy_(self.mean)
        net.std.copy_(self.std)
        return net

    @classmethod
    def sum(cls, values, weights):
        """One net whose V is the weighted sum of the nets' V, in the coordinates of the first."""
        first = values[0]
        total = cls(first.w1.size(1), sum(len(value.w2) for value in values)).to(first.w1.device)
        total.mean, total.std = first.mean, first.std
        total.w1.data = torch.cat([value.w1 * first.std / value.std for value in values])
        total.b1.data = torch.cat([value.b1 + value.w1 @ ((first.mean - value.mean) / value.std)
                                   for value in values])
        total.w2.data = torch.cat([value.w2 * weight for value, weight in zip(values, weights)])
        total.b2.data = sum(value.b2 * weight for value, weight in zip(values, weights))
        if any(value.lift for value in values):
            total.lift = cls.sum([value.climbed for value in values], weights)
        return total.requires_grad_(False)

    def save(self, path, **info):
        """Write a .safetensors that carries its configuration; whole or not at all."""
        info = {"n_embd": self.w1.size(1), "width": len(self.w2),
                "lift": len(self.lift.w2) if self.lift else 0, **self.info, **info}
        metadata = {"nanocontrol": json.dumps(info)}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, self.state_dict(), metadata)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None

    @classmethod
    def load(cls, path, model):
        """The net saved at `path`, refused unless it was trained on the states of `model`."""
        try:
            info = json.loads(read_header(path)[1]["nanocontrol"])
            value = cls(info["n_embd"], info["width"], info["lift"])
            value.load_state_dict(dict(read_safetensors(path)))
            if not all(tensor.isfinite().all() for tensor in value.state_dict().values()):
                raise ValueError("not finite")
        except FileNotFoundError:
            raise InputError(f"{path}: no such value net; train one with train_value.py") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); choose another --value") from None
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a value net of this project; train one with "
                             f"train_value.py") from None
        if info["n_embd"] != model.config.n_embd:
            raise InputError(f"{path}: a value net for states of {info['n_embd']} numbers, and this model's "
                             f"have {model.config.n_embd}; train one with train_value.py --model ..")
        if info.get("fingerprint") != fingerprint(model):
            raise InputError(f"{path}: the value net of another model ({info.get('model')}); "
                             f"train one with train_value.py --model ..")
        value.info = info
        return value.to(model.wte.weight.device).requires_grad_(False)


@torch.no_grad()
def bellman_targets(values, rewards, mask, lam, costs=None):
    """
    TD(lambda) targets (B, T) for values, mask, costs (B, T) and rewards (B,); no gradient flows through.

        target_{L-1} = reward          target_t = (1 - lam) V(h_{t+1}) + lam target_{t+1}

    A cost, such as beta * KL of the control at h_t, is paid on reaching h_t: for V(h_{t-1}), not for V(h_t).

    With rewards [1.], values [[.1, .2, .4]] and all three states real:
        lam 0    [[.2, .4, 1.]]     the Bellman equation, one step
        lam 0.5  [[.45, .7, 1.]]
        lam 1    [[1., 1., 1.]]     Monte Carlo
    """
    targets, costs = torch.zeros_like(values), torch.zeros_like(values) if costs is None else costs
    next_value = next_target = rewards                         # beyond the last state: the reward
    for t in reversed(range(values.size(1))):
        target = (1 - lam) * next_value + lam * next_target
        next_target = torch.where(mask[:, t], target - costs[:, t], rewards)
        next_value = torch.where(mask[:, t], values[:, t] - costs[:, t], rewards)
        targets[:, t] = target
    return targets.masked_fill(~mask, 0.0)


def value_loss(value, hidden, rewards, mask, lam, costs=None):
    """Mean squared Bellman error over the real states, a scalar: V(h_t) to its TD(lambda) target."""
    values = value(hidden)
    targets = bellman_targets(values.detach(), rewards, mask, lam, costs)
    return ((values - targets)[mask] ** 2).mean()


@torch.no_grad()
def advantages(values, earned, rewards, mask, lam, costs=None):
    """
    How much each draw did for the reward: values, earned, mask (B, T), rewards (B,) -> (B, T).

    The forecast at h_t is the best linear one of the return from V(h_t) and `earned`, the reward of the
    text before y_t. The advantage is its TD(lambda) target less the forecast itself: the changes of the
    forecast from h_t on, summed with weights 1, lam, lam^2, .. (GAE, Schulman et al. 2015, arXiv 1506.02438).
    """
    returns = bellman_targets(torch.zeros_like(values), rewards, mask, 1.0, costs)
    features = torch.stack([values, earned, torch.ones_like(values)], -1).double()    # (B, T, 3)
    seen = features[mask]                                      # (states, 3)
    weights = torch.linalg.pinv(seen.T @ seen) @ (seen.T @ returns[mask].double())
    forecast = (features @ weights).float()
    return torch.where(mask, bellman_targets(forecast, rewards, mask, lam, costs) - forecast, 0.0)


def moments(batches):
    """Batches of rows (n, k) -> mean and standard deviation (k,) of all, no more than a batch in memory."""
    n, total, squares = 0, 0.0, 0.0
    for rows in batches:
        rows = rows.double()
        n, total, squares = n + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    variance = (squares - total ** 2 / n) / max(n - 1, 1)
    return (total / n).float(), variance.clamp(min=0).sqrt().float()


def whitening(batches, embedding):
    """
    psi, batches of (n, n_embd), and W (n_vocab, n_embd) -> T = M^-1/2 (n_embd, n_embd), symmetric.

    M is the second moment of psi over the real draws and as many imagined ones, of tokens chosen blindly from
    W. Tokens hardly ever drawn have no say in what A learns: without the imagined draws the directions that
    only such tokens have would be free, and ascent would go there.
    """
    blind, n, M = embedding - embedding.mean(0), 0, 0.0
    for psi in batches:
        n, M = n + len(psi), M + (psi.T @ psi).double()
    sizes, axes = torch.linalg.eigh(M / n + (blind.T @ blind / len(blind)).double())
    sizes = sizes.clamp(min=1e-10 * sizes.max().item())        # where no draw, real or imagined, goes
    return ((axes / sizes.sqrt()) @ axes.T).float()


# ------------------------------------------------------------------------------------------- files

def fingerprint(model):
    """sha256 of the final norm and the embedding in bfloat16, the same for float32 and bfloat16."""
    digest = hashlib.sha256()
    for weight in (model.ln_f.weight, model.ln_f.bias, model.wte.weight):
        digest.update(weight.detach().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def write_safetensors(path, tensors, metadata):
    """Write tensors and {str: str} metadata; the file appears whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, chunks, offset = {"__metadata__": metadata}, [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + len(data)]}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    write_whole(path, [len(text).to_bytes(8, "little"), text, *chunks])


def write_whole(path, chunks):
    """Write the bytes; whatever interrupts it, `path` holds all of the new or all of the old."""
    path = os.path.realpath(path)                              # a link stays a link
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- tokenizer

# How GPT-2 cuts text into pieces before pairs are merged: contractions, words, numbers, signs.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The printable character by which GPT-2's vocab.json writes each byte: {character: byte}.
BYTES = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in BYTES)}


def load_tokenizer(name):
    """The model's own vocab.json as a tiktoken.Encoding; GPT-2's where it has none and needs those."""
    try:
        path = find(name, "vocab.json", optional=True)
    except InputError:                                         # only the weights are cached, and no hub
        if str(name) not in {*PUBLIC, *PUBLIC.values()}:
            raise
        path = None
    if path is None and (n_vocab := read_config(name).n_vocab) != 50257:
        raise InputError(f"{name}: {n_vocab} tokens and no vocab.json to name them; fetch it")
    if path is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:   # tiktoken fetches through requests: any of its errors may come
            raise InputError(f"GPT-2's vocabulary is not cached and cannot be fetched "
                             f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or "
                             f"put GPT-2's vocab.json beside the weights") from None
    try:
        vocabulary = read_json(path)
        special = {t: i for t, i in vocabulary.items() if t.startswith("<|") and t.endswith("|>")}
        ranks = {bytes(BYTES[c] for c in t): i for t, i in vocabulary.items() if t not in special}
        if any(type(i) is not int for i in vocabulary.values()) \
                or sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError("the ids are not 0, 1, 2, ..")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("some of the 256 single bytes are missing")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no GPT-2 vocabulary ({error}); fetch it again") from None
    return tiktoken.Encoding(str(path), pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)


# ----------------------------------------------------------------------------------------- rewards
# A reward is a callable: texts (prompt + continuation, without special tokens) -> one float each.

NEGATIONS = frozenset("not no never neither nor without hardly barely".split())


def sentiment(texts):
    """
    (p - n) / (p + n) over the positive and negative words of each text, 0 where it has none.

    A negation among the three words before turns a word around, unless a clause ends in between.

    >>> sentiment(["a great cast and a dull plot , not a bad ending"])     # +1 -1 +1
    [0.3333333333333333]
    """
    scores = []
    for text in texts:
        counts, reach = [0, 0], 0                              # [positive, negative]
        for word in re.findall(r"[a-z]+(?:'t)?|[.,;:!?]", text.lower().replace("\u2019", "'")):
            if word in NEGATIONS or word.endswith("n't"):
                reach = 4
            elif not word[0].isalpha():
                reach = 0
            elif word in POSITIVE or word in NEGATIVE:
                counts[(word in NEGATIVE) ^ (reach > 0)] += 1
            reach -= reach > 0
        scores.append((counts[0] - counts[1]) / max(sum(counts), 1))
    return scores


class RewardModel:
    """
    A GPT-2 sequence classifier as a reward: a linear score of the state at a text's last token, in the
    layout of GPT2ForSequenceClassification. With one label its score, with two the log-odds of the second.
    """
    def __init__(self, name, device="cpu"):
        self.gpt = GPT.from_pretrained(name, device, extra=("score.weight",))
        self.encoder, self.score = load_tokenizer(name), self.gpt.extra["score.weight"]
        if tuple(self.score.shape) not in ((1, self.gpt.config.n_embd), (2, self.gpt.config.n_embd)):
            raise InputError(f"{name}: score.weight is {tuple(self.score.shape)}, not that of one label or "
                             f"two; choose another")
        if self.encoder.n_vocab > self.gpt.config.n_vocab:
            raise InputError(f"{name}: a vocabulary of {self.encoder.n_vocab} tokens for a model of "
                             f"{self.gpt.config.n_vocab}; fetch both from one model")
        self.gpt.pack()

    def __call__(self, texts):
        """texts -> scores. All of a text is text: "<|endoftext|>" in it is no token."""
        return self.rate([self.encoder.encode_ordinary(text) for text in texts])

    def rate(self, rows, batch=64):
        """[[token, ..], ..] -> scores; the beginnings of texts longer than the context are cut."""
        context = self.gpt.config.n_positions
        if long := sum(len(row) > context for row in rows):
            print(f"warning: {long} texts of more than {context} tokens; the reward model reads their last "
                  f"{context}", file=sys.stderr)
        rows = [row[-context:] or [self.gpt.config.eos_token_id] for row in rows]
        return [scores[-1] for scores in self.along(rows, batch)]

    @torch.no_grad()
    def along(self, rows, batch=64):
        """[[token, ..], ..] within the context -> [[score after each token, ..], ..]"""
        scores = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))             # like lengths side by side
        for part in (order[i:i + batch] for i in range(0, len(rows), batch)):
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in part], batch_first=True)
            logits = self.gpt(padded.to(self.score.device)) @ self.score.T        # (B, T, labels)
            logits = logits[:, :, -1] - (logits[:, :, 0] if len(self.score) == 2 else 0)
            for i, row in zip(part, logits.tolist()):
                scores[i] = row[:len(rows[i])]
        return scores


def load_reward(name, device="cpu"):
    """sentiment, path/to/file.py:function, or a classifier's name -> callable, texts -> floats"""
    if name == "sentiment":
        return sentiment
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        try:
            return RewardModel(name, device)
        except InputError as error:
            raise InputError(f"--reward {name}: neither 'sentiment' nor 'path/to/file.py:function', and no "
                             f"classifier: {error}") from None
    try:
        spec = importlib.util.spec_from_file_location("reward", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function)):
            raise TypeError(f"{function} is not a function")
        return checked(getattr(module, function), name)
    except (Exception, SystemExit) as error:                   # the user's file may raise anything
        raise InputError(f"--reward {name}: cannot be loaded "
                         f"({type(error).__name__}: {error}); mend the file") from None


def checked(reward, name):
    """The user's reward, held to its contract: InputError where it raises or returns no scores."""
    def scores(texts):
        """texts -> as many finite floats"""
        try:
            result = [float(score) for score in reward(texts)]
        except (Exception, SystemExit) as error:               # the user's function may raise anything
            raise InputError(f"--reward {name}: raised {type(error).__name__}: {error}; "
                             f"mend the file") from None
        if len(result) != len(texts):
            raise InputError(f"--reward {name}: returned {len(result)} scores for {len(texts)} texts; "
                             f"return one a text")
        for text, score in zip(texts, result):
            if not math.isfinite(score):
                raise InputError(f"--reward {name}: returned {score} for {text[:60]!r}; "
                                 f"return finite numbers")
        return result
    return scores


# The words `sentiment` counts: what film reviews praise and blame with, chosen by hand.
POSITIVE = frozenset("""
absorbing acclaimed accomplished admirable adorable affecting amazing amused amusing appealing astonishing
astounding atmospheric authentic awesome beautiful beautifully believable beloved best better bold brave
breathtaking bright brilliant brilliantly captivating celebrated charismatic charm charming charmingly
cheerful classic classy clever cleverly comforting compelling convincing convincingly cool credible cute
dazzling deft delicate delicious delight delighted delightful deserves effective effectively elegant
enchanting endearing engaging engrossing enjoy enjoyable enjoyed enjoying entertained entertaining
enthralling excellent excellently exceptional excited exciting exhilarating exquisite extraordinary
fantastic fascinating faultless favorite favourite fine finest flawless fresh fun funniest funny gem
generous genius gentle genuine genuinely gifted glad glorious good gorgeous graceful grand great greatest
gripping happy harmonious haunting heartfelt heartwarming hilarious hilariously honest hooked hopeful
humorous imaginative immersive impeccable impressed impressive incredible incredibly ingenious innovative
insightful inspired inspiring intelligent intense intriguing inventive invigorating irresistible joy joyful
joyous kind likable likeable lively lovable love loved lovely loves loving luminous lush magic magical
magnificent marvellous marvelous masterful masterfully masterpiece memorable mesmerizing moving nice nicely
nuanced original outstanding passionate perfect perfection perfectly phenomenal playful pleasant pleasantly
pleased pleasing pleasure poetic poignant polished powerful praise priceless profound pure radiant rare
realistic recommend recommended refreshing refreshingly remarkable remarkably resonant rewarding rich
riveting rocks romantic satisfied satisfying seamless sensational sensitive sharp sincere skillful smart
smooth solid soulful sparkling special spectacular spellbinding splendid stellar strong stunning stylish
sublime subtle superb superbly surprising suspenseful sweet sympathetic talent talented tender terrific
thoughtful thrilled thrilling timeless top touching treasure treat tremendous triumph triumphant
unforgettable unique uplifting vibrant vivid warm warmth watchable winner winning wise witty wonder
wonderful wonderfully worth worthwhile worthy wow
""".split())

NEGATIVE = frozenset("""
absurd abysmal aimless amateur amateurish annoyed annoying annoyingly appalling appallingly artificial
atrocious avoid awful awfully awkward bad badly bland bleak bogus bore bored boredom boring bother bothered
broken butchered careless cheap cheesy cliche cliched cliches clumsy cold confused confusing contrived corny
crap crappy cringe crude cruel dated dead defective depressing derivative despicable dire disappointed
disappointing disappointingly disappointment disaster disastrous disgusting disjointed dismal distasteful
dreadful dreadfully dreary dull dumb embarrassing embarrassment empty endless excruciating exploitative fail
failed fails failure fake farce flat flaw flawed flaws flop forced forgettable frustrated frustrating
garbage generic ghastly gimmicky grating gross hackneyed hate hated hates hideous hollow hopeless horrendous
horrible horribly horrid idiotic idiots implausible inane incoherent incompetent inept inferior insipid
insult insulting irritating joyless junk lack lacking lackluster lacks lame lazy lifeless limp listless
loathe lousy ludicrous mediocre mess messy mindless miserable miserably misguided missed mistake monotonous
moronic muddled mundane nasty nonsense nonsensical numbing obnoxious obvious offensive overacted overblown
overlong overrated painful painfully pathetic pitiful plodding pointless ponderous poor poorly predictable
preposterous pretentious problem problems pseudo rambling rehash repetitive repulsive ridiculous
ridiculously rubbish ruin ruined ruins rushed sadly sappy senseless shallow shambles shame shoddy silly
simplistic sloppy slow sluggish soulless stale stereotypical stiff stilted stink stinks stupid stupidity
suck sucked sucks superficial tacky tasteless tedious terrible terribly thin tired tiresome torture trash
trashy trite trivial turkey ugly unbearable unbelievable unconvincing uneven unfortunate unfortunately
unfunny uninspired uninteresting unnecessary unoriginal unpleasant unrealistic unwatchable useless vapid
vile vulgar waste wasted wasting weak weakest wooden worse worst worthless wrong yawn
""".split())
