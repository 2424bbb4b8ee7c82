"""
V, a forecast of the reward; g, the direction in which control pushes; and the rewards themselves.

    h                   a hidden state of GPT-2; W its token embedding, which is also its output layer
    p = softmax(W h)    the probabilities of the next token y;  p_u = softmax(W (h + u)) under control
    s                   "so far": the reward of the unfinished text

    x = (h - mean) / std                   mean and std of the training states
    z = tanh(W1 x + b1)                    one hidden layer
    V(h, s) = a(z) + b(z) s                the expected reward of the finished text, if it goes on
                                           without control; b: how much of s will stay
    g(h) = G z                             where to push h, so that the next draw earns more
    grad_log_p(y) = W[y] - E_p[W]          the gradient of log p_u(y) in u, at u = 0
    Q(h, s, y) = V(h, s) + g(h) . grad_log_p(y)            the value of drawing y

Bellman's equation: on average a text is worth the same one token later, V(h_t) = E_y V(h_{t+1}); a
finished text is worth its reward. Training fits Q to the draws by least squares. TD(lambda) blends
the forecast one token later (lam 0) with the reward that the text did get (lam 1):

    target_t = reward_t + (1 - lam) V_{t+1} + lam target_{t+1}       reward_t: 0 but at the last token
    loss = mean of (Q_t - target_t)^2 + RIDGE |g_t|^2         (g_t whitened: see train_value.py)

When texts are drawn, only g is used: u = step_size g(h). V is the mean of Q, and the forecast that is shown.

Why g is learned. Kong et al. 2024 (arXiv 2406.05954) train V alone and climb dV/dh. But V is fitted
at hidden states that were seen, and nothing shows how it changes between them. Control acts on the
next draw only: p_u(y) is proportional to p(y) exp(W[y] . u). So it can use only that part of Q which
is linear in W[y]. That part is g; a regression on the drawn tokens shows it. The mean of grad_log_p
under p is 0, so V stays the mean of Q over y. If a nat costs beta of reward and later draws are not
controlled, y is best drawn from p(y) exp(Q(y) / beta), up to a constant factor. That is
softmax(W (h + g / beta)): the step size is 1 / beta.

Why the ridge. Where one token has nearly all probability, its grad_log_p is nearly 0, so the draws say
next to nothing about g. There the ridge keeps g near 0, and control does nothing.

Related work. LM-Steer (arXiv 2305.12798) and RAD-Q (2407.04615) read out g . W[y], too. REBEL
(2404.16767) regresses on log-probabilities. PMD-mean (2602.05933), like us, takes a mean where theory
asks for a soft value; Q# (2502.20548) shows the cost. The ridge is Tikhonov's; a natural gradient is
damped so (Martens 2020). PRE-Control (2510.12121) names what is missing where the draws say nothing:
excitation. b = 1 is reward shaping (Ng et al. 1999). Limitation: V reads a hidden state, not the text.
"""
import contextlib
import math
import os
import re
import runpy
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn as nn

from model import InputError, find_file, load, read_json

