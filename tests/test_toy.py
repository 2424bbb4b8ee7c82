"""The tiny model has learned its language, V the exact value, and the control the exact optimum."""
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ablate
import compare
import finetune
import sample
import tune
from control import Controller, Rollout, best_of_kl, step_for_kl
from exact import Exact, Tilted
from model import GPT
from sample import roll_out
from train_value import METHODS, fit_static, train
from value import load_tokenizer, sentiment

TOY = Path(__file__).parent / "toy"
sys.path.insert(0, str(TOY))
import grammar                                                                        # noqa: E402
from train import excess                                                              # noqa: E402

TOKENS = 32


@pytest.fixture(scope="module")
def toy():
    """model, encoder, prompts, 4,000 training rollouts with rewards, 4,000 other uncontrolled texts."""
    model, encoder = GPT.from_pretrained(TOY), load_tokenizer(TOY)
    prompts = sample.encode_prompts(model, encoder, ["the", "this"], TOKENS)[1]
    trained, rewards, _ = roll_out(model, encoder, sentiment, prompts, 4000, TOKENS, seed=0, record=True)
    others, _, _ = roll_out(model, encoder, sentiment, prompts, 4000, TOKENS, seed=3, record=True)
    return model, encoder, prompts, trained, rewards, others


# ---------------------------------------------------------------------------- the language by itself

def paths(state, left):
    """Every way a text can go on: (probability, states after this one)."""
    options = grammar.Chain.grammar(state) if left else {}
    if not options:
        yield 1.0, [state]
    for following, p in options.items():
        for q, rest in paths(following, left - 1):
            yield p * q, rest


def test_choices_are_distributions():
    for slot, p, n in itertools.product(("first", "opening", "noun", "verb", "adverb", "adjective",
                                         "link", "stop"), range(4), range(4)):
        options = grammar.choices((slot, p, n))
        assert sum(q for q, _, _ in options) == pytest.approx(1)
        assert len({token for _, token, _ in options}) == len(options)
    assert grammar.choices(("end", 1, 2)) == []


def test_reviews_parse_and_their_mood_is_the_reward():
    rng = random.Random(0)
    for _ in range(200):
        review = grammar.sample(rng)
        last = grammar.parse(review)[-1]
        assert last[0] == "end" and grammar.mood(last) == sentiment(["".join(review[:-1])])[0]
    assert grammar.parse(["the", " was"]) is None


@pytest.mark.parametrize("left", [0, 1, 4, 8])
def test_the_exact_value_by_enumeration(left):
    start = ("adjective", 1, 1)
    brute = sum(p * grammar.mood(states[-1]) for p, states in paths(start, left))
    assert grammar.Chain().value(start, left) == pytest.approx(brute)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_frontier_by_enumeration(beta):
    """The optimum tilts whole texts by exp(reward / beta): its KL and reward from their listing."""
    start, left = ("adjective", 0, 1), 8
    texts = [(p, grammar.mood(states[-1])) for p, states in paths(start, left)]
    Z = sum(p * math.exp(r / beta) for p, r in texts)
    tilted = [(p * math.exp(r / beta) / Z, p, r) for p, r in texts]
    kl, reward = sum(q * math.log(q / p) for q, p, _ in tilted), sum(q * r for q, _, r in tilted)
    assert grammar.Chain().frontier(start, left, beta) == pytest.approx((kl, reward))


# ------------------------------------------------------------------------------- the model, V, control

def test_the_model_has_learned_its_language(toy):
    model, encoder, prompts, *_, others = toy
    assert abs(excess(model, encoder, n=4000)) < 0.002
    exact = Exact(model, encoder, prompts, others, TOKENS)
    assert exact.grammatical >= 0.995
    assert exact.value == pytest.approx(grammar.Chain().value(exact.start, TOKENS), abs=0.02)


def test_files_are_small():
    assert (TOY / "model.safetensors").stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def nets(toy):
    model, *_, trained, rewards, _ = toy
    return {name: train(model, trained, rewards, **METHODS[name]) for name in ("q", "plain")}


def test_v_is_the_exact_value(toy, nets):
    model, encoder, prompts, *_, others = toy
    exact = Exact(model, encoder, prompts, others, TOKENS)
    for value in nets.values():
        assert exact.r_squared(value, others) >= 0.95


