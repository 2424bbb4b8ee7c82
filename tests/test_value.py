"""
The value net, Bellman targets and rewards against their definitions: numeric gradients, the n-step
sums written out, transformers' classifier, and rewards as people write them.
"""
import json

import pytest
import torch
from conftest import ROOT, SHARED, write_safetensors
from test_model import VOCAB, random_model, tiny_weights, vocabulary_files

import train_value
from model import InputError, load
from value import RewardModel, ValueNet, bellman_targets, load_reward, sentiment

TOY = ROOT / "tests" / "toy"


def net(n_embd=8, gradient_head=True, seed=0):
    torch.manual_seed(seed)
    value = ValueNet(n_embd, 5, gradient_head)
    value.mean.normal_(), value.std.uniform_(0.5, 2)
    if gradient_head:
        torch.nn.init.normal_(value.gradient_head.weight)
    return value.requires_grad_(False)


def test_targets_are_the_weighted_n_step_returns():
    """target_t = (1 - lam) sum_n lam^(n-1) (r_t + .. + r_{t+n-1} + V(h_{t+n})), all to the end last."""
    torch.manual_seed(0)
    values, rewards, lam, length = torch.randn(1, 6), torch.randn(1, 6), 0.7, 4
    mask = torch.arange(6)[None] < length
    V, r = values[0], rewards[0]
    for t in range(length):
        steps = [r[t:t + n].sum() + V[t + n] for n in range(1, length - t)]
        truth = sum((1 - lam) * lam ** i * step for i, step in enumerate(steps))
        truth = truth + lam ** len(steps) * r[t:length].sum()
        torch.testing.assert_close(bellman_targets(values, rewards, mask, lam)[0, t], truth)


def test_without_a_gradient_head_g_is_the_numeric_gradient_in_standardised_states():
    value, h, step = net(gradient_head=False).double(), torch.randn(3, 8).double(), 1e-3
    value.forward = lambda hidden: value.value_head(
        value.body((hidden - value.mean) / value.std)).squeeze(-1)
    slopes = torch.stack([(value(h + step * e) - value(h - step * e)) / (2 * step)
                          for e in torch.eye(8).double()], -1)
    value = net(gradient_head=False)
    torch.testing.assert_close(value.gradient(h.float()), value.std ** 2 * slopes.float(),
                               atol=1e-4, rtol=1e-3)


def test_v_is_the_mean_of_q_over_the_draw():
    """E_p[score] = 0, so sum_y p(y) Q(h, y) = V(h)."""
    value, W, h = net(), torch.randn(30, 8), torch.randn(4, 8)
    p = (h @ W.T).softmax(-1)
    scores = W - (p @ W)[:, None]                                           # (4, 30, 8)
    Q = value.q(h[:, None].expand(-1, 30, -1), scores)
    torch.testing.assert_close((p * Q).sum(-1), value(h), atol=1e-4, rtol=1e-4)


def test_whitened_scores_have_the_unit_matrix_as_second_moment():
    torch.manual_seed(0)
    scores, W = torch.randn(500, 6) @ torch.randn(6, 6), 80 + 30 * torch.randn(90, 6)
    T, centred = train_value.whitening(scores, W), W - W.mean(0)
    M = scores.T @ scores / 500 + centred.T @ centred / 90
    torch.testing.assert_close(T @ M @ T, torch.eye(6), atol=1e-3, rtol=1e-3)


def test_whitening_keeps_small_directions_beside_a_huge_one():
    """In float32 they are lost: rare tokens of a real model have rows a hundred times the others'."""
    torch.manual_seed(0)
    scores, W = 0.02 * torch.randn(500, 6), 0.02 * torch.randn(50_000, 6)
    W[:25_000] += 120 * torch.nn.functional.normalize(torch.ones(6), dim=0)
    T, centred = train_value.whitening(scores, W).double(), W.double() - W.double().mean(0)
    M = scores.double().T @ scores.double() / 500 + centred.T @ centred / 50_000
    torch.testing.assert_close(T @ M @ T, torch.eye(6).double(), atol=0.02, rtol=0)


