"""
The value net, Bellman targets, the loss and rewards against their definitions: numeric gradients,
the n-step sums written out, transformers' classifier, and rewards as people write them.
"""
import json

import pytest
import torch
from tests.conftest import ROOT, SHARED, write_safetensors
from tests.test_files import VOCAB, random_model, vocabulary_files
from tests.test_model import tiny_weights

import train_value
from model import InputError, load
from value import RewardModel, ValueNet, bellman_targets, load_reward, sentiment

TOY = ROOT / "tests" / "toy"
INFO = {"model": "toy", "tokenizer": None, "reward": "sentiment", "reward_tokenizer": None,
        "method": "q", "dtype": "float32", "tokens": 32, "seed": 1, "rollouts": 4000,
        "step_size": 2.0, "radius": 10.0, "nats": 0.5}


def net(n_embd=8, gradient_head=True, reads_so_far=True, seed=0):
    torch.manual_seed(seed)
    value = ValueNet(n_embd, 5, gradient_head, reads_so_far)
    value.mean.normal_()
    value.std.uniform_(0.5, 2)
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


def test_v_is_linear_in_the_reward_so_far():
    """V(h, s) = a(h) + b(h) s, b another number for each hidden state."""
    value, h = net(), torch.randn(6, 8)
    zero, one, five = (value(h, torch.full((6,), r)) for r in (0.0, 1.0, 5.0))
    torch.testing.assert_close(five, zero + 5 * (one - zero))
    assert (one - zero).std() > 0.01
    assert net(reads_so_far=False)(h).shape == (6,)


def test_without_a_gradient_head_g_is_the_numeric_gradient_in_standardised_states():
    value = net(gradient_head=False, reads_so_far=False)
    h = torch.randn(3, 8)
    step = 1e-2
    slopes = torch.stack([(value(h + step * e) - value(h - step * e)) / (2 * step)
                          for e in torch.eye(8)], -1)
    torch.testing.assert_close(value.gradient(h), value.std ** 2 * slopes, atol=1e-3, rtol=1e-2)


def loss_by_hand(value, h, r, draws, rewards, length, lam, ridge):
    """One text, state by state, in plain Python."""
    V = [float(value(h[t], r[t])) for t in range(length)]
    total = 0.0
    target = next_value = 0.0
    for t in reversed(range(length)):
        target = float(rewards[t]) + (1 - lam) * next_value + lam * target
        g = value.gradient(h[t])
        total += (V[t] + float(g @ draws[t]) - target) ** 2 + ridge * float(g @ g)
        next_value = V[t]
    return total / length


def test_the_loss_is_bellmans_error_of_q_and_the_ridge(monkeypatch):
    monkeypatch.setattr(train_value, "RIDGE", 0.7)
    value = net()
    h, draws = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    r, rewards = torch.randn(1, 5), torch.randn(1, 5)
    mask = torch.arange(5)[None] < 4
    loss = train_value.bellman_loss(value, h, r, draws, rewards, mask, 0.3)
    truth = loss_by_hand(value, h[0], r[0], draws[0], rewards[0], 4, 0.3, 0.7)
    torch.testing.assert_close(loss.item(), truth, atol=1e-4, rtol=1e-4)


def test_whitened_draws_have_the_unit_matrix_as_second_moment():
    torch.manual_seed(0)
    drawn = torch.randn(500, 6) @ torch.randn(6, 6)
    W = 80 + 30 * torch.randn(90, 6)
    centred = W - W.mean(0)
    M = drawn.T @ drawn / 500 + centred.T @ centred / 90
    whiten = train_value.whitening(drawn, W)
    torch.testing.assert_close(whiten @ M @ whiten, torch.eye(6), atol=1e-3, rtol=1e-3)


