"""
V(h), the reward still to come, read off the hidden state; g(h), its gradient; and the rewards.

    x = (h - mean) / std                     of the training states
    f = phi(W1 x + b1)                       one hidden layer
    V(h) = w2 . f + b2                       value head
    g(h) = G f                               gradient head; without one, std dV/dx = std^2 dV/dh
    Q(h, y) = V(h) + g(h) . score(y)         the value of drawing y
    score(y) = W[y] - E_p[W]                 score function: grad_u log p_u(y) at u = 0
    target_t = r_t + (1 - lam) V(h_{t+1}) + lam target_{t+1}       Bellman, as TD(lambda)
    loss = mean over states of (Q(h_t, y_t) - target_t)^2     (without g: V)

Source: Kong et al. 2024 (arXiv 2406.05954), which trains V alone and climbs dV/dh. But values do
not train their gradient. Control acts on the draw only, p_u(y) ~ exp(W[y] . (h + u)), so what to
climb is the expected reward in u, and the draws show it: the g of least squares is its natural
gradient (compatible function approximation, Sutton et al. 2000; Kakade 2001). E_p[score] = 0, so V
stays the mean of Q over y, as in Bellman's equation. The policy that maximises E_u[Q] - beta
KL(p_u || p) is p(y) exp(Q(h, y) / beta) ~ softmax(W (h + g / beta)): one step of ascent
(KL-regularised policy improvement, Todorov 2006; Peters et al. 2010).

Limitations: V reads one state, not the text: what the state does not hold, V cannot know.
"""
import importlib.util
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn

from model import InputError, load, read_json

class ValueNet(nn.Module):
    """Both heads on one hidden layer. To try another activation or depth, change `body`."""
    def __init__(self, n_embd, width=64, gradient_head=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_embd, width), nn.Tanh())
        self.value_head = nn.Linear(width, 1)
        self.gradient_head = nn.Linear(width, n_embd, bias=False) if gradient_head else None
        if gradient_head:
            nn.init.zeros_(self.gradient_head.weight)           # starts from no control
        self.register_buffer("mean", torch.zeros(n_embd))       # of the training states
        self.register_buffer("std", torch.ones(n_embd))

    def features(self, hidden):                                 # (..., n_embd) -> (..., width)
        return self.body((hidden.float() - self.mean) / self.std)

    def forward(self, hidden):
        """hidden (..., n_embd) -> V (...)"""
        return self.value_head(self.features(hidden)).squeeze(-1)

    def gradient(self, hidden):
        """hidden (..., n_embd) -> g (..., n_embd), the direction in which control pushes hidden"""
        if self.gradient_head is not None:
            return self.gradient_head(self.features(hidden))
        with torch.enable_grad():
            hidden = hidden.detach().float().requires_grad_()
            return self.std ** 2 * torch.autograd.grad(self(hidden).sum(), hidden)[0]

    def q(self, hidden, score):
        """hidden, score (..., n_embd) -> Q(h, y) (...), the value of the draw with that score"""
        f = self.features(hidden)
        return self.value_head(f).squeeze(-1) + (self.gradient_head(f) * score).sum(-1)

    def save(self, path, model, info):
        """Write the net, how it was trained, and what its model computes; or nothing."""
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(self.mean), self.value_head.in_features, self.gradient_head is not None)
        torch.save({"shape": shape, "weights": self.state_dict(), "info": info,
                    "signature": signature(model)}, part)
        os.replace(part, path)

    @classmethod
    def load(cls, path):
        """The net saved at `path`, frozen, with its .info. InputError if it is none."""
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            value = cls(*saved["shape"])
            value.load_state_dict(saved["weights"])
            value.info, value.signature = saved["info"], saved["signature"]
        except Exception as error:      # of a foreign file torch.load may raise anything
            raise InputError(f"{path}: no value net ({type(error).__name__}, {str(error)[:99]!r}); "
                             f"train one with train_value.py, or name another file") from None
        return value.requires_grad_(False)

    def fit_to(self, model):
        """The net on the model's device. InputError if it was trained on another model's states."""
        ours, theirs = signature(model), self.signature.to(model.wte.weight.device)
        close = 1e-3 if theirs.dtype == ours.dtype == torch.float32 else 0.1    # bfloat16: 8 bits
        if theirs.shape != ours.shape or (theirs - ours).norm() > close * ours.norm():
            raise InputError(f"the value net was trained on another model, {self.info['model']}; "
                             f"train one for this model with train_value.py")
        return self.to(ours.device)

@torch.no_grad()
def signature(model):
    """States (8, n_embd) after fixed tokens: models are told apart by what they compute."""
    return model(torch.arange(1, 9, device=model.wte.weight.device)[None] * 31 % 256)[0]

@torch.no_grad()
def bellman_targets(values, rewards, mask, lam):
    """
    values V(h_t), rewards r_t, mask (True up to the last token), all (B, T) -> TD(lambda) targets

        target_t = r_t + (1 - lam) V(h_{t+1}) + lam target_{t+1},  all 0 beyond the last token

    With values [[.1, .2, .4]], rewards [[0., 0., 1.]], all real:
        lam 0    [[.2, .4, 1.]]     the Bellman equation, one step
        lam 0.5  [[.45, .7, 1.]]
        lam 1    [[1., 1., 1.]]     Monte Carlo
    """
    targets = torch.zeros_like(values)
    next_value = next_target = torch.zeros_like(values[:, 0])   # (B,)
    for t in reversed(range(values.size(1))):
        target = rewards[:, t] + (1 - lam) * next_value + lam * next_target
        next_value, next_target = values[:, t] * mask[:, t], target * mask[:, t]
        targets[:, t] = next_target
    return targets

