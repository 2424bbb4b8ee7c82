"""
value.py against what is known by other means: the gradient from autograd and finite differences,
Bellman targets worked out by hand, rewards of short texts counted by eye, the grammar's own mood.

    python -m pytest tests/test_value.py
"""
import math
import random

import numpy
import pytest
import torch

from conftest import ROOT
from control import ascend
from model import GPT
from test_loading import refused
from test_model import write_checkpoint
from toy import grammar
from value import NEGATIONS, NEGATIVE, POSITIVE, ValueNet
from value import advantages, bellman_targets, fingerprint, load_reward, sentiment, value_loss, whitening
from value import write_safetensors

TOY = ROOT / "tests" / "toy"


def random_net(seed, n_embd=6, width=5):
    """A net of which every part matters: random weights, mean and std."""
    torch.manual_seed(seed)
    value = ValueNet(n_embd, width)
    value.b1.data.normal_()
    value.w2.data.normal_()
    value.b2.data.normal_()
    value.mean.normal_()
    value.std.uniform_(0.2, 2.0)
    return value


# ------------------------------------------------------------------------- the net and its gradient

@pytest.mark.parametrize("seed", range(5))
def test_gradient_equals_autograd(seed):
    value = random_net(seed)
    hidden = torch.randn(3, 4, 6, requires_grad=True)
    dh, = torch.autograd.grad(value(hidden).sum(), hidden)                   # (3, 4, 6)
    assert torch.allclose(value.gradient(hidden), value.std * dh, atol=1e-5)


def test_gradient_equals_central_differences():
    value, step = random_net(0).double(), 2.0 ** -10
    hidden = torch.randn(4, 6).div(step).round() * step       # h + step has no rounding in float32
    shift = step * torch.eye(6)[:, None]                                     # (6, 1, 6)
    dh = (value(hidden + shift) - value(hidden - shift)).T / (2 * step)      # (4, 6)
    assert (value.gradient(hidden) - value.std * dh).abs().max() < 2e-5


@pytest.mark.parametrize("seed", range(5))
def test_the_worth_of_a_draw_is_the_gradient_along_psi(seed):
    value = random_net(seed)
    hidden, psi = torch.randn(2, 3, 4, 6)
    expected = (value.gradient(hidden) * value.std * psi).sum(-1)            # (3, 4)
    assert expected.abs().max() > 0.1
    assert torch.allclose(value.worth(hidden, psi), expected, atol=1e-5)


# ---------------------------------------------------------------------------------- Bellman targets

BY_HAND = {      # rewards 1 and -2; values .1 .2 .4, and .3 .5 of a text of two tokens
    0.0: [[0.2, 0.4, 1.0], [0.5, -2.0, 0.0]],
    0.5: [[0.45, 0.7, 1.0], [-0.75, -2.0, 0.0]],     # .5*.4 + .5*1 = .7, .5*.2 + .5*.7 = .45
    1.0: [[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0]],
}


