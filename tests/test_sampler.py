"""
The sampler against slow ways to the same: a full forward pass without a cache, each row alone, sets
of tokens found by brute force, KL by torch.distributions. On the tiny model of tests/toy.

    python -m pytest tests/test_sampler.py     what needs a GPU skips where there is none
"""
import contextlib
import copy
import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import sample
import train_value
from conftest import ROOT
from control import (Controller, Decoding, Guided, Reread, Sampler, ascend, draw, drawn_from, generate,
                     kl_ball, step_for_kl, truncate, uniform_table)
from model import GPT, InputError, read_config
from sample import decode, distinct, encode_prompts, mean_error
from test_value import random_net
from value import ValueNet, load_tokenizer

TOY = ROOT / "tests" / "toy"
EOS = 286
PROMPTS = ["the", "this music was very warm", "the plot seemed dull and", "this cast"] * 3
HOWS = {"plain": (Decoding(), False), "cool": (Decoding(0.7), False),
        "top": (Decoding(1, 12, 0.9), False), "controlled": (Decoding(), True),
        "controlled, top": (Decoding(0.8, 20, 0.95), True)}


@pytest.fixture(scope="module", params=["loaded", "packed"])
def model(request):
    model = GPT.from_pretrained(TOY)
    return model.pack() if request.param == "packed" else model


@pytest.fixture(scope="module")
def rows(model):
    return encode_prompts(model, load_tokenizer(TOY), PROMPTS, 12)[1]


def strong_control(max_kl=math.inf, radius=1.0):
    """Any V will do here; this one moves the state far enough to change most texts."""
    value = random_net(3, 64, 8).requires_grad_(False)
    return Controller(value, steps=2, step_size=10.0, radius=radius, max_kl=max_kl)


def rolled(model, rows, how="controlled", tokens=16, seed=1, control=None, **more):
    decoding, controlled = HOWS[how]
    control = control or (strong_control() if controlled else None)
    return generate(model, rows, uniform_table(len(rows), tokens, seed), decoding, control, **more)


def texts(rollout):
    return [row[real].tolist() for row, real in zip(rollout.tokens, rollout.mask)]


def full_states(model, rows, rollout):
    """For each row the uncontrolled states (L, n_embd) its tokens were drawn after, by one pass."""
    return [model(torch.tensor([row + tokens[:-1]]))[0, len(row) - 1:]
            for row, tokens in zip(rows, texts(rollout))]


def truncated(logits, decoding):
    """One row of logits, by brute force: rank the tokens, then keep them one at a time."""
    logits = logits / decoding.temperature
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    ranked = ranked[:decoding.top_k]
    probs, mass, kept = logits[ranked].softmax(-1).tolist(), 0.0, []
    for token, prob in zip(ranked, probs):
        if mass >= decoding.top_p < 1:
            break
        kept.append(token)
        mass += prob
    return torch.tensor([x if i in kept else -torch.inf for i, x in enumerate(logits.tolist())])


# -------------------------------------------------------------------------------- draw and truncate

TOP = 1 - 2.0 ** -24       # the largest float32 below 1


@pytest.mark.parametrize("probs, uniform, token", [
    ([0.25, 0.5, 0.25], 0.0, 0), ([0.25, 0.5, 0.25], 0.2499, 0), ([0.25, 0.5, 0.25], 0.25, 1),
    ([0.25, 0.5, 0.25], 0.7499, 1), ([0.25, 0.5, 0.25], 0.75, 2), ([0.25, 0.5, 0.25], TOP, 2),
    ([0.0, 0.0, 0.5, 0.5, 0.0], 0.0, 2), ([0.0, 0.0, 0.5, 0.5, 0.0], TOP, 3),
    ([0.5, 0.0, 0.5], 0.5, 2), ([0.0, 1.0, 0.0], 0.0, 1), ([0.0, 1.0, 0.0], TOP, 1),
    ([0.0, 0.1, 0.3, 0.0], TOP, 2), ([2.0, 6.0], 0.2499, 0), ([2.0, 6.0], 0.25, 1)])
