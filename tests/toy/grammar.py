"""
The languages of the tiny models: short reviews whose exact value and exact optimal control are known.

    this music was very warm and the plot seemed dull . the cast was lovely .

A review is a row of clauses. Its mood m = (p - n) / (p + n) counts the positive and negative
adjectives so far (0 before the first). At the end it is the reward; `value.sentiment` agrees.
Mood persists: the next adjective is positive with probability sigmoid(2 m). Every other choice
leans with the mood too. Nouns, verbs and adverbs *announce* a good review without *causing* one:
a controller that confuses the two spends its KL on them.

`choices(state)` is the whole grammar, state = (slot, p, n). From it follow, by dynamic programming
over (state, tokens left), the exact value of every state and the exact KL-optimal controller

    V(s) = sum p(s'|s) V(s')        Z(s) = sum p(s'|s) Z(s')        p*(s'|s) = p(s'|s) Z(s') / Z(s)

with V = reward and Z = exp(reward / beta) where the text ends or is cut. beta sweeps the frontier:
no controller at all earns more reward at the same KL.

The second language, from START_TWIST, is harder: its word that decides comes early, and the better
word there leads to the worse end.

    this script was awful , but within an hour the music was lovely , great and warm .

The third language, from START_LATE, is nearly always the same text: one adjective, four places
before the end, is open and decides the reward. At the other places one word has nearly all the
probability. The draws say nothing about the others, and a good controller leaves them alone.

    this music began at nine , and when it ended an hour later the cast seemed lovely to us .
"""
import math
from functools import lru_cache

START = ("first", 0, 0)
START_TWIST = (("twist", 0, 0), 0, 0)
START_LATE = (("late", 0, 0), 0, 0)
END = "<|endoftext|>"

# For each slot: the words of a bright mood, those of a dark one.
NOUNS = ((" music", " cast", " humor"), (" plot", " pacing", " script"))
VERBS = ((" was",), (" seemed",))
ADVERBS = ((" very", " truly"), (" rather", " somewhat"))
ADJECTIVES = ((" lovely", " great", " funny", " warm", " superb", " charming"),
              (" dull", " awful", " weak", " boring", " clumsy", " bad"))

SURE = math.log(1999)        # log-odds of the word that 1999 texts in 2000 have at this place


def nearly(word, *others):
    """A place where the others are hardly ever written"""
    return ((word,), others), SURE, 0