def test_whitening_keeps_small_directions_beside_a_huge_one():
    """In float32 they are lost: rare tokens of a real model have rows a hundred times the others'."""
    torch.manual_seed(0)
    drawn, W = 0.02 * torch.randn(500, 6), 0.02 * torch.randn(50_000, 6)
    W[:25_000] += 120 * torch.nn.functional.normalize(torch.ones(6), dim=0)
    centred = W.double() - W.double().mean(0)
    M = drawn.double().T @ drawn.double() / 500 + centred.T @ centred / 50_000
    whiten = train_value.whitening(drawn, W).double()
    torch.testing.assert_close(whiten @ M @ whiten, torch.eye(6).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("reads_so_far", [True, False])
def test_scale_and_shift_are_undone_in_the_heads(reads_so_far):
    """V = shift + scale V'(h, (r - shift) / scale), also for a reward that is large and varies little."""
    value, h = net(reads_so_far=reads_so_far), torch.randn(6, 8)
    scale, shift = torch.tensor(0.3).double(), torch.tensor(1e7).double()
    r = shift + scale * torch.randn(6).double()
    before = value(h, ((r - shift) / scale).float())
    g = value.gradient(h)
    whiten = torch.randn(8, 8)
    train_value.unscale(value, scale, shift, whiten)
    torch.testing.assert_close(value(h, r), shift + scale * before.double(), atol=1e-6, rtol=1e-12)
    torch.testing.assert_close(value.gradient(h), 0.3 * g @ whiten.T)


# --------------------------------------------------------------------------------- the file of a net

def test_a_net_is_saved_whole_and_loaded_as_it_was(tmp_path):
    model, value = load(TOY)[0], net(64)
    value.value_head.double()
    value.save(tmp_path / "new" / "v.safetensors", model, INFO)         # an ending that means nothing
    again = ValueNet.load(tmp_path / "new" / "v.safetensors").check_model(model)
    h, r = torch.randn(3, 64), torch.randn(3)
    torch.testing.assert_close(again(h, r), value(h, r), atol=0, rtol=0)
    torch.testing.assert_close(again.gradient(h), value.gradient(h), atol=0, rtol=0)
    assert again.info == INFO
    again.check_model(load(TOY, dtype=torch.bfloat16)[0])               # the same model, rounded
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_another_models_net_is_refused_by_what_the_network_computes(tmp_path):
    model, value = load(TOY)[0], net(64)
    value.save(tmp_path / "v.pt", model, INFO)
    model.h[1].mlp.c_fc.weight.data[:32] *= 1.5                         # the ends are as they were
    with pytest.raises(InputError, match="trained on another model, toy"):
        ValueNet.load(tmp_path / "v.pt").check_model(model)


def test_a_net_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(saved, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    (tmp_path / "v.pt").write_bytes(b"the old one")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        net(64).save(tmp_path / "v.pt", load(TOY)[0], INFO)
    assert (tmp_path / "v.pt").read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


def saved_net(path, **changes):
    """The file of a net, with entries changed: a function of the entry, by name"""
    value = net(64)
    saved = {"weights": value.state_dict(), "info": dict(INFO), "fingerprint": torch.zeros(8, 64)}
    for key, change in changes.items():
        change(saved[key])
    torch.save(saved, path)
    return path


FOREIGN = {
    "a size the file does not hold": dict(weights=lambda w: w.update(
        {"gradient_head.weight": torch.zeros(1).expand(10 ** 7, 5)})),
    "another shape": dict(weights=lambda w: w.update({"mean": torch.zeros(7)})),
    "not finite": dict(weights=lambda w: w["std"].fill_(torch.nan)),
    "a weight too many": dict(weights=lambda w: w.update({"more": torch.zeros(1)})),
    "a weight too few": dict(weights=lambda w: w.pop("mean")),
    "no step size": dict(info=lambda i: i.pop("step_size")),
    "a step size in words": dict(info=lambda i: i.update(step_size="large")),
    "control characters": dict(info=lambda i: i.update(model="\033[2J")),
    "a dtype of its own": dict(info=lambda i: i.update(dtype="Tensor")),
    "fingerprint": dict(fingerprint=lambda f: f.fill_(torch.inf))}


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_entry_of_a_foreign_net_is_checked(tmp_path, kind):
    ValueNet.load(saved_net(tmp_path / "good.pt"))
    with pytest.raises(InputError, match="not a value net") as error:
        ValueNet.load(saved_net(tmp_path / "bad.pt", **FOREIGN[kind]))
    assert "\033" not in str(error.value)


def test_an_older_net_and_damaged_files_get_one_line(tmp_path):
    torch.save({"shape": (64, 5, True), "weights": {}, "info": {}, "signature": 0}, tmp_path / "old.pt")
    with pytest.raises(InputError, match="made by an older version; train it again"):
        ValueNet.load(tmp_path / "old.pt")
    good = saved_net(tmp_path / "good.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for i in range(60):                                 # a byte flipped or the end cut: never a traceback
        place = int(torch.randint(len(good), (), generator=generator))
        bad = good[:place] + bytes([good[place] ^ 255]) + good[place + 1:] if i % 2 else good[:place]
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            again = ValueNet.load(tmp_path / "bad.pt")
        except InputError as error:
            assert "\n" not in str(error)
            continue
        for key, weight in again.state_dict().items():  # a byte between the records: nothing changed
            torch.testing.assert_close(weight, net(64).state_dict()[key], atol=0, rtol=0)
    (tmp_path / "text.pt").write_text("no net")
    for name, message in (("text.pt", "not a value net"), ("absent.pt", "no file .*absent.pt")):
        with pytest.raises(InputError, match=message):
            ValueNet.load(tmp_path / name)


def test_opening_a_net_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"weights": Evil(), "info": {}, "fingerprint": 0}, tmp_path / "v.pt")
    with pytest.raises(InputError, match="not a value net"):
        ValueNet.load(tmp_path / "v.pt")
    assert not (tmp_path / "ran").exists()


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
       "too few": "return [1.0]", "none": "return [None, 1.0]", "words": "return ['good', 'bad']"}