def test_draw_by_hand(probs, uniform, token):
    assert draw(torch.tensor([probs]), torch.tensor([[uniform]])).tolist() == [token]


@pytest.mark.parametrize("n_vocab", [1, 40, 255, 256, 257, 512, 5000])
@pytest.mark.parametrize("kept", ["all", "top-k", "the ends", "one block", "spread over 1e-30"])
def test_draw_equals_the_plain_inverse_cdf(n_vocab, kept):
    """The CDF of the whole vocabulary in float64; float32 sums of the blocks may move its steps by 1e-6."""
    torch.manual_seed(n_vocab)
    logits = 3 * torch.randn(1, n_vocab)
    if kept == "top-k":
        logits = truncate(logits, Decoding(1.0, top_k=min(7, n_vocab)))
    elif kept == "the ends":
        logits[:, 1:-1] = -torch.inf
    elif kept == "one block":
        logits[:, :-300] = -torch.inf
    elif kept == "spread over 1e-30":
        logits *= 10
    probs = logits.softmax(-1)
    uniform = torch.cat([torch.rand(2000).sort().values, torch.tensor([0.0, TOP])])[:, None]
    token = draw(probs.expand(len(uniform), n_vocab), uniform)
    cdf = probs[0].double().cumsum(0)
    target = uniform[:, 0].double() * cdf[-1]
    assert (probs[0, token] > 0).all()
    assert (cdf[token] >= target - 1e-6).all() and (cdf[token] - probs[0, token] <= target + 1e-6).all()
    exact = torch.searchsorted(cdf, target, right=True)
    assert (token == exact).float().mean() > 0.998
    assert (token[:2000].diff() >= 0).all() and token[-2] == probs[0].nonzero()[0]


def test_no_uniform_draws_a_token_without_probability():
    torch.manual_seed(0)
    logits = 3 * torch.randn(500, 1000)
    logits[:, :100] = logits[:, -100:] = logits[:, 400:500] = -torch.inf
    probs = logits.softmax(-1)
    for uniform in (0.0, 0.5, TOP):
        token = draw(probs, torch.full((500, 1), uniform))
        assert (probs.gather(1, token[:, None]) > 0).all()


def test_frequencies_on_a_grid_are_the_probabilities():
    probs = torch.tensor([0.5, 0.0, 0.125, 0.25, 0.0625, 0.0625, 0.0])
    grid = (torch.arange(1024)[:, None] + 0.5) / 1024
    counts = draw(probs.expand(1024, 7), grid).bincount(minlength=7)
    assert counts.tolist() == (1024 * probs).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k, top_p", [(None, 1.0), (1, 1.0), (5, 1.0), (40, 1.0), (None, 0.9),
                                          (None, 0.5), (None, 1e-6), (20, 0.8), (3, 0.99)])
