"""
The languages of the tiny models, their exact solution against brute force, and how close the models are.
"""
import math
import random

import pytest
from tests.evidence.exact import Exact

from control import generate, uniform_table
from model import load, read_prompts
from tests.toy import grammar
from tests.toy.train import LANGUAGES, excess, learn_merges, words_of
from value import load_reward, sentiment

# Few tokens before the end of the third language: its one open word is among them.
BEFORE_THE_END = (("late", 15, 0), 0, 0)


def states_of(start):
    seen, waiting = {start}, [start]
    while waiting:
        for _, _, following in grammar.choices(waiting.pop()):
            if following not in seen and following[1] + following[2] < 6:
                seen.add(following)
                waiting.append(following)
    return seen


def every_text(state, left, weight):
    """All texts of at most `left` tokens -> (p, q, reward) of each; q is p tilted step by step"""
    options = grammar.choices(state) if left else []
    if not options:
        return [(1.0, 1.0, grammar.mood(state))]
    tilted = [p * weight(following, left - 1) for p, _, following in options]
    texts = []
    for (p, _, following), each in zip(options, tilted):
        q = each / sum(tilted)
        texts += [(p * p_rest, q * q_rest, reward)
                  for p_rest, q_rest, reward in every_text(following, left - 1, weight)]
    return texts


def kl_and_reward(texts):
    return sum(q * math.log(q / p) for p, q, _ in texts), sum(q * reward for _, q, reward in texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_probabilities_sum_to_1(language):
    for state in states_of(LANGUAGES[language][0]):
        options = grammar.choices(state)
        assert not options or math.isclose(sum(q for q, _, _ in options), 1)
        assert len({word for _, word, _ in options}) == len(options)        # so that it can be parsed


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentiment_is_the_grammars_mood(language):
    start = LANGUAGES[language][0]
    for seed in range(300):
        tokens = grammar.sample(random.Random(seed), start)
        assert tokens[-1] == grammar.END
        state = grammar.parse(tokens, start)[-1]
        assert sentiment(["".join(tokens[:-1])]) == [grammar.mood(state)]


def test_words_that_the_third_language_hardly_writes_count_too():
    main = "this music began at nine , and when it ended an hour later the cast seemed lovely to us ."
    tokens = [" " * (i > 0) + word for i, word in enumerate(main.split())]
    assert grammar.mood(grammar.parse(tokens, grammar.START_LATE)[-1]) == 1
    assert math.isclose(grammar.log_probability(tokens, grammar.START_LATE),
                        2 * math.log(1 / 2) + math.log(1 / 6) + 18 * math.log(0.9995))
    tokens[6] = " awful"
    assert grammar.mood(grammar.parse(tokens, grammar.START_LATE)[-1]) == 0 == sentiment(
        ["".join(tokens)])[0]


@pytest.mark.parametrize("start", [grammar.START, grammar.START_TWIST, BEFORE_THE_END])
@pytest.mark.parametrize("beta", [1, 0.3])
def test_the_exact_solution_is_that_of_brute_force(start, beta):
    chain, left = grammar.Chain(), 5

    def value(state, left):
        return sum(p * reward for p, _, reward in every_text(state, left, lambda *_: 1.0))
    assert math.isclose(chain.value(start, left), value(start, left), abs_tol=1e-12)

    free = every_text(start, left, lambda *_: 1.0)
    total = sum(p * math.exp(reward / beta) for p, _, reward in free)
    best = [(p, p * math.exp(reward / beta) / total, reward) for p, _, reward in free]
    assert chain.frontier(start, left, beta) == pytest.approx(kl_and_reward(best))

    tilted = every_text(start, left, lambda state, left: math.exp(value(state, left) / beta))
    assert chain.mean_value_frontier(start, left, beta) == pytest.approx(kl_and_reward(tilted))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_word_is_one_token(language):
    start, folder = LANGUAGES[language]
    model, tokenizer = load(folder)
    words = words_of(start)
    assert [len(tokenizer.encode(word)) for word in words + [grammar.END]] == [1] * (len(words) + 1)
    assert tokenizer.encode(grammar.END) == [model.config.n_vocab - 1]
    merges = [line.split() for line in (folder / "merges.txt").read_text("utf-8").splitlines()[1:]]
    assert merges == [list(pair) for pair in learn_merges([w.replace(" ", "\u0120") for w in words])]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_model_is_close_to_its_grammar(language):
    start, folder = LANGUAGES[language]
    model, tokenizer = load(folder)
    assert excess(model, tokenizer.encoding, start, n=1000) < 0.002


@pytest.mark.parametrize("language, n_tokens", [("twist", 24), ("late", 24)])
def test_the_exact_values_are_what_uncontrolled_texts_earn(language, n_tokens, texts=1500):
    """test_toy.py has that of the first language. At few nats the mean value is nearly the optimum."""
    start, folder = LANGUAGES[language]
    model, tokenizer = load(folder)
    prompts = read_prompts(model, tokenizer, folder)
    rows = [prompts[i % len(prompts)] for i in range(texts)]
    rollout = generate(model, rows, uniform_table(texts, n_tokens, 1), record=True)
    exact = Exact(model, tokenizer, prompts, rollout, n_tokens, start)
    assert exact.grammatical > .99
    reward = load_reward("sentiment")([tokenizer.decode(row + tokens[mask].tolist()) for row, tokens, mask
                                       in zip(rows, rollout.tokens, rollout.mask)])
    assert abs(reward.mean() - exact.value) < 4 * reward.std() / math.sqrt(texts)
    assert .99 < exact.best_of_mean_value(0.1) / exact.best(0.1) < 1.001
