"""
The two scripts as a user runs them: the main job, bad input in one line, and what is shown.
"""
import io
import re
import subprocess
import sys

import pytest
import torch
from tests.conftest import ROOT

import sample
import train_value
from control import ascend, controlled_log_probs, generate, uniform_table
from model import InputError, load, run_script
from value import ValueNet, load_reward, sentiment

TOY = ROOT / "tests" / "toy"


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A value net of few rollouts."""
    path = tmp_path_factory.mktemp("net") / "value.pt"
    train_value.HELD_OUT = 200
    train_value.main(["--rollouts", "600", "--out", str(path)])
    return path


def run(script, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=100)


def test_the_main_job_from_any_folder(tmp_path):
    """From another folder the default model is found beside the scripts, the net where one is."""
    trained = run("train_value.py", "--rollouts", "400", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"R\^2 of V .*-?\d\.\d{3}, of the reward so far alone", trained.stdout)
    assert "rollouts drawn 400 of 400" in trained.stderr            # a log shows how far it is
    drawn = run("sample.py", "--samples", "300", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert float(re.search(r"strength 1 +\S+ +(\S+)", drawn.stdout)[1]) > 0.2
    assert "\033" not in drawn.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "value.pt"]


BAD = [(train_value, ["--model", "nowhere"], "no config.json"),
       (train_value, ["--prompts", "absent.txt"], "absent.txt"),
       (train_value, ["--prompts", "empty.txt"], "empty.txt"),
       (train_value, ["--prompts", "long.txt"], "exceed the model's context of 64"),
       (train_value, ["--reward", "constant.py:reward"], "choose a --reward that varies"),
       (train_value, ["--reward", "constant.py:nan"], "0 of them finite"),
       (train_value, ["--tokens", "64"], "exceed the model's context of 64"),
       (train_value, ["--rollouts", "999999999"], "999999999 rollouts x 32 tokens x 64 numbers need"),
       (train_value, ["--out", "empty.txt"], "empty.txt: is there, and holds something else"),
       (train_value, ["--out", "empty.txt/v.pt"], "cannot be written"),
       (train_value, ["--out", "x" * 300], "cannot be written"),
       (sample, [], "no file out/value.pt; make one with train_value.py"),
       (sample, ["--value", "empty.txt"], "not a value net")]


@pytest.mark.parametrize("script, arguments, message", BAD, ids=[" ".join(case[1])[:40] for case in BAD])
def test_bad_input_gets_one_line_before_any_draw(tmp_path, monkeypatch, capsys, script, arguments, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("the\n" * 9 + "the " * 60)
    (tmp_path / "constant.py").write_text("def reward(texts): return [5.0] * len(texts)\n"
                                          "def nan(texts): return [float('nan')] * len(texts)\n")
    monkeypatch.chdir(tmp_path)
    if "constant.py:reward" not in arguments:
        monkeypatch.setattr(script, "generate", None)               # nothing may be drawn
    if script is train_value and "--rollouts" not in arguments:
        arguments = arguments + ["--rollouts", "50"]
    with pytest.raises(SystemExit) as error:
        run_script(lambda: script.main(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 50" not in line]
    assert error.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "out").exists() and (tmp_path / "empty.txt").read_text() == "\n"


WRONG = [(train_value, ["--tokens", "0"], "must be 1 or more"), (train_value, ["--rate", "3"], "--rate"),
         (train_value, ["--seed", str(2 ** 64)], "below 2"), (train_value, ["--device", "tpu"], "tpu"),
         (sample, ["--temperature", "0"], "above 0"), (sample, ["--strength", "x"], "list of numbers"),
         (sample, ["--top-p", "nan"], "above 0"), (sample, ["--strength", "nan"], "within")]


@pytest.mark.parametrize("script, arguments, message", WRONG, ids=[" ".join(case[1]) for case in WRONG])
def test_wrong_arguments_are_named(capsys, script, arguments, message):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2 and re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("script", [train_value, sample])
def test_help_needs_no_docstring(script, monkeypatch, capsys):
    """python -OO has none."""
    monkeypatch.setattr(script, "__doc__", None)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "frozen GPT-2" in capsys.readouterr().out


def test_the_net_is_saved_before_the_report(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_value, "report", stop)
    monkeypatch.setattr(train_value, "HELD_OUT", 10)
    with pytest.raises(SystemExit) as error:
        run_script(lambda: train_value.main(["--rollouts", "300", "--out", str(tmp_path / "v.pt")]))
    assert error.value.code == 130 and ValueNet.load(tmp_path / "v.pt").info["rollouts"] == 300


def test_a_closed_pipe_ends_without_a_traceback(net):
    command = f"{sys.executable} {ROOT / 'sample.py'} --value {net} --samples 20 --show 20 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_another_run_says_what_it_replaces(net, tmp_path, capsys):
    path = tmp_path / "v.pt"
    path.write_bytes(net.read_bytes())
    train_value.check_out(path)
    assert "v.pt will be replaced: q, reward sentiment, 600 rollouts, seed 1" in capsys.readouterr().out


def test_divergence_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(train_value, "RATE", 1e18)
    with pytest.raises(InputError, match="diverged.*lower RATE"):
        train_value.main(["--rollouts", "300", "--out", str(tmp_path / "v.pt")])
    assert not list(tmp_path.iterdir())


def test_a_reward_of_the_users_that_changes_folder_does_not_move_the_net(tmp_path, monkeypatch, capsys):
    (tmp_path / "moves.py").write_text("import os\nfrom value import sentiment\n"
                                       "def reward(texts):\n  os.chdir('/')\n  return sentiment(texts)\n")
    monkeypatch.chdir(tmp_path)
    train_value.main(["--rollouts", "300", "--tokens", "8", "--reward", "moves.py:reward", "--out", "v.pt"])
    assert (tmp_path / "v.pt").exists()


# -------------------------------------------------------------------------------------- sample.py

def rows_of(net, capsys, *arguments):
    """-> {label: [reward, gain, error, KL a text, ..]} of the table"""
    sample.main(["--value", str(net), "--samples", "200", "--show", "0", *arguments])
    table = capsys.readouterr().out.splitlines()
    return {line[:18].strip(): [float(cell) for cell in line[18:].split()]
            for line in table if line.startswith(("without", "strength"))}


def test_strength_is_one_dial_both_ways(net, capsys):
    rows = rows_of(net, capsys, "--strength=-1,0,0.3,1,2")
    gains = {label: cells[1] for label, cells in rows.items()}
    assert gains["without control"] == gains["strength 0"] == 0
    assert gains["strength -1"] < -0.2 < 0.05 < gains["strength 0.3"] < gains["strength 1"]
    nats = [rows[f"strength {s}"][3] for s in ("0", "0.3", "1", "2")]
    assert nats == sorted(nats) and nats[0] == 0


def test_steps_budget_and_radius_bound_control(net, capsys):
    once = rows_of(net, capsys)["strength 1"]
    steps = rows_of(net, capsys, "--steps", "4")["strength 1"]
    budget = rows_of(net, capsys, "--max-kl", "0.01")["strength 1"]
    small = rows_of(net, capsys, "--radius", "0.1")["strength 1"]
    assert abs(steps[1] - once[1]) < 0.2
    assert 0.02 < budget[1] < once[1] and budget[4] <= 0.01
    assert 0 < small[3] < once[3]
    nucleus = rows_of(net, capsys, "--top-p", "0.5")
    assert nucleus["without control"][5] < 3 and nucleus["strength 1"][1] > 0


def test_another_models_net_is_refused(net, tmp_path):
    model = load(TOY)[0]
    model.h[0].mlp.c_fc.weight.data *= 2
    ValueNet.load(net).save(tmp_path / "v.pt", model, ValueNet.load(net).info)
    with pytest.raises(InputError, match="trained on another model"):
        sample.main(["--value", str(tmp_path / "v.pt")])


def test_a_nets_code_is_not_run_unless_named(net, tmp_path):
    """A net may come from anyone; its info names a reward's file."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(texts): return [0.0]\n")
    value = ValueNet.load(net)
    for name in ("evil.py:f", "evil.py"):
        value.save(tmp_path / "v.pt", load(TOY)[0], value.info | {"reward": str(tmp_path / name)})
        with pytest.raises(InputError, match="run only if you name it: --reward"):
            sample.main(["--value", str(tmp_path / "v.pt")])
    assert not (tmp_path / "ran").exists()