def test_truncate_equals_brute_force(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits, decoding = 2 * torch.randn(20, 40), Decoding(temperature, top_k, top_p)
    expected = torch.stack([truncated(row, decoding) for row in logits])
    assert torch.allclose(truncate(logits, decoding), expected, rtol=1e-6)


# ----------------------------------------------------------------------------- texts and their ends

def test_radius_0_is_plain_sampling_bit_by_bit(model, rows):
    still = rolled(model, rows, control=strong_control(radius=0.0), record=True)
    plain = rolled(model, rows, "plain", record=True)
    for name in ("tokens", "mask", "logp", "kl", "hidden", "psi"):
        assert torch.equal(getattr(still, name), getattr(plain, name)), name
    assert texts(rolled(model, rows)) != texts(plain)         # at radius 1 it is not


@pytest.mark.parametrize("how", HOWS)
def test_what_is_not_reported_changes_no_text(model, rows, how):
    whole, bare = rolled(model, rows, how, record=True), rolled(model, rows, how, record=True, report=False)
    for name in ("tokens", "mask", "logq", "hidden", "psi"):
        assert torch.equal(getattr(bare, name), getattr(whole, name)), name
    for name in ("kl", "logp", "before", "after"):
        assert getattr(bare, name).isnan().all(), name


@pytest.mark.parametrize("net", ["plain", "lift", "sum", "excited"])
@pytest.mark.parametrize("temperature, max_kl", [(1.0, math.inf), (0.7, 0.05)])
def test_what_u_adds_to_the_logits(model, net, temperature, max_kl):
    """delta is found without the head, in the span of V's input weights: against the definition W u / T."""
    value, other = random_net(3, 64, 8).requires_grad_(False), random_net(4, 64, 5).requires_grad_(False)
    if net in ("lift", "sum"):
        value.lift = random_net(5, 64, 8).requires_grad_(False)
        value.lift.mean, value.lift.std = value.mean, value.std
    if net == "sum":
        value = ValueNet.sum([value, other], [0.7, -0.2])
    control = Controller(value, steps=3, step_size=3.0, radius=0.8, max_kl=max_kl,
                         excitation=0.5 * (net == "excited"))
    sampler = Sampler(model, 6, 8, 4, Decoding(temperature), control)
    h = value.mean + 2 * value.std * torch.randn(6, 64)
    kept = model.unembed(h) / temperature
    torch.manual_seed(0)
    u, delta = sampler.steer(h, kept)
    torch.manual_seed(0)
    whole = control(h)
    expected = whole @ model.wte.weight.T / temperature
    scale = (delta * expected).sum(1, keepdim=True) / expected.square().sum(1, keepdim=True)
    budget = kl_ball(kept, expected, max_kl)[:, None] if max_kl < math.inf else torch.ones(6, 1)
    assert torch.allclose(u, scale * whole, atol=1e-5)
    assert torch.allclose(delta, scale * expected, atol=1e-4) and delta.abs().max() > 0.1
    # Rounding moves kl_ball's answer within its 2% of KL, and only where it cuts.
    assert torch.allclose(scale, budget, rtol=0.01 if max_kl < math.inf else 1e-5)


def test_a_controller_of_ones_own_is_the_one_that_steers(model, rows):
    """Though V has fewer units than the state has numbers: W u could be found without asking for u."""
    class Idle(Controller):
        def __call__(self, hidden):
            return torch.zeros_like(hidden)

    idle, plain = (rolled(model, rows, control=control) for control in
                   (Idle(strong_control().value, step_size=10.0), replace(strong_control(), step_size=0.0)))
    assert texts(idle) == texts(plain) != texts(rolled(model, rows)) and idle.kl[idle.mask].abs().max() < 1e-5


def test_candidates_share_the_opening_of_their_text(model, rows):
    """However many texts are asked for, three of two openings for one."""
    encoder, seen = load_tokenizer(TOY), []
    sample.roll_out(model, encoder, lambda texts: seen.extend(texts) or [0.0] * len(texts), rows[:2], 3, 4, 1,
                    best_of=2, by="reward")
    assert [text.startswith(PROMPTS[1]) for text in seen] == [False, True, False] * 2


def test_psi_in_bfloat16(rows):
    """One product in the model's dtype: psi to a percent, like the states themselves."""
    model = GPT.from_pretrained(TOY, dtype=torch.bfloat16)
    rollout, W = rolled(model, rows, "plain", record=True), model.wte.weight.double()
    real = rollout.mask
    probs = (rollout.hidden[real].to(torch.bfloat16) @ model.wte.weight.T).double().softmax(-1)
    exact = W[rollout.tokens[real]] - probs @ W
    assert (rollout.psi[real] - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("how", HOWS)
def test_a_batch_equals_its_rows_one_by_one(model, rows, how):
    together, control = rolled(model, rows, how, record=True), HOWS[how][1]
    for batch in (1, 5):
        alone = rolled(model, rows, how, record=True, batch=batch)
        assert texts(alone) == texts(together)
        mask = together.mask
        assert torch.allclose(alone.hidden[mask], together.hidden[mask], atol=1e-4)
        assert torch.allclose(alone.kl[mask], together.kl[mask], atol=1e-4)
    assert control == (together.kl[mask].max() > 0.1)


def test_the_seed_makes_the_text(model, rows):
    assert texts(rolled(model, rows)) == texts(rolled(model, rows))
    assert texts(rolled(model, rows)) != texts(rolled(model, rows, seed=2))
    assert torch.equal(uniform_table(3, 5, 7), uniform_table(3, 5, 7))
    table = uniform_table(400, 50, 0)
    assert 0 <= table.min() and table.max() < 1 and abs(table.mean() - 0.5) < 0.01


@pytest.mark.parametrize("tokens", [1, 11])
def test_a_text_ends_with_its_first_end_of_text(model, rows, tokens):
    rollout, encoder = rolled(model, rows, "plain", tokens=tokens), load_tokenizer(TOY)
    ended = 0
    for row, mask in zip(rollout.tokens.tolist(), rollout.mask):
        length = row.index(EOS) + 1 if EOS in row else tokens
        ended += EOS in row
        assert mask.tolist() == [True] * length + [False] * (tokens - length)
    assert (0 < ended < len(rows)) == (tokens == 11)
    for prompt, text, whole in zip(PROMPTS, texts(rollout), decode(encoder, rows, rollout, EOS)):
        assert whole == prompt + encoder.decode([t for t in text if t != EOS])


def test_texts_do_not_depend_on_the_cut(model, rows):
    short, long = (rolled(model, rows, "plain") for _ in range(2))
    uniforms = uniform_table(len(rows), 16, 1)
    short = generate(model, rows, uniforms[:, :6])
    assert [text[:6] for text in texts(long)] == texts(short)


def test_what_does_not_fit_is_refused(model, rows):
    for prompts in ([], rows[:2]):
        with pytest.raises(ValueError, match="3 rows of uniforms"):
            generate(model, prompts, uniform_table(3, 4, 0))
    with pytest.raises(InputError, match="context of 64"):
        generate(model, rows, torch.rand(len(rows), 64))
    assert generate(model, [rows[0]], torch.rand(1, 62)).tokens.shape == (1, 62)


# --------------------------------------------------------------------------------- what is recorded

@pytest.mark.parametrize("how", HOWS)
def test_recorded_figures_equal_a_full_pass(model, rows, how):
    decoding, control = HOWS[how][0], strong_control() if HOWS[how][1] else None
    rollout, uniforms = rolled(model, rows, how, record=True), uniform_table(len(rows), 16, 1)
    W = model.wte.weight
    for i, (h, tokens) in enumerate(zip(full_states(model, rows, rollout), texts(rollout))):
        steps, y = range(len(tokens)), torch.tensor(tokens)
        u = control(h) if control else torch.zeros_like(h)
        kept = torch.stack([truncated(W @ state, decoding) for state in h])  # (L, n_vocab)
        p = Categorical(logits=kept.double())
        q = Categorical(logits=(kept + u @ W.T / decoding.temperature).double())
        assert torch.allclose(rollout.hidden[i, steps], h, atol=1e-4)
        assert torch.allclose(rollout.psi[i, steps], W[y] - q.probs.float() @ W, atol=1e-4)
        assert torch.equal(draw(q.probs, uniforms[i, :len(tokens), None]), y)
        assert torch.allclose(rollout.kl[i, steps].double(), reference_kl(q, p), atol=1e-4)
        logp = (h @ W.T).log_softmax(-1)[steps, y]            # at temperature 1, whatever was kept
        assert torch.allclose(rollout.logp[i, steps], logp, atol=1e-4)
        assert torch.allclose(rollout.logq[i, steps].double(), q.log_prob(y), atol=1e-4)
        if control:
            assert torch.allclose(rollout.before[i, steps], control.value(h), atol=1e-4)
            worth = control.value.worth(h, (q.probs - p.probs).float() @ W)                      # E_q[psi]
            assert torch.allclose(rollout.after[i, steps], control.value(h) + worth, atol=1e-3)


@pytest.mark.parametrize("how", ["plain", "controlled"])
def test_states_read_again_are_those_recorded(model, rows, how):
    """Prompts of several lengths, rows out of order; psi under the control that drew."""
    kept = rolled(model, rows, how, record=True)
    again = Reread(rolled(model, rows, how), model, rows, strong_control() if HOWS[how][1] else None)
    order = torch.tensor([11, 0, 1, 5])
    hidden, psi = again.draws(order)
    real = kept.mask[order]
    assert again.hidden.numel() == 0 and torch.equal(again.mask, kept.mask)
    for got, recorded in ((again.states(order), kept.hidden), (hidden, kept.hidden), (psi, kept.psi)):
        assert torch.allclose(got[real], recorded[order][real], atol=1e-4)
    whole = drawn_from(model, rows, kept.tokens, batch=40)     # two texts at a time
    assert torch.allclose(whole[kept.mask], kept.hidden[kept.mask], atol=1e-4)
    assert (psi[real].norm() > 1) and torch.equal(torch.cat(again.few(5)), torch.arange(12))


@pytest.mark.parametrize("width", [5, 80])
def test_after_is_the_expected_q(model, rows, width):
    """With a lift, narrower and wider than a state: V from one net, the worth of the draw from the other."""
    value = random_net(3, 64, 7).requires_grad_(False)
    value.lift = random_net(4, 64, width).requires_grad_(False)
    value.lift.mean, value.lift.std = value.mean, value.std
    control = Controller(value, steps=3, step_size=10.0, radius=100.0, max_kl=0.05)
    rollout = rolled(model, rows, control=control, record=True)
    h, W = rollout.hidden[rollout.mask], model.wte.weight
    kept, delta = h @ W.T, control(h) @ W.T
    q = (kept + kl_ball(kept, delta, 0.05)[:, None] * delta).softmax(-1)
    expected = value(h) + value.worth(h, (q - kept.softmax(-1)) @ W)
    assert (expected - value(h)).abs().max() > 0.01
    assert torch.allclose(rollout.after[rollout.mask], expected, atol=2e-3)


@pytest.mark.parametrize("how", ["controlled", "controlled, top"])
@pytest.mark.parametrize("sign", [1, -1])
def test_control_ends_at_the_target(model, rows, how, sign):
    """Where more could be had: there E[Q] is the target; where V is beyond it, nothing is done."""
    control = strong_control(radius=100.0)
    control.steps, control.step_size = 1, sign * control.step_size
    free = rolled(model, rows, how, control=control)
    before, after = free.before[:, 0], free.after[:, 0]        # of the prompts: the same under any control
    assert (sign * (after - before) > 0).all()
    middle = (before + after) / 2
    control.target = target = middle[(sign * (after - before)).argmax()].item()
    rollout = rolled(model, rows, how, control=control)
    beyond, short = sign * (before - target) >= 0, sign * (target - after) >= 0
    assert torch.equal(rollout.before[:, 0], before) and (rollout.kl[:, 0][beyond].abs() < 1e-5).all()
    assert torch.allclose(rollout.after[:, 0][short], after[short], atol=1e-4)
    held = ~beyond & ~short
    assert held.any() and (beyond | short).any()
    assert torch.allclose(rollout.after[:, 0][held], torch.tensor(target), atol=2e-3)


@pytest.mark.parametrize("how", ["controlled", "controlled, top"])
@pytest.mark.parametrize("max_kl", [0.003, 0.1])
def test_every_step_keeps_the_budget(model, rows, how, max_kl):
    free = rolled(model, rows, how)
    assert free.kl[free.mask].max() > 2 * max_kl
    rollout = rolled(model, rows, how, control=strong_control(max_kl), record=True)
    decoding, kls = HOWS[how][0], []
    for i, h in enumerate(full_states(model, rows, rollout)):
        kept = torch.stack([truncated(model.unembed(state), decoding) for state in h])
        moved = model.unembed(strong_control()(h)) / decoding.temperature
        moved = kl_ball(kept, moved, max_kl)[:, None] * moved
        kls.append(reference_kl(*(Categorical(logits=x.double()) for x in (kept + moved, kept))))
    kls = torch.cat(kls)
    assert kls.max() <= 1.005 * max_kl and kls.max() >= 0.97 * max_kl       # states differ by 1e-6
    assert torch.allclose(rollout.kl[rollout.mask].double(), kls, atol=1e-5, rtol=0.01)


@pytest.mark.parametrize("nats", [0.001, 0.02])
def test_the_step_for_a_kl_costs_that_kl(model, rows, nats):
    rollout = rolled(model, 50 * rows, "plain", record=True)
    control = strong_control(radius=100.0)
    control.steps = 1
    control.step_size = step_for_kl(model, control, rollout, nats)
    cost = rolled(model, 50 * rows, control=control)
    assert ((cost.kl * cost.mask).sum(1).mean() / nats - 1).abs() < 0.15     # 600 texts


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guided_decoding_against_whole_texts(model, rows, scale):
    """Each candidate's state from a full forward pass over the text that it would make."""
    value, k = random_net(0, 64, 5).requires_grad_(False), 6
    rollout = rolled(model, rows, control=Guided(value, scale, k))
    for row, drawn, kl, after in zip(rows, texts(rollout), rollout.kl, rollout.after):
        for t in range(len(drawn)):
            text = row + drawn[:t]
            h = model(torch.tensor([text]))[0, -1]
            p = model.unembed(h).softmax(-1)
            best = p.topk(k).indices.tolist()
            q, gains = p.clone(), torch.zeros_like(p)
            for y in set(best) - {EOS}:
                gains[y] = value(model(torch.tensor([text + [y]]))[0, -1]) - value(h)
                q[y] *= (scale * gains[y]).exp()
            q /= q.sum()
            assert after[t] == pytest.approx((value(h) + (q - p) @ gains).item(), abs=1e-4)
            assert kl[t] == pytest.approx((q * (q / p).log()).sum().item(), abs=1e-4)
        assert (kl.sum() > 1e-3) == (scale > 0)


@pytest.mark.parametrize("controlled", [False, True])
def test_temperature_0_is_the_argmax_loop(model, rows, controlled):
    control = strong_control() if controlled else None
    rollout = generate(model, rows, torch.rand(len(rows), 16), Decoding(0.0), control)
    for row, drawn in zip(rows, texts(rollout)):
        text = list(row)
        while len(text) < len(row) + 16 and (len(text) == len(row) or text[-1] != EOS):
            h = model(torch.tensor([text]))[:, -1]
            text.append(model.unembed(h + control(h) if control else h).argmax().item())
        assert text == row + drawn


# ----------------------------------------------------------------------------------- spans of the cache

@pytest.mark.parametrize("how", HOWS)
def test_graphs_of_longer_spans_draw_the_same(model, rows, how, monkeypatch):
    """Which graph a GPU replays, and what making one leaves behind, with graphs that take the eager step."""
    replays = []

    class Graph:
        def replay(self):
            replays.append((sampler.cache.lengths.max().item(), self.span))
            sampler.cache.span = self.span - 1                 # as when it was recorded
            sampler.step()

    @contextlib.contextmanager
    def recording(graph, pool, stream):
        buffers = [sampler.t, sampler.alive, sampler.hidden, sampler.cache.lengths]
        buffers += vars(sampler.out).values()
        before = [buffer.clone() for buffer in buffers]
        yield
        graph.span = sampler.cache.span
        for buffer, was in zip(buffers, before):               # recording runs nothing
            buffer.copy_(was)

    rows, uniforms = [*rows, 20 * rows[0]], uniform_table(13, 14, 1)              # the last of 40 tokens
    control = strong_control() if HOWS[how][1] else None
    sampler = Sampler(model, 13, 54, 14, HOWS[how][0], control, record=True)
    expected = copy.deepcopy(sampler.run(rows, uniforms))
    sampler.graphs, sampler.grain, sampler.pool, sampler.stream = {}, 8, None, Mock()
    for name, stand_in in {"CUDAGraph": Graph, "graph": recording, "current_stream": Mock(),
                           "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for _ in range(2):                                         # the second time no graph is made
        drawn = sampler.run(rows, uniforms)
        assert texts(drawn) == texts(expected)
        mask = expected.mask
        assert torch.allclose(drawn.hidden[mask], expected.hidden[mask], atol=1e-4)
        assert torch.allclose(drawn.kl[mask], expected.kl[mask], atol=1e-4)
        assert all(live < span <= live + 8 for live, span in replays)
    assert list(sampler.graphs) == [48, 54] and len(replays) == 2 * 14


# ------------------------------------------------------------------------------------------ figures

def test_mean_error_by_hand():
    assert mean_error([1, 2, 3, 6]) == pytest.approx((3, math.sqrt(14 / 3 / 4)))
    # Residuals -2 -1 0 3; of two clusters -3 and 3: sqrt(9 + 9) / 4 * sqrt(2 / 1).
    assert mean_error([1, 2, 3, 6], [0, 0, 1, 1]) == pytest.approx((3, 1.5))
    assert mean_error([1, 2, 3, 6], [5, 5, 2, 2]) == pytest.approx((3, 1.5))
    assert mean_error([1, 1, 3, 3, 8, 8], [0, 0, 1, 1, 2, 2])[1] == pytest.approx(
        mean_error([1, 3, 8])[1])              # copies of a text say nothing new
    for alone in (mean_error([2.0]), mean_error([1.0, 3.0], [0, 0])):
        assert alone[0] == 2 and math.isnan(alone[1])


def test_distinct_by_hand(model, rows):
    rollout = rolled(model, rows[:2], "plain", tokens=4)
    rollout.tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 9, 9]])
    rollout.mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert distinct(rollout, 1) == pytest.approx(2 / 6)
    assert distinct(rollout, 2) == pytest.approx(2 / 4)       # 12 21 12, 12
    assert distinct(rollout, 3) == pytest.approx(2 / 2)


