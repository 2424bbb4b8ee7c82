"""
The language of the tiny model: short reviews whose exact value and exact optimal control are known.

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
word there leads to the worse end (SCRIPT).

    this script was awful , but within an hour the music was lovely , great and warm .
"""
import math
from functools import lru_cache

START, START_TWIST = ("first", 0, 0), ((0, 0), 0, 0)
END = "<|endoftext|>"

# For each slot: the words of a bright mood, those of a dark one.
NOUNS = ((" music", " cast", " humor"), (" plot", " pacing", " script"))
VERBS = ((" was",), (" seemed",))
ADVERBS = ((" very", " truly"), (" rather", " somewhat"))
ADJECTIVES = ((" lovely", " great", " funny", " warm", " superb", " charming"),
              (" dull", " awful", " weak", " boring", " clumsy", " bad"))

# The second language, place by place: (the words, how strongly they lean with the last adjective).
# One place turns against it, 13 tokens after the first adjective: a bright beginning (+1 so far)
# has a dark end, (1 - 3) / 4 = -0.5. What stands between announces the beginning, and nothing else.
SCRIPT = [((("this",), ("the",)), 0), (NOUNS, 0), (VERBS, 0), (ADJECTIVES, 0), (" ,", 0),
          (" but", 0), (((" within",), (" after",)), 1), (" an", 0), (" hour", 0), (" or", 0),
          (" so", 0), (((" this",), (" the",)), 1), (NOUNS, 1), (VERBS, 0), (ADVERBS, 1),
          (ADJECTIVES, -3), (" ,", 0), (ADJECTIVES, 2), (" and", 0), (ADJECTIVES, 2), (" .", 0),
          (END, 0)]


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
        return twist(state)
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


def twist(state):
    """choices of the second language; its slot is (place in SCRIPT, sign of the last adjective)"""
    (place, last), p, n = state
    if place == len(SCRIPT):
        return []
    words, strength = SCRIPT[place]
    if isinstance(words, str):
        return [(1.0, words, ((place + 1, last), p, n))]
    if words is not ADJECTIVES:
        return split(words, sigmoid(strength * last), ((place + 1, last), p, n))
    good, bad = ((place + 1, 1), p + 1, n), ((place + 1, -1), p, n + 1)
    return [(q, word, good if word in words[0] else bad)
            for q, word, _ in split(words, sigmoid(strength * last), None)]


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

        @lru_cache(maxsize=None)
        def reward(state, left):
            options = self.transitions(state) if left else {}
            return sum(q * Z(s, left - 1) / Z(state, left) * reward(s, left - 1)
                       for s, q in options.items()) if options else mood(state)

        best = reward(state, left)
        return best / beta - math.log(Z(state, left)), best

    def _expect(self, outcome):
        """(state, left) -> E[outcome] at the text's end, under the uncontrolled transitions."""
        @lru_cache(maxsize=None)
        def expect(state, left):
            options = self.transitions(state) if left else {}
            return sum(q * expect(s, left - 1) for s, q in options.items()) if options else outcome(state)
        return expect
