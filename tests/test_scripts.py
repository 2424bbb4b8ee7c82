"""
The two scripts as a user runs them: the main job, bad input in one line, what is shown and drawn.
"""
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT

import sample
import train_value
from model import InputError, load
from value import ValueNet

TOY = ROOT / "tests" / "toy"


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A value net of few rollouts."""
    path = tmp_path_factory.mktemp("net") / "value.pt"
    train_value.main(["--rollouts", "600", "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def default_net(tmp_path_factory):
    """What the README's first command trains."""
    path = tmp_path_factory.mktemp("default") / "value.pt"
    train_value.main(["--out", str(path)])
    return path


def run(script, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=100)


def test_the_main_job_from_any_folder(tmp_path):
    """From another folder the default model is found beside the scripts, the net where one is."""
    trained = run("train_value.py", "--rollouts", "400", cwd=tmp_path)
    assert trained.returncode == 0 and trained.stderr == "", trained.stderr
    assert re.search(r"R\^2 of V .*-?\d\.\d{3}", trained.stdout)
    drawn = run("sample.py", "--samples", "300", cwd=tmp_path)
    assert drawn.returncode == 0 and drawn.stderr == "", drawn.stderr
    assert float(re.search(r"gain ([+-]\S+)", drawn.stdout)[1]) > 0.2
    assert "\033" not in drawn.stdout and max(map(len, drawn.stdout.splitlines())) <= 100
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "value.pt"]


BAD = [(["train_value.py", "--model", "nowhere"], "no config.json there"),
       (["train_value.py", "--prompts", "absent.txt"], "absent.txt: cannot be read"),
       (["train_value.py", "--prompts", "empty.txt"], "empty.txt is empty"),
       (["train_value.py", "--reward", "constant.py:reward"], "every text has the reward 5"),
       (["train_value.py", "--reward", "constant.py:nan"], "not.*finite|0 of them"),
       (["train_value.py", "--tokens", "64"], "exceed the model's context of 64"),
       (["train_value.py", "--tokens", "0"], "1 or more"), (["train_value.py", "--rate", "3"], "--rate"),
       (["train_value.py", "--out", "empty.txt"], "empty.txt: no value net"),
       (["train_value.py", "--out", "empty.txt/v.pt"], "cannot be written"),
       (["train_value.py", "--device", "tpu"], "invalid choice: 'tpu'"),
       (["sample.py"], "out/value.pt: no value net.*train one"),
       (["sample.py", "--value", "empty.txt"], "no value net"),
       (["sample.py", "--temperature", "0"], "above 0")]