@pytest.mark.parametrize("nats, least", [(0.1, 0.85), (0.3, 0.88), (0.8, 0.85)])
def test_control_against_the_exact_optimum(toy, nets, nats, least):
    """Share of the optimal gain at equal KL; bounds leave room for 2,000 texts' noise."""
    model, encoder, prompts, trained, _, others = toy
    exact = Exact(model, encoder, prompts, others, TOKENS)
    shares = {}
    for name, value in nets.items():
        control = Controller(value, radius=2.0)
        control.step_size = step_for_kl(model, control, trained, nats)
        drawn, scores, _ = roll_out(model, encoder, sentiment, prompts, 2000, TOKENS, seed=5, control=control)
        kl = sample.figures(drawn, scores)["kl_text"]
        mean, error = sample.mean_error(scores)
        shares[name] = (mean - exact.value) / exact.best(kl)
        assert 0.5 * nats < kl < 1.5 * nats
        assert shares[name] <= 1 + 3 * error / exact.best(kl)
    assert shares["q"] >= least and shares["q"] > shares["plain"] + 0.1


# --------------------------------------------------------------------------------------- the tables

def test_kl_of_the_best_of_n():
    even = torch.tensor([0.0, 1.0] * 50)                       # best of 2: 0 with 1/4, 1 with 3/4
    assert best_of_kl(even, 2) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert best_of_kl(torch.zeros(100), 8) == pytest.approx(0)         # nothing to choose between
    assert best_of_kl(torch.arange(100.0), 8) == pytest.approx(math.log(8) - 7 / 8)
    fine = torch.arange(40_000).div(4, rounding_mode="floor").float()          # four of each: ties, but fine
    assert best_of_kl(fine, 8) == pytest.approx(math.log(8) - 7 / 8, abs=1e-3)


@pytest.mark.parametrize("first", [False, True])
def test_a_static_direction_is_least_squares(first):
    """Against numpy's, of rewards and states less their means, of all states or of each text's first."""
    generator = torch.Generator().manual_seed(0)
    hidden, rewards = torch.randn(40, 3, 6, generator=generator) * 2 + 1, torch.randn(40, generator=generator)
    hidden[:, 0] += 3                                          # the first states are elsewhere
    mask, zeros = torch.ones(40, 3, dtype=torch.bool), torch.zeros(40, 3)
    mask[::2, 2] = False
    rollout = Rollout(zeros.long(), mask, zeros, zeros, zeros, zeros, zeros, hidden, hidden, zeros)
    value = fit_static(rollout, rewards, 1e-6, first)
    states, outcome = hidden[mask], rewards[:, None].expand_as(mask)[mask]
    mean, std = states.mean(0), states.std(0)
    if first:
        states, outcome = hidden[:, 0], rewards
    x = ((states - mean) / std).numpy()
    w, *_ = np.linalg.lstsq(x - x.mean(0), (outcome - rewards.mean()).numpy(), rcond=None)
    assert np.allclose(value.gradient(torch.zeros(1, 6))[0].detach(), w, rtol=1e-3, atol=1e-4)


def test_settings_are_tuned_and_every_method_is_compared(tmp_path, capsys):
    few = ["--model", str(TOY), "--tokens", "12", "--rollouts", "100", "--device", "cpu"]
    tune.main([*few, "--held-out", "100", "--tries", "2", "--methods", "q,static", "--json",
               str(tmp_path / "t.json")])
    out = capsys.readouterr().out
    best = json.loads((tmp_path / "t.json").read_text())
    assert list(best) == ["q", "static"] and best["q"].keys() == METHODS["q"].keys()
    scores = [float(line.split()[1]) for line in out.splitlines() if line.startswith("static") and "+-" in line]
    assert len(scores) == len(tune.RIDGE) and f"{'static':10}{max(scores):7.3f} is the best of {len(scores)}" in out
    compare.main([*few, "--samples", "60", "--kl", "0.1,0.2", "--candidates", "5", "--best-of", "3",
                  "--check", "sentiment", "--settings", str(tmp_path / "t.json"), "--prefix", "this music . ",
                  "--rounds", "2", "--json", str(tmp_path / "c.json")])
    out, whole = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    labels = {f"{method} {nats}" for method in (*METHODS, "guided") for nats in (0.1, 0.2)}
    labels |= {f"{method} {nats}, 2 rounds" for method in ("q", "draws") for nats in (0.1, 0.2)}
    labels |= {"uncontrolled", "prefix", "q 0.1 + prefix", "best 3 reward", "best 3 V", "q 0.1 + best 3 V"}
    assert set(whole) == {"settings", *labels}
    for label in labels:
        row, = [line for line in out.splitlines() if line.startswith(f"{label:30}")]
        f, texts = whole[label]["figures"], whole[label]["texts"]
        assert f"{f['kl_text']:7.3f}{f['kl_token']:8.4f}{f['reward']:8.3f}" in row
        assert f["reward"] == pytest.approx(sum(sentiment([text["text"] for text in texts])) / 120, abs=1e-6)
        assert f["check"] == pytest.approx(f["reward"], abs=1e-6) and len(texts) == 120
        if label != "uncontrolled" and "prefix" not in label:
            assert 0.02 < f["kl_text"] < 1
        assert f["forwards"] == (6 if "guided" in label else 3 if "best" in label else 1)
    assert "least likely of the best twentieth" in out and "peak memory" in out