# ----------------------------------------------------------------------------------------- rewards
# A reward is a callable: N texts, prompt and continuation without special tokens -> N numbers.
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
    rows = [re.findall("[a-z]+", text.lower()) for text in texts]
    counts = [[sum(map(s.__contains__, row)) for s in (POSITIVE, NEGATIVE)] for row in rows]
    return [(p - n) / max(p + n, 1) for p, n in counts]

class RewardModel:
    """
    A GPT2ForSequenceClassification as a reward, read at a text's last token: its logit, or with
    several labels the log-odds of `label` (by default the last).
    """
    def __init__(self, name, label=None, device="cpu", tokenizer=None):
        self.gpt, self.tokenizer = load(name, tokenizer, device)
        if "score.weight" not in self.gpt.extra:
            raise InputError(f"{name}: a GPT-2 without score.weight, no classifier; choose another")
        self.weight = self.gpt.extra["score.weight"]            # (labels, n_embd)
        self.bias = self.gpt.extra.get("score.bias", 0)
        names = read_json(Path(name, "config.json")).get("id2label", {})
        labels = [str(names.get(str(i), i)) for i in range(len(self.weight))]
        self.label = label or labels[-1]
        self.chosen = torch.tensor([each == self.label for each in labels])
        if self.label not in labels:
            raise InputError(f"{name}: no label {label}; choose one of {', '.join(labels)}")

    @torch.no_grad()
    def __call__(self, texts, batch=64):
        """
        N texts -> (N,); of a text beyond the context, its end. A text that another one begins with
        is scored along with it: step rewards cost one pass a text, not one a token.
        """
        context, encode = self.gpt.config.n_positions, self.tokenizer.encoding.encode_ordinary
        rows = [tuple(encode(text)[-context:]) for text in texts]
        ordered, whole, scores = sorted(set(rows)), {}, {}      # beginnings come before the whole
        for row, following in zip(ordered[::-1], [(), *ordered[:0:-1]]):        # from the last on
            whole[row] = whole[following] if following[:len(row)] == row else row
        distinct = sorted(set(whole.values()), key=len)
        for part in (distinct[i:i + batch] for i in range(0, len(distinct), batch)):
            tokens = [torch.tensor(row, device=self.weight.device) for row in part]
            states = self.gpt(nn.utils.rnn.pad_sequence(tokens, batch_first=True))
            logits = (states @ self.weight.T + self.bias).double().cpu()        # (B, T, labels)
            odds = logits[..., self.chosen].squeeze(-1)
            if len(self.chosen) > 1:
                odds = odds - logits[..., ~self.chosen].logsumexp(-1)
            scores |= dict(zip(part, odds))
        return torch.stack([scores[whole[row]][len(row) - 1] for row in rows])

def load_reward(spec, device="cpu", tokenizer=None):
    """sentiment, FILE.py:FUNCTION, or a classifier, DIRECTORY or DIRECTORY:LABEL -> a reward"""
    if spec == "sentiment":
        return checked(sentiment, spec)
    name, part = spec.rsplit(":", 1) if ":" in spec else (spec, None)
    if Path(name).suffix != ".py":
        return RewardModel(name, part, device, tokenizer)
    path = Path(name).resolve()
    alias = f"reward_{path.stem}" if path.stem in sys.modules else path.stem
    found = importlib.util.spec_from_file_location(alias, path)
    module = sys.modules[alias] = importlib.util.module_from_spec(found)    # pickle looks there
    sys.path.append(str(path.parent))                           # modules beside the file
    try:
        with torch.enable_grad():                               # undoes what the file switches
            found.loader.exec_module(module)
        torch.set_default_dtype(torch.float32)
        if part not in (names := [key for key, item in vars(module).items() if callable(item)]):
            raise ValueError(f"no function {part}; {name}:NAME names one of {', '.join(names)}")
    except (Exception, SystemExit) as error:                    # the user's file may raise anything
        raise InputError(f"--reward {spec}: {type(error).__name__}: {error}; fix it") from None
    return checked(getattr(module, part), spec)

def checked(reward, name):
    """The reward, held to its contract; each distinct text is scored once"""
    def scores(texts):
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        try:
            with torch.enable_grad():                           # undoes what the function switches
                result = reward(list(distinct))                 # a copy: it may sort it
            torch.set_default_dtype(torch.float32)
            result = torch.as_tensor(result).detach().double().cpu().flatten()
            if len(result) != len(distinct) or not result.isfinite().all():
                raise ValueError(f"{len(result)} numbers, {int(result.isfinite().sum())} of them "
                                 f"finite, for {len(distinct)} texts")
        except (Exception, SystemExit) as error:                # the function may raise anything
            raise InputError(f"--reward {name}: {type(error).__name__}: {error}; it takes a list "
                             f"of texts and returns a finite number for each") from None
        return result[[distinct[text] for text in texts]]
    return scores