@pytest.mark.parametrize("command, message", BAD, ids=[" ".join(command) for command, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, command, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "constant.py").write_text("def reward(texts): return [5.0] * len(texts)\n"
                                          "def nan(texts): return [float('nan')] * len(texts)\n")
    done = run(*command, *["--rollouts", "50"] * (command[0] == "train_value.py"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "empty.txt").read_text() == "\n"


def test_another_run_says_what_it_replaces(net, tmp_path, capsys):
    path = tmp_path / "v.pt"
    path.write_bytes(net.read_bytes())
    train_value.main(["--rollouts", "300", "--method", "plain", "--out", str(path)])
    line = capsys.readouterr().out.splitlines()[0]
    assert "will be replaced" in line and "rollouts 600" in line and "method q" in line
    train_value.main(["--rollouts", "300", "--method", "plain", "--out", str(path)])
    assert "the same settings" in capsys.readouterr().out


def test_divergence_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(train_value, "RATE", 1e18)
    with pytest.raises(InputError, match="diverged.*smaller RATE"):
        train_value.main(["--rollouts", "300", "--out", str(tmp_path / "v.pt")])
    assert not list(tmp_path.iterdir())


def gains(net, capsys, *arguments):
    sample.main(["--value", str(net), "--samples", "300", "--show", "0", *arguments])
    return float(re.search(r"gain ([+-]\S+)", capsys.readouterr().out)[1])


def test_strength_is_one_dial_both_ways(net, capsys):
    assert gains(net, capsys, "--strength", "0") == 0
    assert gains(net, capsys, "--strength", "2") > gains(net, capsys, "--strength", "3e-1") > 0.05
    assert gains(net, capsys, "--strength", "-1e-0") < -0.2
    assert abs(gains(net, capsys, "--steps", "4") - gains(net, capsys)) < 0.2
    assert 0.02 < gains(net, capsys, "--max-kl", "0.01") < gains(net, capsys)


def test_another_models_net_is_refused(net, tmp_path):
    model = load(TOY)[0]
    model.h[0].mlp.c_fc.weight.data *= 2
    ValueNet.load(net).save(tmp_path / "v.pt", model, ValueNet.load(net).info)
    with pytest.raises(InputError, match="trained on another model"):
        sample.main(["--value", str(tmp_path / "v.pt")])


# ------------------------------------------------------------------------------------------ the trace

def test_tokens_that_share_a_character_stay_together():
    tokenizer = load(TOY)[1]
    tokens = tokenizer.encode("é漢 the😀\n") + [200]             # single bytes, on the tiny vocabulary
    found = sample.pieces(tokenizer, tokens)
    assert [text for text, _ in found] == ["é", "漢", " the", "😀", "⏎", "\ufffd"]
    assert sum((places for _, places in found), []) == list(range(len(tokens)))


def test_lines_break_before_the_margin_and_know_wide_characters():
    rows = sample.lines([("x" * 40, [0]), ("漢" * 30, [1]), ("y" * 5, [2])])
    assert [[column for column, _, _ in row] for row in rows] == [[0], [0, 60]]


def test_levels_are_fixed_thirds_of_two_nats():
    assert [sample.level(x) for x in (0, .3, .4, 1, 1.7, 9)] == [0, 0, 1, 2, 3, 3]
    assert [sample.level(-x) for x in (0, .3, .4, 1.1, 1.7, 9)] == [0, 0, -1, -2, -3, -3]
    low, flat = {"V": [-1, 0, 1]}, {"V": [1, 1]}
    assert sample.course(low, [low, flat]) == "V -1.00 ▁▄█ +1.00"
    assert sample.course(flat, [flat]) == "V +1.00 ▁▁ +1.00"


def test_signs_stand_under_the_tokens_they_belong_to(net, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = {"reward": 1.0, "prompt": "the", "V": [0.0, 1.0, 1.0], "kl": [0.1, 0.2, 0.0], "largest": ["x"],
            "moved": ["y"], "gain": [2.0, -0.7, 0.0],
            "lines": sample.lines([(" good", [0]), (" day", [1]), (" out", [2])])}
    sample.show("with control", text, [text], colour=False)
    body = capsys.readouterr().out.splitlines()
    assert body[1] == "   good day out" and body[2].rstrip() == "   +++  -"
    sample.show("with control", text, [text], colour=True)
    assert "\033[30;48;5;69m good\033[0m\033[30;48;5;223m day\033[0m out" in capsys.readouterr().out


def test_colour_is_for_terminals_or_on_request(net, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sample.main(["--value", str(net), "--samples", "20", "--show", "5", "--strength", "4"])
    forced = capsys.readouterr().out
    monkeypatch.delenv("FORCE_COLOR")
    sample.main(["--value", str(net), "--samples", "20", "--show", "5", "--strength", "4"])
    assert "\033[" in forced and "\033[" not in capsys.readouterr().out


def test_the_trace_shows_v_and_kl_of_the_text(net):
    model, tokenizer = load(TOY)
    value = ValueNet.load(net)
    prompt, u = tokenizer.encode("<|endoftext|>the"), sample.uniform_table(1, 20, 3)

    def push(hidden):
        return sample.ascend(value, hidden, 1, 2.0)
    rollout = sample.generate(model, [prompt], u, push)
    reward = sample.load_reward("sentiment")
    text = sample.trace(model, tokenizer, value, reward, prompt, rollout, 0,
                        lambda hidden: sample.steer(model, hidden, push))
    n = int(rollout.mask.sum())
    beginnings = [tokenizer.decode(prompt + rollout.tokens[0, :t].tolist()) for t in range(n)]
    hidden = model(torch.tensor([prompt + rollout.tokens[0, :n].tolist()]))[0, 1:-1]
    truth = reward(beginnings) + value(hidden)
    torch.testing.assert_close(torch.tensor(text["V"]).double(), truth.double(), atol=1e-4, rtol=1e-4)
    assert math.isclose(sum(text["kl"]), rollout.kl[0, :n].sum().item(), rel_tol=1e-5)


def test_the_picture_is_valid_xml_with_every_token(net, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def reward(texts): return [t.count('<') for t in texts]")
    sample.main(["--value", str(net), "--samples", "4", "--show", "1", "--svg", str(tmp_path / "a" / "t.svg"),
                 "--prompt", "a <b> & \"c\"", "--reward", f"{tmp_path / 'r.py'}:reward"])
    root = ElementTree.parse(tmp_path / "a" / "t.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum('a <b> & "c" ..' in text for text in texts) == 2
    assert len(list(root.iter("{http://www.w3.org/2000/svg}title"))) == len(texts) - 4      # labels, V


@pytest.mark.parametrize("name, options", [("trace", []),
                                           ("overdose", ["--radius", "1000", "--strength", "16"])])
def test_the_readmes_picture_is_what_its_command_draws(default_net, tmp_path, name, options):
    sample.main(["--value", str(default_net), "--svg", str(tmp_path / "new.svg"), *options])

    def seen(path):                     # tokens and tints; numbers may differ in the last digit
        drawn = ElementTree.parse(path).iter()
        return [node.text if node.tag.endswith("text") else node.get("fill") for node in drawn
                if node.tag.endswith(("text", "rect")) and not (node.text or "").startswith("V ")]
    committed = ROOT / "tests" / "evidence" / f"{name}.svg"
    assert f"{name}.svg" in (ROOT / "README.md").read_text()
    assert seen(tmp_path / "new.svg") == seen(committed) and len(seen(committed)) > 20