def test_gains_are_compared_at_equal_kl(capsys):
    """Two methods whose gains are 3 and 2 times the root of their KL, at budgets they missed."""
    figures = {f"{method} {nats}": {"kl_text": kl, "gain": scale * kl ** 0.5}
               for method, scale, kls in (("q", 3, (0.2, 0.9)), ("plain", 2, (0.36, 1.5)))
               for nats, kl in zip(("0.25", "1"), kls)}
    compare.show_equal_kl(figures, ["q", "plain"], ["0.25", "1.0"])
    _, _, ours, other, _ = capsys.readouterr().out.split("\n", 4)
    assert ours.split() == ["q", "1.500", "3.000"]
    assert other.split() == ["plain", "1.000", "(1.50x)", "2.000", "(1.50x)"]


def test_rollouts_are_kept_for_further_runs_and_fewer_of_them(tmp_path, capsys):
    few = ["--model", str(TOY), "--tokens", "8", "--samples", "20", "--kl", "0.1", "--methods", "q", "--device",
           "cpu"]
    tables, keep = [], ["--keep", str(tmp_path / "kept.pt")]
    for rollouts, where in (("60,120", keep), ("60,120", keep), ("120", keep), ("60", [])):
        compare.main([*few, "--rollouts", rollouts, *where, "--json", str(tmp_path / "c.json")])
        tables.append(json.loads((tmp_path / "c.json").read_text()))
    for label in ("q 0.1, 60 rollouts", "q 0.1, 120 rollouts"):
        assert tables[0][label]["texts"] == tables[1][label]["texts"]
    assert tables[2]["q 0.1"]["texts"] == tables[0]["q 0.1, 120 rollouts"]["texts"]
    assert tables[3]["q 0.1"]["texts"] == tables[0]["q 0.1, 60 rollouts"]["texts"]
    for other in (["--rollouts", "121"], ["--rollouts", "60", "--seed", "1"]):
        with pytest.raises(sample.InputError, match="other rollouts"):
            compare.main([*few, *other, *keep])
    (tmp_path / "foreign.safetensors").write_text("no rollouts")
    with pytest.raises(sample.InputError, match="other rollouts"):
        compare.main([*few, "--rollouts", "60", "--keep", str(tmp_path / "foreign.safetensors")])


def test_the_optimum_from_samples_is_the_exact_one(toy):
    """Texts re-weighted by exp(reward / beta) against dynamic programming over the grammar."""
    model, encoder, prompts, _, _, others = toy
    exact = Exact(model, encoder, prompts, others, TOKENS)
    rewards = torch.tensor(sentiment(sample.decode(encoder, sample.in_turn(prompts, 4000), others, 286)))
    tilted = Tilted(rewards, [i % 2 for i in range(4000)])
    for kl in (0.05, 0.1, 0.3, 0.5):
        assert tilted.best(kl) == pytest.approx(exact.best(kl), rel=0.03)


def test_fine_tuning_raises_the_reward_at_the_kl_it_reports(tmp_path, capsys):
    """DPO on the tiny model, written as a GPT-2 and compared; pairs are of one opening."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5, 1.0])                         # two openings in turn
    pairs = finetune.make_pairs(rewards, 2)
    assert all(rewards[a] > rewards[b] and a % 2 == b % 2 for a, b in pairs.tolist()) and len(pairs) == 1
    folder = str(tmp_path / "tuned")
    few = ["--model", str(TOY), "--tokens", "12", "--rollouts", "600", "--device", "cpu"]
    finetune.main([*few, "--rate", "1e-3", "--out", folder])
    compare.main([*few, "--samples", "200", "--kl", "0.1", "--methods", "draws", "--tuned", folder, "--json",
                  str(tmp_path / "c.json")])
    f = json.loads((tmp_path / "c.json").read_text())["tuned"]["figures"]
    assert f["gain"] > 5 * f["gain_error"] and 0.01 < f["kl_text"] < 3 and f["share"] < 1.1
    assert "122,560" in capsys.readouterr().out


def test_the_ablation_runs(capsys):
    ablate.main(["--model", str(TOY), "--tokens", "8", "--rollouts", "200", "--samples", "20", "--kl", "0.1",
                 "--device", "cpu"])
    out = capsys.readouterr().out
    for label in (*dict(ablate.TRAINED), *dict(ablate.ASCENDED), "slope loss, weight 1", "Q loss, gain 10",
                  "50 rollouts", "V alone foretells", "no imagined draws", "not white", "excitation 0.1"):
        assert re.search(rf"^{re.escape(label)} .*V's fit -?\d", out, re.M), label