@pytest.mark.parametrize("padding", [0.0, 1e6, torch.nan])
@pytest.mark.parametrize("lam", BY_HAND)
def test_targets_by_hand(lam, padding):
    values = torch.tensor([[0.1, 0.2, 0.4], [0.3, 0.5, padding]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    targets = bellman_targets(values, torch.tensor([1.0, -2.0]), mask, lam)
    assert torch.allclose(targets, torch.tensor(BY_HAND[lam]), atol=1e-6)


@pytest.mark.parametrize("lam, by_hand", [(0.0, [0.0, 0.1, 1.0]), (0.5, [0.1, 0.4, 1.0]), (1.0, [0.5, 0.7, 1.0])])
def test_targets_with_costs_by_hand(lam, by_hand):
    values, costs = torch.tensor([[0.1, 0.2, 0.4, 9.0]]), torch.tensor([[0.1, 0.2, 0.3, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    targets = bellman_targets(values, torch.tensor([1.0]), mask, lam, costs)
    assert torch.allclose(targets, torch.tensor([by_hand + [0.0]]), atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_loss_is_that_of_constant_targets_on_real_states(lam):
    value, hidden = random_net(1), torch.randn(3, 4, 6)
    rewards, lengths = torch.randn(3), [4, 1, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]                  # (3, 4)

    parameters = list(value.parameters())

    def gradients(loss):
        parts = torch.autograd.grad(loss, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    errors = []
    for row, length in enumerate(lengths):                   # backwards, one text at a time
        v, target = value(hidden[row]).tolist(), rewards[row].item()
        for t in reversed(range(length)):
            if t < length - 1:
                target = (1 - lam) * v[t + 1] + lam * target
            errors.append((value(hidden[row, t]) - target) ** 2)
    expected = torch.stack(errors).mean()
    loss = value_loss(value, hidden, rewards, mask, lam)
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert torch.allclose(gradients(loss), gradients(expected), rtol=1e-3, atol=1e-5)
    other = value_loss(value, hidden.where(mask[..., None], 9.0), rewards, mask, lam)
    assert torch.allclose(gradients(other), gradients(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("known", ["values", "earned"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_by_hand(lam, known):
    """The return is known before the last draw or so: two texts of three tokens, one of them padded."""
    foretold = torch.tensor([[0.0, 1.0, 1.0, 5.0], [0.0, -1.0, -1.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    mask, rewards = torch.arange(4) < torch.tensor([[3], [3], [4]]), torch.tensor([1.0, -1.0, 0.0])
    other = torch.zeros(3, 4)
    pair = (2 * foretold + 3, other) if known == "values" else (other, 2 * foretold + 3)
    advantage = advantages(*pair, rewards, mask, lam)          # the forecast undoes the 2 and the 3
    assert torch.allclose(advantage, torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 0]]), atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_are_weighted_changes_of_the_forecast(lam):
    torch.manual_seed(2)
    values, earned, rewards, costs = torch.randn(50, 5), torch.randn(50, 5), torch.randn(50), torch.rand(50, 5)
    mask = torch.arange(5) < torch.randint(1, 6, (50, 1))
    returns = torch.stack([rewards - costs[:, t + 1:].where(mask[:, t + 1:], 0.0).sum(1) for t in range(5)], 1)
    X = numpy.stack([values[mask], earned[mask], torch.ones(int(mask.sum()))], 1)
    a, b, c = numpy.linalg.lstsq(X.astype(float), returns[mask].double().numpy(), rcond=None)[0]
    forecast, expected = a * values + b * earned + c, torch.zeros(50, 5)
    for row in range(50):
        n = int(mask[row].sum())
        path = [*forecast[row, :n].tolist(), rewards[row].item()]
        change = [path[t + 1] - path[t] - (costs[row, t + 1].item() if t + 1 < n else 0.0) for t in range(n)]
        for t in range(n):
            expected[row, t] = sum(lam ** (s - t) * change[s] for s in range(t, n))
    advantage = advantages(values, earned, rewards, mask, lam, costs)
    assert torch.allclose(advantage, expected.float(), atol=1e-4)


def test_whitening_makes_real_and_imagined_draws_alike():
    torch.manual_seed(3)
    psi, W = torch.randn(40, 6), torch.randn(9, 6) + 2
    T, blind = whitening([psi[:15], psi[15:]], W), W - W.mean(0)
    total = sum(torch.outer(T @ p, T @ p) for p in psi) / 40 + sum(torch.outer(T @ w, T @ w) for w in blind) / 9
    assert torch.allclose(total, torch.eye(6), atol=1e-4) and torch.allclose(T, T.T, atol=1e-5)
    assert whitening([psi[:2]], W[:2]).isfinite().all()          # some directions no draw goes


# ------------------------------------------------------------------------------------------ rewards

COUNTED = {      # text -> positive and negative words, by eye
    "": (0, 0), "the cast was there": (0, 0),
    "a great cast": (1, 0), "A GREAT cast!": (1, 0), "great, awful": (1, 1),
    "great lovely dull": (2, 1), "dull plot and dull cast": (0, 2),
    "not great": (0, 1), "not a very great film": (0, 1), "not in any way great": (1, 0),
    "never dull": (1, 0), "hardly dull, and great": (2, 0), "without charm": (0, 1),
    "not . great": (1, 0), "not so, great": (1, 0), "great, not": (1, 0),
    "it isn't bad": (1, 0), "it isn\u2019t bad": (1, 0), "don't love it": (0, 1),
    "greatest? great-looking": (2, 0), "greatly": (0, 0),
}


@pytest.mark.parametrize("text", COUNTED)
def test_sentiment_by_hand(text):
    p, n = COUNTED[text]
    assert sentiment([text]) == [(p - n) / (p + n) if p + n else 0.0]


def test_sentiment_of_each_text_is_its_own():
    texts = list(COUNTED)
    assert sentiment(texts) == [score for text in texts for score in sentiment([text])]


def test_sentiment_is_the_mood_of_the_toy_language():
    rng = random.Random(0)
    for _ in range(200):
        tokens = grammar.sample(rng)
        mood = grammar.mood(grammar.parse(tokens)[-1])
        assert sentiment(["".join(tokens).removesuffix(grammar.END)]) == [pytest.approx(mood)]


def test_word_lists():
    assert min(len(POSITIVE), len(NEGATIVE)) >= 200
    assert not POSITIVE & NEGATIVE and not (POSITIVE | NEGATIVE) & NEGATIONS
    assert [w for w in POSITIVE if sentiment([w]) != [1.0]] == []
    assert [w for w in NEGATIVE if sentiment([w]) != [-1.0]] == []


REWARDS = """
import torch
def length(texts): return [len(text) for text in texts]
def tensor(texts): return torch.ones(len(texts)) / 2
def nan(texts): return [float("nan")] * len(texts)
def infinite(texts): return [float("inf")] * len(texts)
def short(texts): return [0.0] * (len(texts) - 1)
def words(texts): return ["good"] * len(texts)
def none(texts): return None
def raises(texts): raise OSError("two\\nlines")
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def test_reward_of_a_file(rewards):
    assert load_reward(f"{rewards}:length")(["a", "abc"]) == [1.0, 3.0]
    assert load_reward(f"{rewards}:tensor")(["a", "abc"]) == [0.5, 0.5]
    assert load_reward("sentiment")(["great"]) == [1.0]


@pytest.mark.parametrize("function, word", [
    ("nan", "nan"), ("infinite", "inf"), ("short", "returned 1 scores for 2 texts"),
    ("words", "ValueError"), ("none", "TypeError"), ("raises", "OSError")])
def test_reward_that_breaks_its_contract(function, word, rewards):
    reward = load_reward(f"{rewards}:{function}")
    refused(lambda: reward(["a", "b"]), f"rewards.py:{function}", word)


@pytest.mark.parametrize("name", ["{}:absent", "{}.py:length", "{}", "joy", "", ":", ".py:f"])
def test_reward_that_is_not_there(name, rewards):
    refused(lambda: load_reward(name.format(rewards)), "--reward", name.format(rewards))


@pytest.mark.parametrize("source", ["def reward(:", "import no_such_module", "1 / 0"])
def test_reward_file_that_does_not_load(source, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    refused(lambda: load_reward(f"{path}:reward"), "broken.py:reward", "Error")


# ------------------------------------------------------------------------------- saving and loading

@pytest.fixture(scope="module")
def model():
    return GPT.from_pretrained(TOY)


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "new" / "value.safetensors"
    random_net(0, 64, 5).save(path, fingerprint=fingerprint(model), reward="sentiment", seed=3)
    return path


def test_round_trip(model, saved):
    value, hidden = ValueNet.load(saved, model), torch.randn(4, 64)
    assert torch.equal(value(hidden), random_net(0, 64, 5)(hidden))
    assert torch.equal(value.gradient(hidden), random_net(0, 64, 5).gradient(hidden))
    assert value.info == {"n_embd": 64, "width": 5, "lift": 0, "fingerprint": fingerprint(model),
                          "reward": "sentiment", "seed": 3}
    assert not any(parameter.requires_grad for parameter in value.parameters())
    value.save(saved.with_name("again.safetensors"))          # what it knows travels along
    assert ValueNet.load(saved.with_name("again.safetensors"), model).info == value.info
    assert sorted(p.name for p in saved.parent.iterdir()) == ["again.safetensors",
                                                              "value.safetensors"]


def test_value_net_of_another_model(saved, tmp_path):
    narrow = GPT.from_pretrained(write_checkpoint(tmp_path / "narrow"))
    refused(lambda: ValueNet.load(saved, narrow), "states of 64 numbers", "have 16")
    other = GPT.from_pretrained(TOY)
    other.ln_f.bias[7] += 0.1
    refused(lambda: ValueNet.load(saved, other), str(saved), "another model")


def test_damaged_value_net(model, saved):
    whole = saved.read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        saved.write_bytes(whole[:size])
        refused(lambda: ValueNet.load(saved, model), str(saved))


def test_what_is_no_value_net(model, tmp_path):
    for path in (tmp_path / "absent", tmp_path, TOY / "model.safetensors", TOY / "config.json"):
        refused(lambda: ValueNet.load(path, model), str(path))


@pytest.mark.parametrize("info", [
    "", "3", "[]", "{}", '{"n_embd": 64}', '{"n_embd": 64, "width": 6}',
    '{"n_embd": -64, "width": 5}', '{"n_embd": "64", "width": 5}'])
def test_value_net_whose_configuration_is_wrong(info, model, tmp_path):
    path = tmp_path / "value.safetensors"
    write_safetensors(path, random_net(0, 64, 5).state_dict(), {"nanocontrol": info})
    refused(lambda: ValueNet.load(path, model), str(path), "train one")


def test_where_it_cannot_be_saved(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "value.safetensors", tmp_path / "folder"):
        refused(lambda: random_net(0).save(path), str(path), "--out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_sum_of_nets_is_the_weighted_sum():
    values = [random_net(seed, 16, width) for seed, width in ((1, 8), (2, 5), (3, 8))]
    weights = (0.5, 2.0, -0.3)
    total, hidden = ValueNet.sum(values, weights), 2 * torch.randn(50, 16)
    assert len({tuple(value.std.tolist()) for value in values}) == 3           # coordinates of their own
    expected = sum(weight * value(hidden) for value, weight in zip(values, weights))
    assert torch.allclose(total(hidden), expected, atol=1e-4)
    slopes = sum(weight * value.gradient(hidden) / value.std for value, weight in zip(values, weights))
    assert torch.allclose(total.gradient(hidden) / total.std, slopes, atol=1e-4)


def test_the_lift_is_what_is_climbed():
    value = ValueNet(8, 5, lift=4)
    value.standardise([torch.randn(50, 8) * 3 + 1])
    value.requires_grad_(False)
    value.lift.w2.normal_()
    hidden, psi = torch.randn(2, 6, 8)
    worth = value.worth(hidden, psi)
    point = hidden.clone().requires_grad_()
    slope, = torch.autograd.grad(value.lift(point).sum(), point)       # dA/dh; dA/dx . psi_x = std^2 dA/dh . psi
    torch.testing.assert_close(worth, (slope * value.std ** 2 * psi).sum(-1), atol=1e-5, rtol=1e-4)
    step = ascend(value, hidden, 1, 1e-3, math.inf)
    torch.testing.assert_close(step, 1e-3 * value.std ** 2 * slope, atol=1e-6, rtol=1e-3)


def test_the_sum_of_nets_with_and_without_a_lift(tmp_path, model):
    a, b = ValueNet(64, 5, lift=4), random_net(1, 64, 4)
    a.standardise([torch.randn(50, 64) * 2 - 1])
    a.requires_grad_(False)
    total, hidden, psi = ValueNet.sum([a, b], [0.7, 0.3]), *torch.randn(2, 6, 64)
    torch.testing.assert_close(total(hidden), 0.7 * a(hidden) + 0.3 * b(hidden), atol=1e-5, rtol=1e-4)
    worth = 0.7 * a.worth(hidden, psi) + 0.3 * b.worth(hidden, psi * (a.std / b.std) ** 2)
    torch.testing.assert_close(total.worth(hidden, psi), worth, atol=1e-4, rtol=1e-4)
    a.save(tmp_path / "a.safetensors", fingerprint=fingerprint(model))
    again = ValueNet.load(tmp_path / "a.safetensors", model)
    assert torch.equal(again.worth(hidden, psi), a.worth(hidden, psi)) and again.info["lift"] == 4
