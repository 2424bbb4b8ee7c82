"""The evidence: its arithmetic, README's table against the records, and that its commands run."""
import functools
import json
import math

import pytest
import torch

import sample
import train_value
from control import ascend, generate, uniform_table
from model import in_turn, load, read_prompts
from tests.evidence import all as everything
from tests.evidence import baselines, chart, compare, eff, front, published, records, trace
from tests.evidence.exact import Oracle
from tests.evidence.methods import METHODS
from value import ValueNet

ROOT = compare.ROOT
TOY = train_value.TOY


@pytest.fixture(scope="module")
def rolled():
    """Texts of the tiny language: model, tokenizer, prompts, a Rollout with states"""
    model, tokenizer = load(TOY)
    prompts = in_turn(read_prompts(model, tokenizer, TOY), 400, 1)
    return model, tokenizer, prompts, generate(model, prompts, uniform_table(400, 32, 1), record=True)


def test_readme_shows_the_records():
    """Numbers in README's table that no record has"""
    table = records.readme_table()
    if not any("`q`" in line for line in table):
        pytest.skip("no records in tests/evidence/records")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for line in table:
        assert line in readme


def test_table_cells():
    optimum = [[0.0, 0.1, 0.4], [0.0, 0.4, 0.8]]
    points = [{"nats": 0.3, "kl": 0.25, "gain": 0.3}, {"nats": 0.3, "kl": 0.1, "gain": 0.3}]
    assert records.share(optimum, points) == pytest.approx(62.5)        # of 1/2 and 3/4
    one_g = {"method": "one-g", "points": [{"nats": 1.0, "kl": 1.0, "gain": 0.2}]}
    assert records.over_one_g([one_g], [{"kl": 0.25, "gain": 0.2}]) == "2.00"
    one_g["points"].append({"nats": 4.0, "kl": 2.0, "gain": 0.4})       # from here on as KL itself
    assert records.over_one_g([one_g], [{"kl": 1.5, "gain": 0.3}]) == "1.00"
    assert records.over_one_g([one_g], [{"kl": 3.0, "gain": 0.3}]) == "0.50"


def test_best_of_kl():
    rewards = torch.arange(1000.0)
    for n in (2, 5):
        assert abs(baselines.best_of_kl(rewards, n) - (math.log(n) - (n - 1) / n)) < 0.01
    assert baselines.best_of_kl(torch.ones(10), 5) == 0
    half = torch.tensor([0.0, 1.0])                     # the better of two: 1/4 and 3/4 of the texts
    assert abs(baselines.best_of_kl(half, 2) - (0.25 * math.log(0.5) + 0.75 * math.log(1.5))) < 1e-12


class Costs:
    """What texts of a size cost, as size_for_kl reads it"""

    def __init__(self, kl):
        self.kl, self.mask = torch.tensor([[kl]]), torch.tensor([[True]])


@pytest.mark.parametrize("rate, power", [(10, 1), (2, 1), (0.01, 1), (5, 1.2), (0.3, 2), (1e-3, 2)])
def test_size_for_kl_finds_the_size(rate, power):
    """From 1, be that far too large or too small"""
    size = baselines.size_for_kl(lambda size: Costs(rate * size ** power), 0.3)
    assert abs(rate * size ** power - 0.3) < 0.016


def test_g_of_a_sum_of_rewards_is_the_sum(rolled):
    """
    tests/evidence/README.md, More than one reward. On one hidden layer the slope of bellman_loss is a
    sum of a part linear in the rewards, and one that knows only of the heads: so the heads where it is
    0 are linear in the rewards.
    """
    torch.manual_seed(1)
    rollout = rolled[3]
    hidden, mask = rollout.hidden[:50], rollout.mask[:50]
    draws = torch.randn(hidden.shape)
    rewards, other = torch.randn(2, *mask.shape)

    def slope(rewards, heads):
        torch.manual_seed(0)
        value = ValueNet(64, width=6, reads_so_far=False)
        parameters = [*value.value_head.parameters(), *value.gradient_head.parameters()]
        torch.nn.utils.vector_to_parameters(heads, parameters)
        loss = train_value.bellman_loss(value, hidden, None, draws, rewards, mask, 0.8)
        return torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))
    zero, heads = torch.zeros(6 + 1 + 6 * 64), torch.randn(6 + 1 + 6 * 64)
    both = slope(rewards - 0.5 * other, zero)
    torch.testing.assert_close(both, slope(rewards, zero) - 0.5 * slope(other, zero))
    of_heads = slope(rewards, heads) - slope(rewards, zero)
    torch.testing.assert_close(of_heads, slope(other, heads) - slope(other, zero), rtol=1e-4, atol=1e-5)


def test_every_direction_fits_the_reward_of_unseen_texts(monkeypatch, capsys):
    """Of the third language, where all of them help: none has a wrong sign"""
    monkeypatch.setattr(compare, "EXACT", 200)
    eff.main(["--task", "late", "--rollouts", "500", "--samples", "200", "--lm-steer", "1e-3",
              "--rad-q", "1e-2"])
    found = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(found) == 6
    for name in found:
        assert float(found[name]) > (0.15 if name == "static" else 0.5)