class ValueNet(nn.Module):
    """V and g on one hidden layer. To try another, change `body`: it has `width` outputs."""

    def __init__(self, n_embd, width=16, gradient_head=True, reads_so_far=True):
        super().__init__()
        assert gradient_head or not reads_so_far, "dV/dh is taken of a V that reads h alone"
        self.reads_so_far = reads_so_far
        self.body = nn.Sequential(nn.Linear(n_embd, width), nn.Tanh())
        self.value_head = nn.Linear(width, 2 if reads_so_far else 1)        # a and b, or a alone
        self.gradient_head = None
        if gradient_head:
            self.gradient_head = nn.Linear(width, n_embd, bias=False)
            nn.init.zeros_(self.gradient_head.weight)                       # starts from no control
        self.register_buffer("mean", torch.zeros(n_embd))                   # of the training states
        self.register_buffer("std", torch.ones(n_embd))

    def features(self, hidden):
        """hidden (.., n_embd) -> z (.., width)"""
        return self.body((hidden.float() - self.mean) / self.std)

    def forward(self, hidden, so_far=None):
        """hidden (.., n_embd), so_far (..), if the net reads it -> V (..)"""
        z = self.features(hidden).to(self.value_head.weight.dtype)          # float64 once trained
        outputs = self.value_head(z)                                        # (.., 2) or (.., 1)
        if not self.reads_so_far:
            return outputs[..., 0]
        a, b = outputs.unbind(-1)
        return a + b * so_far

    def gradient(self, hidden):
        """hidden (.., n_embd) -> g (.., n_embd). Without a gradient head: std (std dV/dh), the slope in
        x as a step of h. With std 1 this is the paper's."""
        if self.gradient_head is not None:
            return self.gradient_head(self.features(hidden))
        with torch.enable_grad():
            hidden = hidden.detach().float().requires_grad_()
            slope, = torch.autograd.grad(self(hidden).sum(), hidden)
        return self.std ** 2 * slope

    def save(self, path, model, info):
        """Write the net and what `load` and `check_model` need. The file is written whole or not."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {"weights": self.state_dict(), "info": info, "fingerprint": fingerprint(model)}
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                torch.save(saved, Path(folder, path.name))
                os.replace(Path(folder, path.name), path)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be written ({error}); make room, or name another")

    @classmethod
    def load(cls, path):
        """The net saved at `path`, frozen, with its .info. InputError if it is not a value net."""
        if not Path(path).is_file():
            raise InputError(f"no file {path}; make one with train_value.py, or name another")
        try:
            saved = read_net(path)
            weights = saved["weights"]
            n_embd = len(weights["mean"])
            outputs, width = weights["value_head.weight"].shape
            with torch.device("meta"):                                      # shapes, no memory
                value = cls(n_embd, width, "gradient_head.weight" in weights, outputs == 2)
            value.load_state_dict(weights, assign=True)
            if saved["fingerprint"].shape != (8, n_embd):
                raise ValueError("fingerprint of another size")
        except InputError:
            raise
        except Exception as error:          # torch may raise anything for a damaged file
            raise InputError(f"{path}: not a value net ({type(error).__name__}, {str(error)[:99]!r}); "
                             f"train one with train_value.py, or name another file") from None
        value.info, value.fingerprint = saved["info"], saved["fingerprint"]
        return value.requires_grad_(False)

    def check_model(self, model):
        """Return the net, moved to the model's device. InputError if it was trained on another model."""
        ours = fingerprint(model)
        theirs = self.fingerprint.to(ours)
        close = 1e-3 if ours.dtype == self.fingerprint.dtype == torch.float32 else 0.1     # 8 bits
        if theirs.shape != ours.shape or (theirs - ours).norm() > close * ours.norm():
            raise InputError(f"the value net was trained on another model, {self.info['model']}; "
                             f"train one for this model with train_value.py")
        return self.to(ours.device)

@torch.no_grad()
def fingerprint(model):
    """The hidden states (8, n_embd) after fixed tokens: models differ by what they compute."""
    tokens = torch.arange(1, 9, device=model.wte.weight.device) * 31 % 256
    return model(tokens[None])[0]

@torch.no_grad()
def bellman_targets(values, rewards, mask, lam):
    """
    values V(h_t), rewards r_t, mask (True up to the last token), all (B, T) -> TD(lambda) targets
        target_t = r_t + (1 - lam) V(h_{t+1}) + lam target_{t+1},  targets and V beyond the end: 0

    With values [[.1, .2, .4]], rewards [[0., 0., 1.]], all real:
        lam 0    [[.2, .4, 1.]]     the Bellman equation, one step
        lam 0.5  [[.45, .7, 1.]]
        lam 1    [[1., 1., 1.]]     Monte Carlo
    """
    targets = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])                             # (B,)
    next_target = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        target = rewards[:, t] + (1 - lam) * next_value + lam * next_target
        next_value = values[:, t] * mask[:, t]
        next_target = target * mask[:, t]
        targets[:, t] = next_target
    return targets