# The second and the third language, place by place: (the words, log-odds of the first group of them,
# how strongly these lean with the last adjective). A word alone is certain.
# In the second one place turns against the last adjective, 13 tokens after the first: a bright
# beginning (+1 so far) has a dark end, (1 - 3) / 4 = -0.5. What stands between announces the
# beginning, and nothing else.
SCRIPTS = {
    "twist": [((("this",), ("the",)), 0, 0), (NOUNS, 0, 0), (VERBS, 0, 0), (ADJECTIVES, 0, 0),
              (" ,", 0, 0), (" but", 0, 0), (((" within",), (" after",)), 0, 1), (" an", 0, 0),
              (" hour", 0, 0), (" or", 0, 0), (" so", 0, 0), (((" this",), (" the",)), 0, 1),
              (NOUNS, 0, 1), (VERBS, 0, 0), (ADVERBS, 0, 1), (ADJECTIVES, 0, -3), (" ,", 0, 0),
              (ADJECTIVES, 0, 2), (" and", 0, 0), (ADJECTIVES, 0, 2), (" .", 0, 0), (END, 0, 0)],
    "late": [((("this",), ("the",)), 0, 0),
             nearly(" music", " cast", " plot", " warm"),
             nearly(" began", " was", " seemed", " lovely"),
             nearly(" at", " very", " great", " weak"),
             nearly(" nine", " an", " dull"),
             nearly(" ,", " .", " funny"),
             nearly(" and", " but", " superb", " awful"),
             nearly(" when", " so", " charming"),
             nearly(" it", " humor", " boring"),
             nearly(" ended", " was", " great", " bad"),
             nearly(" an", " the", " warm"),
             nearly(" hour", " script", " clumsy"),
             nearly(" later", " truly", " lovely"),
             nearly(" the", " this", " superb"),
             nearly(" cast", " music", " funny", " weak"),
             nearly(" seemed", " was", " charming"),
             (ADJECTIVES, 0, 0),
             nearly(" to", " and", " great", " dull"),
             nearly(" us", " truly", " lovely"),
             nearly(" .", " ,", " warm"),
             (END, 0, 0)]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mood(state):
    """(p - n) / (p + n), the reward of a text that ends here."""
    _, p, n = state
    return (p - n) / max(p + n, 1)


def lean(state, words, slot, strength=1.0, share=1.0):
    """The bright words, with probability sigmoid(strength * mood) in all, and the dark ones."""
    _, p, n = state
    return split(words, sigmoid(strength * mood(state)), (slot, p, n), share)


def split(words, bright, following, share=1.0):
    """The bright words, with this probability in all, and the dark ones"""
    return [(share * total / len(group), word, following)
            for group, total in zip(words, (bright, 1 - bright)) for word in group]


@lru_cache(maxsize=None)
def choices(state):
    """state -> [(probability, token, next state)]; an ended text has none."""
    slot, p, n = state
    if isinstance(slot, tuple):
        return scripted(state)
    if slot == "first":
        return lean(state, (("the",), ("this",)), "noun")
    if slot == "opening":
        return lean(state, ((" the",), (" this",)), "noun")
    if slot == "noun":
        return lean(state, NOUNS, "verb")
    if slot == "verb":
        return lean(state, VERBS, "adverb")
    if slot == "adverb":
        return lean(state, ADVERBS, "adjective", share=0.4) + adjectives(state, share=0.6)
    if slot == "adjective":
        return adjectives(state)
    if slot == "link":
        stop = sigmoid(0.8 + 0.5 * mood(state))
        return [(stop, " .", ("stop", p, n)), (1 - stop, " and", ("opening", p, n))]
    if slot == "stop":
        end = sigmoid(1.6 + 0.5 * mood(state))
        again = [(q * (1 - end), word, s) for q, word, s in choices(("opening", p, n))]
        return [(end, END, ("end", p, n))] + again
    return []


def adjectives(state, share=1.0):
    """The only words that move the mood."""
    _, p, n = state
    return [(q, word, ("link", p + (word in ADJECTIVES[0]), n + (word in ADJECTIVES[1])))
            for q, word, _ in lean(state, ADJECTIVES, "link", strength=2.0, share=share)]


def scripted(state):
    """choices in a script; the slot is (script, place in it, sign of the last adjective)"""
    (script, place, last), p, n = state
    if place == len(SCRIPTS[script]):
        return []
    words, odds, strength = SCRIPTS[script][place]
    neither = (script, place + 1, last), p, n
    if isinstance(words, str):
        return [(1.0, words, neither)]
    good = (script, place + 1, 1), p + 1, n
    bad = (script, place + 1, -1), p, n + 1
    following = dict.fromkeys(ADJECTIVES[0], good) | dict.fromkeys(ADJECTIVES[1], bad)
    return [(q, word, following.get(word, neither))
            for q, word, _ in split(words, sigmoid(odds + strength * last), None)]


def sample(rng, start=START):
    """One review as its tokens, the end included, from a random.Random."""
    state, tokens = start, []
    while options := choices(state):
        _, token, state = rng.choices(options, [q for q, _, _ in options])[0]
        tokens.append(token)
    return tokens


def parse(tokens, start=START):
    """Tokens -> the states they are drawn from, the start first, and the last one reached.
    None where a token is not in the language."""
    states = [start]
    for token in tokens:
        following = {word: s for _, word, s in choices(states[-1])}
        if token not in following:
            return None
        states.append(following[token])
    return states


def log_probability(tokens, start=START):
    """Log-probability of a review's tokens under the grammar, in nats."""
    return sum(math.log(q) for state, token in zip(parse(tokens, start), tokens)
               for q, word, _ in choices(state) if word == token)


class Chain:
    """
    The exact solution. `transitions(state)` -> {next state: probability}, the grammar's own unless
    a model's are given; a text is cut `horizon` tokens after its first state.
    """
    def __init__(self, transitions=None):
        self.transitions = transitions or self.grammar
        self.value = self._expect(mood)      # (state, left) -> V, the expected reward, uncontrolled

    @staticmethod
    def grammar(state):
        merged = {}
        for q, _, following in choices(state):
            merged[following] = merged.get(following, 0.0) + q
        return merged

    def frontier(self, state, left, beta):
        """The KL-optimal controller's (KL in nats a text, expected reward) at this beta."""
        Z = self._expect(lambda s: math.exp(mood(s) / beta))
        return self.controlled(state, left, Z)

    def mean_value_frontier(self, state, left, beta):
        """The same of the controller p(s'|s) exp(V(s') / beta), normalised step by step.

        V = E[R] is not log E[exp(R / beta)]: this is the optimum where one step decides, and less
        than that over several."""
        return self.controlled(state, left, lambda s, left: math.exp(self.value(s, left) / beta))

    def controlled(self, state, left, weight):
        """(KL in nats a text, expected reward) of the controller q(s'|s) ~ p(s'|s) weight(s', left)"""
        @lru_cache(maxsize=None)
        def outcome(state, left):
            options = self.transitions(state) if left else {}
            if not options:
                return 0.0, mood(state)
            weights = {s: p * weight(s, left - 1) for s, p in options.items()}
            total = sum(weights.values())
            kl, reward = 0.0, 0.0
            for s, p in options.items():
                q = weights[s] / total
                later_kl, later_reward = outcome(s, left - 1)
                kl += q * (math.log(q / p) + later_kl)
                reward += q * later_reward
            return kl, reward
        return outcome(state, left)

    def _expect(self, outcome):
        """(state, left) -> E[outcome] at the text's end, under the uncontrolled transitions."""
        @lru_cache(maxsize=None)
        def expect(state, left):
            options = self.transitions(state) if left else {}
            return sum(q * expect(s, left - 1) for s, q in options.items()) if options else outcome(state)
        return expect