def test_control_by_a_sum_of_nets_is_the_sum_of_controls():
    torch.manual_seed(0)
    nets = [ValueNet(8).requires_grad_(False) for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(net.gradient_head.weight, std=0.01)
    h = torch.randn(5, 8)
    u = ascend(front.Sum(nets, (1.0, -0.5)), h, step_size=2.0)
    torch.testing.assert_close(u, ascend(nets[0], h, step_size=2.0) - ascend(nets[1], h, step_size=1.0))


def test_front_of_two_rewards(tmp_path, monkeypatch, capsys):
    """At 0 and 90 degrees the sum is one of the two nets, so both columns of the table agree"""
    for name, small in dict(ANGLES=(0, 90), ROLLOUTS=100, SAMPLES=40, FEW=20, TOKENS=8).items():
        monkeypatch.setattr(front, name, small)
    front.main([str(tmp_path / "front.svg"), "--seeds", "1"])
    for line in capsys.readouterr().out.splitlines()[-2:]:
        one, other = line.split("@")[:2]
        assert one.split()[1:] == other.split()[1:]
    assert "gain in words" in (tmp_path / "front.svg").read_text()


def test_look_ahead_leaves_the_cache_as_it_was(rolled):
    """Size 0 draws the uncontrolled texts, though the model ran for every candidate"""
    model, _, prompts, rollout = rolled

    def sampler(*settings):
        return baselines.LookAhead(*settings, value=ValueNet(64, reads_so_far=False), size=0.0,
                                   candidates=3)
    texts = generate(model, prompts[:20], uniform_table(20, 32, 1), make_sampler=sampler)
    assert torch.equal(texts.tokens[texts.mask], rollout.tokens[:20][rollout.mask[:20]])


def test_oracle_is_control_by_the_exact_mean_value(monkeypatch):
    """On these languages any Q is linear in W[y]: at its KL the oracle gains what exact.py foretells"""
    monkeypatch.setattr(compare, "EXACT", 300)
    task = compare.Task(compare.parse_args(["--task", "late", "--samples", "128"]))
    task.report_on(1)
    sampler = functools.partial(Oracle, exact=task.exact, size=1.0)
    point = task.measure(None, task.draw(task.test, 128, task.seed, make_sampler=sampler))
    assert abs(point["gain"] - task.exact.best_of_mean_value(point["kl"])) < 3 * point["error"]


def test_every_method_learns_and_controls(tmp_path, monkeypatch, capsys):
    """All rows on a few texts, then a second run that finds all done, then the pictures"""
    path = tmp_path / "late.jsonl"
    monkeypatch.setitem(compare.TASKS["late"], "budgets", (0.3,))
    monkeypatch.setitem(compare.TASKS["late"], "best_of", (2,))
    monkeypatch.setattr(baselines, "size_for_kl", lambda texts_at, nats: 1.0)
    monkeypatch.setattr(compare, "EXACT", 400)
    arguments = ["--task", "late", "--seeds", "1", "--samples", "40", "--rollouts", "120",
                 "--json", str(path), "--cache", str(tmp_path)]
    compare.main(arguments)
    free, lines = records.read(path)
    assert [line["method"] for line in lines] == list(METHODS)
    assert lines[0]["row"]["fit"] == "q" and lines[0]["constants"]["RIDGE"] == train_value.RIDGE
    before = path.read_text()
    printed = capsys.readouterr().out
    compare.main(arguments)
    assert path.read_text() == before and capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="samples"):
        compare.main([*arguments, "--samples", "41"])
    chart.main([str(path), str(tmp_path / "f.svg"), "--shown", "gain,perplexity"])
    assert "optimum" in (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert json.loads(before.splitlines()[0])["method"] == "none"


def test_steps_of_everything_name_what_there_is():
    """all.py runs for hours: a mistyped method or option in its last step would be found late"""
    commands = [command.split() for _, *step in everything.STEPS.values() for command in step]
    compared = [words[1:] for words in commands if words[0] == "tests.evidence.compare"]
    assert len(compared) == 8
    for words in compared:
        assert set(compare.parse_args(words).methods.split(",")) <= set(METHODS)
    for name in {words[0] for words in commands}:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()


def test_published_commands_run(tmp_path, capsys):
    """PUBLISHED.md's commands, on the tiny model; and the picture of a trace"""
    net = str(tmp_path / "net.pt")
    train_value.main(["--rollouts", "600", "--out", net])
    published.main(["--value", net, "--prompts", f"{TOY}/prompts.txt", "--scorer", TOY, "--judge",
                    "sentiment", "--strength", "0,2", "--each", "5"])
    assert "dist-3" in capsys.readouterr().out
    sample.main(["--value", net, "--top-p", "0.9", "--samples", "20"])
    chosen = trace.choose(trace.traces(net))
    picture = trace.picture(chosen)
    assert "without control" in picture and "nats" in picture