# ----------------------------------------------------------------------------------------- rewards
# A reward is a callable: N texts, prompt and continuation without special tokens -> N numbers. A
# text's number must not depend on the other texts. Those of load_reward give a float64 tensor.

POSITIVE = frozenset("""amazing beautiful best brilliant charming clever enjoy enjoyed entertaining
excellent fantastic fascinating fine fun funny good great happy hilarious impressive interesting
love loved lovely memorable moving nice perfect recommend strong superb warm wonderful""".split())
NEGATIVE = frozenset("""annoying awful bad badly bland bored boring cheap clumsy crap disappointed
disappointing dreadful dull fails flat horrible lack lame mediocre mess nothing painful pathetic
pointless poor predictable ridiculous silly stupid terrible ugly waste weak worse worst""".split())

def sentiment(texts):
    """
    (p - n) / (p + n) for the p positive and n negative words of each text, 0 where it has none
    >>> sentiment(["a great cast and a dull plot , a warm ending"])      # 2 positive, 1 negative
    [0.3333333333333333]
    """
    scores = []
    for text in texts:
        words = re.findall("[a-z]+", text.lower())
        p = sum(word in POSITIVE for word in words)
        n = sum(word in NEGATIVE for word in words)
        scores.append((p - n) / max(p + n, 1))
    return scores

class RewardModel:
    """
    A GPT2ForSequenceClassification as a reward, read at a text's last token. With one label it is
    the logit, with several the log-odds log(p / (1 - p)) of `label`, by default the last.
    """
    def __init__(self, name, label=None, device="cpu", tokenizer=None):
        self.gpt, self.tokenizer = load(name, tokenizer, device)
        n_embd = self.gpt.config.n_embd
        self.weight = self.gpt.extra.get("score.weight")                    # the classifier's head
        self.bias = self.gpt.extra.get("score.bias", 0)
        if self.weight is None or self.weight.shape[1:] != (n_embd,):
            raise InputError(f"{name}: not a classifier, since it has no score.weight of shape (labels, "
                             f"{n_embd}); choose another reward")
        labels = self.read_labels(name)
        self.label = label or labels[-1]
        if self.label not in labels:
            raise InputError(f"{name}: no label {label}; choose one of {', '.join(labels)}")
        self.chosen = labels.index(self.label)

    def read_labels(self, name):
        names = read_json(find_file(name, "config.json")).get("id2label") or {}
        if not isinstance(names, dict):
            raise InputError(f"{name}: id2label in its config.json is no dictionary; correct it")
        labels = [str(names.get(str(i), i)) for i in range(len(self.weight))]
        if len(set(labels)) < len(labels):
            raise InputError(f"{name}: two of its labels have one name, {labels}; rename one")
        return labels

    @torch.no_grad()
    def __call__(self, texts, batch=64):
        """N texts -> (N,). Of a text longer than the context, the end is read."""
        context = self.gpt.config.n_positions
        rows = [tuple(self.tokenizer.encoding.encode_ordinary(text)[-context:]) for text in texts]
        # One pass over "a b" scores "a", too. In reverse order a text comes before its beginnings.
        longest = {}
        last = ()
        for row in sorted(set(rows), reverse=True):
            if last[:len(row)] != row:
                last = row
            longest[row] = last
        distinct = sorted(set(longest.values()), key=len)
        scores = {}
        for i in range(0, len(distinct), batch):
            part = distinct[i:i + batch]
            scores.update(zip(part, self.score_rows(part)))
        return torch.stack([scores[longest[row]][len(row) - 1] for row in rows])

    def score_rows(self, rows):
        """B rows of tokens -> (B, T): the score of each row at each of its tokens"""
        tokens = [torch.tensor(row, device=self.weight.device) for row in rows]
        hidden = self.gpt(nn.utils.rnn.pad_sequence(tokens, batch_first=True))
        logits = (hidden @ self.weight.T + self.bias).double().cpu()        # (B, T, labels)
        score = logits[..., self.chosen]
        if logits.size(-1) == 1:
            return score
        others = torch.arange(logits.size(-1)) != self.chosen
        return score - logits[..., others].logsumexp(-1)