def test_a_net_is_saved_whole_and_loaded_as_it_was(tmp_path):
    model, value = load(TOY)[0], net(64)
    value.save(tmp_path / "new" / "v.pt", model, {"model": "toy", "step_size": 2.0})
    again = ValueNet.load(tmp_path / "new" / "v.pt").fit_to(model)
    h = torch.randn(3, 64)
    torch.testing.assert_close(again(h), value(h), atol=0, rtol=0)
    torch.testing.assert_close(again.gradient(h), value.gradient(h), atol=0, rtol=0)
    assert again.info["step_size"] == 2.0
    again.fit_to(load(TOY, dtype=torch.bfloat16)[0])            # the same model, rounded
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.pt"]


def test_another_models_net_is_refused_by_what_the_network_computes(tmp_path):
    model, value = load(TOY)[0], net(64)
    value.save(tmp_path / "v.pt", model, {"model": "toy"})
    model.h[1].mlp.c_fc.weight.data[:32] *= 1.5                 # the ends are as they were
    with pytest.raises(InputError, match="trained on another model, toy"):
        ValueNet.load(tmp_path / "v.pt").fit_to(model)
    (tmp_path / "text.pt").write_text("no net")
    for name in ("text.pt", "absent.pt"):
        with pytest.raises(InputError, match="no value net"):
            ValueNet.load(tmp_path / name)


# ----------------------------------------------------------------------------------------- rewards

def test_sentiment_counts_words():
    assert sentiment(["a great cast and a dull plot , a warm ending", "", "GREAT!"]) == [1 / 3, 0, 1]


GOOD = {
    "lists": "def reward(texts): return [len(t) for t in texts]",
    "column": "import numpy as np\ndef reward(texts): return np.array([[len(t)] for t in texts], np.int8)",
    "torch": "import torch\ndef reward(texts): return torch.tensor([len(t) for t in texts])",
    "needs gradients": "import torch\ndef reward(texts):\n  w = torch.ones(1, requires_grad=True)\n"
                       "  return [w * len(t) for t in texts]",
    "sorts": "def reward(texts):\n  n = [len(t) for t in texts]\n  texts.sort()\n  return n",
    "gradients off": "import torch\ntorch.set_grad_enabled(False)\n"
                     "def reward(texts):\n  torch.set_grad_enabled(False)\n  return [len(t) for t in texts]",
    "other dtype": "import torch\ntorch.set_default_dtype(torch.float64)\n"
                   "def reward(texts): return [len(t) for t in texts]",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
                 "@dataclass\nclass A:\n  x: int\ndef reward(texts): return [A(len(t)).x for t in texts]",
    "helper": "from helper_of_mine import length\ndef reward(texts): return [length(t) for t in texts]",
}


@pytest.mark.parametrize("kind", GOOD)
def test_rewards_as_people_write_them(tmp_path, kind):
    (tmp_path / "control.py").write_text(GOOD[kind])            # named like a file of this project
    (tmp_path / "helper_of_mine.py").write_text("length = len")
    texts = ["bb", "a", "bb", "cccc"]
    scores = load_reward(f"{tmp_path / 'control.py'}:reward")(texts)
    torch.testing.assert_close(scores, torch.tensor([2., 1., 2., 4.], dtype=torch.float64))
    assert texts == ["bb", "a", "bb", "cccc"]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


BAD = {"returns nothing": "pass", "one number for all": "return 1.0", "nan": "return [float('nan')] * 2",
       "too few": "return [1.0]", "none": "return [None, 1.0]", "a slip": "return [t.splt() for t in texts]",
       "exits": "raise SystemExit(3)", "takes one text": "return len(texts.split())"}


@pytest.mark.parametrize("kind", BAD)
def test_a_reward_that_breaks_its_contract_is_named(tmp_path, kind):
    (tmp_path / "mine.py").write_text(f"def reward(texts):\n  {BAD[kind]}\n")
    with pytest.raises(InputError, match="mine.py:reward.*takes a list of texts"):
        load_reward(f"{tmp_path / 'mine.py'}:reward")(["a", "b"])