def test_v_is_shown_for_its_own_reward_only(net, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def short(texts): return [-len(t) for t in texts]\n")
    common = ["--value", str(net), "--samples", "3", "--show", "1"]
    for more, shown in (([], True), (["--reward", f"{tmp_path / 'r.py'}:short"], False), (["--tokens", "9"], False)):
        sample.main(common + more)
        out = capsys.readouterr().out
        assert ("under the words: V" in out) == shown
        assert ("V is not shown: it was trained for the reward sentiment, 32 tokens" in out) == (not shown)


def traced(net):
    """The first text of a rollout under control, as sample.main traces it"""
    model, tokenizer = load(TOY)
    value = ValueNet.load(net)
    prompts = [[model.config.bos_id] + tokenizer.encode("the")]

    def push(hidden):
        return ascend(value, hidden, 1, 2.0)
    rollout = generate(model, prompts, uniform_table(1, 20, 3), push)
    text = sample.trace(model, tokenizer, value, load_reward("sentiment"), prompts, rollout, 0,
                        lambda hidden: controlled_log_probs(model, hidden, push))
    return model, tokenizer, value, prompts[0], rollout, text


def test_the_trace_shows_v_nats_and_kl_of_the_text(net):
    model, tokenizer, value, prompt, rollout, text = traced(net)
    drawn = rollout.drawn(0)
    assert len(text["V"]) == len(text["nats"]) == len(drawn)
    for t in range(1, len(drawn)):
        tokens = prompt + drawn[:t]
        hidden = model(torch.tensor([tokens]))[:, -1]
        truth = value(hidden, torch.tensor(sentiment([tokenizer.decode(tokens)])))
        torch.testing.assert_close(text["V"][t - 1], truth.item(), atol=1e-4, rtol=1e-4)
    assert text["V"][-1] == sentiment([tokenizer.decode(prompt + drawn)])[0]
    torch.testing.assert_close(sum(text["kl"]), rollout.kl[0, :len(drawn)].sum().item())
    nats = (rollout.log_q - rollout.log_p)[0, :len(drawn)]
    torch.testing.assert_close(torch.tensor(text["nats"]), nats)


def test_nats_stand_behind_words_that_moved_and_blocks_under_them():
    text = {"pieces": [(" truly", [0]), (" funny", [1]), (" 漢", [2]), (" and", [3])],
            "nats": [0.29, 0.61, -0.3, 0.0], "V": [0.0, 1.0, 0.5, -1.0]}
    words, blocks = sample.lines(text, -1.0, 1.0)
    assert words == " truly funny(+0.6) 漢(-0.3) and"
    assert blocks == " ▄     █           ▆        ▁"           # 漢 takes two columns
    assert sample.lines(text | {"V": None}, 0.0, 0.0) == [words]


def test_long_texts_are_wrapped_with_their_blocks():
    text = {"pieces": [(" word", [t]) for t in range(40)], "nats": [0.0] * 40, "V": [1.0] * 40}
    lines = sample.lines(text, 0.0, 1.0)
    assert len(lines) == 6 and max(map(len, lines)) <= sample.COLUMNS
    assert "".join(lines[0::2]) == " word" * 40 and "".join(lines[1::2]).count("█") == 40


def test_tokens_that_share_a_character_stay_together():
    tokenizer = load(TOY)[1]
    tokens = tokenizer.encode("é漢 the😀\n") + [200]             # single bytes, on the tiny vocabulary
    found = sample.pieces(tokenizer, tokens)
    assert [text for text, _ in found] == ["é", "漢", " the", "😀", "⏎", "\ufffd"]
    assert sum((places for _, places in found), []) == list(range(len(tokens)))


def test_control_characters_do_not_reach_the_terminal(net, capsys):
    sample.main(["--value", str(net), "--samples", "2", "--show", "2", "--prompt", "the\033[2J\u202e cast"])
    out = capsys.readouterr().out
    assert "\033" not in out and "\u202e" not in out and "the⏎[2J⏎ cast" in out


def test_the_ascend_that_is_read_is_the_one_that_runs(net, monkeypatch, capsys):
    """A student's body of ascend that returns zeros makes controlled texts the uncontrolled ones."""
    def zeros(value, hidden, steps, step_size, radius):
        return torch.zeros_like(hidden)
    monkeypatch.setattr(sample, "ascend", zeros)
    rows = rows_of(net, capsys)
    assert rows["strength 1"] == rows["without control"]


def test_a_notebooks_output_and_one_without_blocks_are_enough(net, monkeypatch):
    """In a notebook sys.stdout cannot be reconfigured; on Windows it may be cp1252."""
    class Notebook(io.TextIOBase):
        def write(self, text):
            return len(text)
    for stream in (Notebook(), io.TextIOWrapper(io.BytesIO(), encoding="cp1252")):
        monkeypatch.setattr(sys, "stdout", stream)
        run_script(lambda: sample.main(["--value", str(net), "--samples", "2"]))
        stream.flush()