def load_reward(spec, device="cpu", tokenizer=None):
    """
    sentiment, FILE.py:FUNCTION (the file is run), or a classifier, DIRECTORY or DIRECTORY:LABEL -> a
    reward. `tokenizer` names the classifier's, if its directory has none.
    """
    if spec == "sentiment":
        return checked_reward(sentiment, spec)
    match = re.fullmatch(r"(.+\.py)(?::(\w+))?", spec)
    if match:
        path, name = match.groups()
        if not Path(path).is_file():
            raise InputError(f"--reward {spec}: no file {path}; name one, as FILE.py:FUNCTION")
        sys.path.append(str(Path(path).resolve().parent))                   # modules beside it
        with users_code():
            found = runpy.run_path(path)
        if not callable(found.get(name)):
            raise InputError(f"--reward {spec}: names no function of {path}; write {path}:FUNCTION")
        return checked_reward(found[name], spec)
    name, label = spec, None
    if not Path(spec).is_dir() and re.search(r":[^/\\]+$", spec):           # but C:\models is a path
        name, label = spec.rsplit(":", 1)
    try:
        return RewardModel(name, label, device, tokenizer)
    except InputError as error:
        why = str(error).replace("--tokenizer", "--reward-tokenizer")
        raise InputError(f"--reward {spec}: not sentiment, not FILE.py:FUNCTION, no classifier: {why}")

@contextlib.contextmanager
def users_code():
    """Run user code with gradients on; after it, the default dtype is float32 again."""
    with torch.enable_grad():
        yield
    torch.set_default_dtype(torch.float32)

def checked_reward(reward, name):
    """The reward, checked: N texts -> (N,) float64. In a call, each distinct text is scored once."""
    def scores(texts):
        distinct = list(dict.fromkeys(texts))
        with users_code():
            result = reward(list(distinct))                 # a copy: the reward may sort its list
        try:
            result = torch.as_tensor(result, dtype=torch.float64).detach().cpu().flatten()
        except (TypeError, ValueError, RuntimeError):       # None, words, rows of unequal length
            result = torch.tensor([])
        finite = int(result.isfinite().sum())
        if not len(result) == len(distinct) == finite:
            raise InputError(f"--reward {name}: {len(result)} numbers, {finite} of them finite, for "
                             f"{len(distinct)} texts; return one finite number for each text")
        place = {text: i for i, text in enumerate(distinct)}
        return result[[place[text] for text in texts]]
    return scores

# ------------------------------------------------------- loading a saved net: a reader may stop here
# INFO: what train_value.py was asked for, and the control that it found.
INFO = {"model": str, "tokenizer": (str, type(None)), "dtype": str, "reward": str,
        "reward_tokenizer": (str, type(None)), "method": str, "rollouts": int, "tokens": int,
        "seed": int, "step_size": float, "radius": float, "nats": float}

def read_net(path):
    """What ValueNet.save wrote. It may come from anyone: no code runs, every entry is checked."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
    with open(path, "rb") as file:          # by name, torch.load would guess a format from its ending
        saved = torch.load(file, weights_only=True, map_location="cpu")
    if "signature" in saved:
        raise InputError(f"{path}: made by an older version; train it again with train_value.py")
    tensors = {**saved["weights"], "fingerprint": saved["fingerprint"]}
    for name, tensor in tensors.items():
        # A view may claim more numbers than the file holds; a contiguous tensor cannot.
        if not tensor.is_contiguous() or not tensor.isfinite().all():
            raise ValueError(f"{name} is not a plain tensor of finite numbers")
    info = saved["info"]
    for key, kind in INFO.items():
        if not isinstance(info[key], kind) or not str(info[key]).isprintable():
            raise ValueError(f"{key} is {info[key]!r}")
    if info["dtype"] not in ("float32", "bfloat16") or not 0 < info["step_size"] < math.inf:
        raise ValueError(f"dtype {info['dtype']}, step size {info['step_size']}")
    return saved