@pytest.mark.parametrize("kind", BAD)
def test_a_reward_that_breaks_its_contract_is_named(tmp_path, kind):
    (tmp_path / "mine.py").write_text(f"def reward(texts):\n  {BAD[kind]}\n")
    with pytest.raises(InputError, match="mine.py:reward.*one finite number for each text"):
        load_reward(f"{tmp_path / 'mine.py'}:reward")(["a", "b"])


def test_a_slip_in_the_users_file_shows_its_own_line(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(texts):\n  return [t.splt() for t in texts]\n")
    with pytest.raises(AttributeError, match="splt") as error:
        load_reward(f"{tmp_path / 'mine.py'}:reward")(["a", "b"])
    assert str(error.traceback[-1].path).endswith("mine.py")


def test_a_reward_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def first(texts): pass")
    for spec, message in (("mine.py", "write .*mine.py:FUNCTION"), ("mine.py:third", "names no function"),
                          ("absent.py:reward", "no file .*absent.py"), ("absent", "no config.json")):
        with pytest.raises(InputError, match=message):
            load_reward(str(tmp_path / spec))


@pytest.mark.parametrize("spec", [r"C:\models\x", "runs/10:30/x"])
def test_a_colon_in_a_folders_name_is_no_label(spec):
    with pytest.raises(InputError) as error:
        load_reward(spec)
    assert f": {spec}: no config.json" in str(error.value)


def test_numbers_are_read_in_float64(tmp_path):
    """In float32, 1e7 + 0.3 x is one number for all x."""
    (tmp_path / "far.py").write_text("def reward(texts): return [1e7 + 0.3 * len(t) for t in texts]")
    scores = load_reward(f"{tmp_path / 'far.py'}:reward")(["a", "bb"])
    torch.testing.assert_close(scores.diff().item(), 0.3, atol=1e-8, rtol=0)


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
    with pytest.raises(InputError, match="not a classifier"):
        load_reward(str(TOY))


@pytest.mark.parametrize("names, message", [({"0": "SAME", "1": "SAME"}, "have one name"),
                                            (["A", "B"], "no dictionary"), (None, "L|1")])
def test_labels_that_say_nothing_are_named(tmp_path, names, message):
    folder = classifier(tmp_path / "rm", {"score.weight": torch.randn(2, 16)}, id2label=names)
    if names is None:
        assert RewardModel(folder).label == "1"
        return
    with pytest.raises(InputError, match=message):
        RewardModel(folder)


def test_a_head_of_another_shape_is_no_classifier(tmp_path):
    for i, shape in enumerate([(16,), (2, 15)]):
        with pytest.raises(InputError, match="not a classifier"):
            RewardModel(classifier(tmp_path / str(i), {"score.weight": torch.randn(shape)}))


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