def test_a_reward_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def first(texts): pass\ndef second(texts): pass")
    for spec, message in (("mine.py", "first, second"), ("mine.py:third", "first, second"),
                          ("absent.py:reward", "absent.py"), ("absent", "no config.json")):
        with pytest.raises(InputError, match=message):
            load_reward(str(tmp_path / spec))


def test_each_distinct_text_is_scored_once(tmp_path):
    (tmp_path / "counts.py").write_text("calls = []\ndef reward(texts):\n  calls.extend(texts)\n"
                                        "  return [float(len(calls))] * len(texts)")
    scores = load_reward(f"{tmp_path / 'counts.py'}:reward")(["a", "b", "a", "a"])
    assert scores.tolist() == [2.0] * 4


def classifier(folder, score, **config):
    folder.mkdir()
    random_model(folder)
    write_safetensors(folder / "model.safetensors", {f"transformer.{k}": t for k, t in (
        tiny_weights() | {"wte.weight": torch.randn(len(VOCAB), 16)}).items()} | score)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": len(VOCAB), **config}))
    vocabulary_files(folder, VOCAB)
    return folder


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifiers_score_is_transformers(tmp_path, labels):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = classifier(tmp_path / "rm", {"score.weight": torch.randn(labels, 16)}, num_labels=labels,
                        id2label={str(i): f"L{i}" for i in range(labels)}, pad_token_id=1)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()
    reward, texts = RewardModel(folder), ["the good", "good", "thethe the good!", "the g"]
    for text, ours in zip(texts, reward(texts)):
        with torch.no_grad():
            logits = theirs(torch.tensor([reward.tokenizer.encode(text)])).logits[0].double()
        odds = logits[-1] - (logits[:-1].logsumexp(0) if labels > 1 else 0)
        torch.testing.assert_close(ours, odds, atol=1e-4, rtol=1e-4)
    assert reward.label == f"L{labels - 1}"


def test_the_label_can_be_chosen_and_a_bias_counts(tmp_path):
    score = {"score.weight": torch.randn(2, 16), "score.bias": torch.tensor([0.5, -1.0])}
    folder = classifier(tmp_path / "rm", score, id2label={"0": "POSITIVE", "1": "NEGATIVE"})
    good, bad = load_reward(f"{folder}:POSITIVE"), load_reward(str(folder))
    assert (good.label, bad.label) == ("POSITIVE", "NEGATIVE")
    torch.testing.assert_close(good(["the good"]), -bad(["the good"]))
    score.pop("score.bias")
    plain = load_reward(f"{classifier(tmp_path / 'no', score)}")
    assert not torch.equal(plain(["the good"]), bad(["the good"]))
    with pytest.raises(InputError, match="choose one of POSITIVE, NEGATIVE"):
        load_reward(f"{folder}:HAPPY")
    with pytest.raises(InputError, match="no classifier"):
        load_reward(str(TOY))


def test_beginnings_are_scored_as_if_alone(tmp_path):
    reward = RewardModel(classifier(tmp_path / "rm", {"score.weight": torch.randn(1, 16)}))
    texts = ["the good thegood"[:n] for n in range(1, 17)] + ["good the", "good"]
    torch.testing.assert_close(reward(texts), torch.cat([reward([text]) for text in texts]),
                               atol=1e-4, rtol=1e-4)
    long = "good the " * 20                                     # the end of it is read
    torch.testing.assert_close(reward([long]), reward([long[-len(" good the") * 11:]]), atol=9, rtol=9)


@pytest.mark.skipif(not (SHARED / "imdb-reward").is_dir(), reason="../shared is not here")
def test_a_real_reward_model_judges_reviews():
    rows = [json.loads(line) for line in
            (SHARED / "imdb-reward" / "test-windows.jsonl").read_text().splitlines()][:200]
    scores = load_reward(str(SHARED / "imdb-reward"), tokenizer="gpt2")([row["text"] for row in rows])
    golden = torch.tensor([1.6257, 1.1738, -1.2094], dtype=torch.float64)
    torch.testing.assert_close(scores[:3], golden, atol=1e-3, rtol=1e-3)
    assert 0.65 < sum((s > 0) == (row["label"] > 0) for s, row in zip(scores, rows)) / 200 < 0.85
