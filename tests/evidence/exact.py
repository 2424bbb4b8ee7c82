"""
The best gain any method could have at each KL, exactly, for the tiny models' languages.

    p*(text) ~ p(text) exp(reward(text) / beta)          no distribution earns more at the same KL

A dynamic programme over the grammar (tests/toy/grammar.py), with the model's *own* probabilities,
averaged over the grammar's states on texts it has drawn. So what the model got slightly wrong is no
error of V or of the control. Exact for these averages: two texts in one state of the grammar may have
slightly different p, and a word that is not in the grammar counts for nothing.

Beside it, control by the exact mean value V = E[reward]:

    q(token) ~ p(token) exp(V(next state) / beta)           normalised step by step
"""
from collections import defaultdict

import numpy as np
import torch

from control import Sampler
from tests.toy import grammar

BETAS = [40, 30, 20, 16, 12, 10, 8, 6, 5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1.1, 1, .9, .8, .7,
         .6, .5, .4, .3, .25, .2, .15, .1, .07]
ENOUGH = 20      # visits before a state's average is trusted; rarer states keep the grammar's own


class Exact:
    def __init__(self, model, tokenizer, prompts, rollout, n_tokens, start=grammar.START):
        """rollout: uncontrolled texts with states recorded, the prompts taken in turn"""
        self.spelling = [tokenizer.encoding.decode_single_token_bytes(i).decode(errors="replace")
                         for i in range(model.config.n_vocab)]
        self.token = {word: i for i, word in enumerate(self.spelling)}
        self.known = {}                                 # {(state, tokens left): q_values}
        self.n_tokens = n_tokens
        self.states, self.where, parsed = [], [], 0
        for i, (tokens, mask) in enumerate(zip(rollout.tokens.tolist(), rollout.mask)):
            prompt = prompts[i % len(prompts)][1:]
            words = [self.spelling[t] for t in prompt + tokens[:int(mask.sum())]]
            path = grammar.parse(words, start)
            if path is not None:
                parsed += 1
                self.states += path[len(prompt):-1]
                self.where += [(i, t) for t in range(int(mask.sum()))]
        self.grammatical = parsed / len(rollout.tokens)
        self.chain = grammar.Chain(self.tabulate(model, rollout))
        self.start, = {grammar.parse([self.spelling[t] for t in prompt[1:]], start)[-1]
                       for prompt in prompts}           # the prompts end in one state
        self.value = self.chain.value(self.start, n_tokens)
        self.kl, self.gain = self.curve(self.chain.frontier)
        self.mean_value_kl, self.mean_value_gain = self.curve(self.chain.mean_value_frontier)

    def curve(self, controller):
        """The controller's KL and gain at all BETAS, from (0, 0) up"""
        points = [controller(self.start, self.n_tokens, beta) for beta in BETAS]
        kl, reward = torch.tensor([(0.0, self.value), *sorted(points)], dtype=torch.float64).T
        return kl, reward - self.value

    def best(self, kl):
        """The largest gain in reward at this KL, interpolated on a concave curve from (0, 0) up."""
        return float(np.interp(kl, self.kl, self.gain))

    def best_of_mean_value(self, kl):
        """The gain of the exact mean-value controller at this KL, likewise."""
        return float(np.interp(kl, self.mean_value_kl, self.mean_value_gain))

    def tabulate(self, model, rollout):
        """-> transitions(state) of the model: its own probabilities, averaged state by state."""
        total, visits = defaultdict(float), defaultdict(int)
        rows, columns = zip(*self.where)
        hidden = rollout.hidden[rows, columns]
        for i in range(0, len(hidden), 4096):
            probs = model.unembed(hidden[i:i + 4096]).softmax(-1).double().cpu().numpy()
            for state, p in zip(self.states[i:i + 4096], probs):
                total[state] += p
                visits[state] += 1
        table = {}

        def transitions(state):
            if visits.get(state, 0) < ENOUGH:
                return grammar.Chain.grammar(state)
            if state not in table:
                following = defaultdict(float)
                for _, token, after in grammar.choices(state):
                    following[after] += total[state][self.token[token]]
                mass = sum(following.values())
                table[state] = {after: p / mass for after, p in following.items()}
            return table[state]
        return transitions

    def truth(self):
        """The exact expected rewards in self.states, and where these are in the rollout"""
        rows, columns = zip(*self.where)
        return torch.tensor([self.chain.value(state, self.n_tokens - t)
                             for state, t in zip(self.states, columns)]), (rows, columns)

    def q_values(self, state, left):
        """The exact value of drawing each token (n_vocab,); for what is no word, that of the state"""
        if (state, left) not in self.known:
            values = torch.full((len(self.spelling),), self.chain.value(state, left)).double()
            for _, word, following in grammar.choices(state):
                values[self.token[word]] = self.chain.value(following, left - 1)
            self.known[state, left] = values
        return self.known[state, left]


class Oracle(Sampler):
    """
    Control by g without a net: u = size g, with the g that the loss asks for, of the exact Q.

        g = argmin E_p[(Q(y) - V - g . grad_log_p(y))^2] = Cov_p(W)^-1 Cov_p(W, Q)

    These languages have fewer words in a state than W has dimensions. So any Q is linear in W[y], and
    the oracle lies on the curve of the mean value: the distance from q to it is what learning costs.
    Where words are many, g is a fit, and the best only for small steps. CPU only: it follows the texts
    in Python.
    """

    def __init__(self, *settings, exact, size):
        super().__init__(*settings)
        self.exact = exact
        self.size = size
        self.W = self.model.wte.weight.double()
        self.products = (self.W[:, :, None] * self.W[:, None]).flatten(1)       # (n_vocab, n_embd^2)

    def prefill(self, prompts, uniforms):
        super().prefill(prompts, uniforms)
        self.states = [self.exact.start] * len(prompts)

    def follow(self):
        """Bring the grammar's states up to the last tokens; None: no longer in the language"""
        for i, token in enumerate(self.out.tokens[:, int(self.t) - 1].tolist()):
            if self.states[i] is not None:
                path = grammar.parse([self.exact.spelling[token]], self.states[i])
                self.states[i] = path[-1] if path else None

    def log_probs(self, hidden):
        """hidden (B, n_embd) -> log p, log p_u (B, n_vocab)"""
        if self.t > 0:
            self.follow()
        left = self.exact.n_tokens - int(self.t)
        log_p = self.model.unembed(hidden).double().log_softmax(-1)
        p = log_p.exp()                                                         # (B, n_vocab)
        Q = torch.zeros_like(p)
        for i, state in enumerate(self.states):
            if state is not None:
                Q[i] = self.exact.q_values(state, left)
        mean = p @ self.W                                                       # (B, n_embd)
        second = (p @ self.products).view(len(p), mean.size(1), -1)             # (B, n_embd, n_embd)
        covariance = second - mean[:, :, None] * mean[:, None]
        sizes = covariance.diagonal(dim1=1, dim2=2)                             # (B, n_embd)
        sizes += 1e-9 * sizes.sum(1, keepdim=True)      # in place: solvable where few words are likely
        with_Q = (p * Q) @ self.W - mean * (p * Q).sum(1, keepdim=True)
        g = torch.linalg.solve(covariance, with_Q)
        delta = self.size * g @ self.W.T
        return log_p.float(), (log_p + delta).log_softmax(-1).float()