# --------------------------------------------------------------------------------------- the benchmark

def test_what_is_compared_is_the_same():
    value = random_net(3, 64, 8).requires_grad_(False)
    value.std.fill_(1)                                         # the paper's coordinates are h's own
    hidden = torch.randn(20, 64)
    u = ascend(value, hidden, 5, 0.3, math.inf)
    assert torch.allclose(bench.Paper(value, 5, 0.3)(hidden), u, atol=1e-5) and u.abs().max() > 0.1
    pytest.importorskip("transformers")
    model = bench.random_model("tiny", torch.device("cpu"), torch.float32)
    tokens = torch.arange(40).view(2, 20)
    logits = bench.transformers_model(model)(tokens).logits
    assert torch.allclose(logits, model.unembed(model(tokens)), atol=1e-5) and logits.std() > 0.1


def test_the_benchmark_runs(capsys):
    bench.main(["--model", "tiny", "--device", "cpu", "--batches", "1,2", "--tokens", "4", "--rounds", "1"])
    table = capsys.readouterr().out
    for row in ("plain", "control", "30 steps", "KL reported", "kl_ball", "paper"):
        assert table.count(f"\n{row} ") == 2
    assert table.count(" 1.00 ") >= 2
    for wrong in (["--batches", "1,x"], ["--batches", "0"], ["--device", "nonsense"]):
        with pytest.raises(InputError, match=wrong[0]):
            bench.main([*wrong, "--model", "tiny"])


# --------------------------------------------------------------------------------------------- CUDA

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OnOneDevice(TorchDispatchMode):
    """Fails at an operation that takes from, or puts on, another device than meta."""

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        result = operation(*arguments, **(more or {}))
        for x in tree_leaves((arguments, more, result)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, operation
        return result


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0.7, 12, 0.9), Decoding(0)], ids=["1", "0.7", "0"])
@pytest.mark.parametrize("kind", ["none", "steps", "wide", "no lift", "balls", "excited", "guided"])
def test_a_step_stays_on_its_device(kind, decoding, report):
    """What a CUDA graph asks for, shown without a GPU: the meta device has shapes, but no numbers to read."""
    with torch.device("meta"):
        model, width = GPT(read_config(TOY)).eval().requires_grad_(False), 80 if kind == "wide" else 8
        value = ValueNet(64, width, 0 if kind == "no lift" else width).requires_grad_(False)
    control = {"none": None, "balls": Controller(value, max_kl=0.1, target=0.3), "guided": Guided(value),
               "excited": Controller(value, excitation=0.3)}.get(kind, Controller(value, steps=3))
    sampler = Sampler(model, 4, 32, 16, decoding, control, record=True, report=report)
    with OnOneDevice(), torch.no_grad():
        sampler.step()
    for mistake, error, what in (
            (lambda hidden: hidden * (2 if hidden.sum() > 0 else 1), RuntimeError, "meta tensors"),   # a read
            (lambda hidden: hidden + torch.ones(()), AssertionError, "aten")):        # a number from the host
        model.ln_f.forward = mistake
        with OnOneDevice(), torch.no_grad(), pytest.raises(error, match=what):
            sampler.step()


@CUDA
@pytest.mark.parametrize("grain", [8, 64])
@pytest.mark.parametrize("how", HOWS)
def test_cuda_graph_draws_the_cpu_s_tokens(model, rows, how, grain, monkeypatch):
    monkeypatch.setattr(Sampler, "grain", grain)               # 8: several graphs, of one pool
    on_gpu, control = GPT.from_pretrained(TOY, "cuda"), None
    if HOWS[how][1]:
        control = strong_control()
        control.value.to("cuda")
    expected = rolled(model, rows, how, record=True)
    for batch in (256, 5):                     # 5: graphs of two shapes, one of them replayed twice
        drawn = rolled(on_gpu, rows, how, control=control, record=True, batch=batch)
        assert texts(drawn) == texts(expected)
        mask = expected.mask
        assert (drawn.kl.cpu() - expected.kl)[mask].abs().max() < 1e-3
        assert (drawn.hidden.cpu() - expected.hidden)[mask].abs().max() < 1e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["budget", "target", "wide", "excited", "guided", "not reported"])
def test_a_captured_step_is_the_eager_step(rows, kind, dtype, device, monkeypatch):
    """Texts twice from one sampler, then once more without graphs; on a CPU there are none."""
    monkeypatch.setattr(Sampler, "grain", 8)
    model, n = GPT.from_pretrained(TOY, device, dtype), len(rows)
    value = random_net(3, 64, 80 if kind == "wide" else 8).requires_grad_(False).to(device)
    control = Controller(value, steps=2, step_size=10.0)
    control = {"guided": Guided(value, 3.0, 6), "target": replace(control, target=0.3),
               "excited": Controller(value, excitation=0.3),
               "budget": replace(control, max_kl=0.1)}.get(kind, control)
    sampler = Sampler(model, n, max(map(len, rows)) + 16, 16, Decoding(), control, record=True,
                      report=kind != "not reported")
    assert (sampler.graphs is None) == (device == "cpu")
    captured, again = (copy.deepcopy(sampler.run(rows, uniform_table(n, 16, 1))) for _ in range(2))
    sampler.graphs = None
    eager = sampler.run(rows, uniform_table(n, 16, 1))
    other = rolled(model, rows, "plain", seed=2)
    for drawn, alike in ((captured, 0.8), (again, 0.8), (other, 0.0)):
        same = (drawn.tokens == eager.tokens)[eager.mask].float().mean()
        if kind != "excited":                                  # whose random controls are others every time
            assert same == 1 if alike and dtype == torch.float32 else same > alike
    assert same < 0.8 and (captured.hidden[captured.mask].float().norm(dim=-1) > 1).all()
    assert kind in ("excited", "not reported") or eager.kl[eager.mask].max() > 1e-3


@CUDA
def test_both_scripts_run_on_cuda(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--model", str(TOY), "--device", "cuda", "--tokens", "8"]
    for more in ([], ["--dtype", "bfloat16", "--excitation", "0.1", "--rounds", "2"],
                 ["--batch", "64", "--max-memory", "0.0007"]):
        train_value.main([*small, "--rollouts", "64", "--held-out", "32", *more])
        sample.main([*small, "--samples", "20"])
        table = capsys.readouterr().out
        assert "controlled" in table and ("read again" in table) == ("--max-memory" in more)
