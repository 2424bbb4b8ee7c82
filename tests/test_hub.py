"""
Names of the hub: found in the cache other tools keep, fetched into it where missing, and refused with one
line. The hub is a small server on the loopback address that can redirect, break off, lie and refuse.

    python -m pytest tests/test_hub.py
"""
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import model as model_module
from model import GPT, find
from test_loading import refused
from test_model import write_checkpoint
from test_scripts import TOY
from value import load_tokenizer

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Handler(BaseHTTPRequestHandler):
    """/{repo}/resolve/{main or COMMIT}/{file}: small files as they are, large ones at a second port."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append((self.server.label, self.path, dict(self.headers)))
        plan = hub.plan.pop(0) if hub.plan and self.server.label == hub.plan_at else None
        if isinstance(plan, int):
            return self.answer(plan, b"no")
        if self.server.label == "cdn":
            return self.send(hub.blobs[self.path.strip("/")], {}, plan)
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        if repo in hub.moved:                                  # a relative redirect on the same host
            return self.answer(307, b"", {"Location": f"/{hub.moved[repo]}/resolve/{rest}"})
        revision, _, file = rest.partition("/")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"Invalid username or password.")
        path = hub.repos.get(repo, Path("none")) / file
        if revision not in ("main", COMMIT) or not path.is_file():
            return self.answer(404, b"Entry not found")
        data = path.read_bytes()
        told = {"X-Repo-Commit": COMMIT}
        if file.endswith(".safetensors"):
            sha = hub.lie or hashlib.sha256(data).hexdigest()
            hub.blobs[sha] = data
            told |= {"X-Linked-ETag": f'"{sha}"', "X-Linked-Size": str(len(data)), "ETag": '"of-the-redirect"',
                     "Location": f"http://127.0.0.1:{hub.cdn.server_port}/{sha}"}
            return self.answer(302, b"Found", told)
        told["ETag"] = f'W/"{hashlib.sha1(b"blob %d" % len(data) + bytes(1) + data).hexdigest()}"'
        self.send(data, told, plan)

    def send(self, data, told, plan):
        status, begin = 200, 0
        if "Range" in self.headers and self.server.hub.ranges:
            status, begin = 206, int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            told["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.answer(status, data[begin:], told, plan)

    def answer(self, status, body, headers=None, plan=None):
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if plan in ("unsaid", "more"):
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if plan in ("break", "stall"):
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            if plan == "stall":
                self.server.hub.released.wait(20)
            self.close_connection = True
            return
        self.wfile.write(body[:len(body) // 2])
        time.sleep(self.server.hub.pause)
        # At once: a reader that has all it was told of would stop before the rest came.
        self.wfile.write(body[len(body) // 2:] + body * (plan == "more"))

    def log_message(self, *_):
        pass


class Hub:
    """repos {name: folder}; plan: what befalls the next requests to `plan_at` (a status, "break", "stall")."""
    def __init__(self):
        self.repos, self.blobs, self.requests, self.plan, self.moved = {}, {}, [], [], {}
        self.token, self.lie, self.ranges, self.plan_at, self.pause = None, None, True, "cdn", 0
        self.released = threading.Event()
        self.front, self.cdn = (ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2))
        for server, label in ((self.front, "hub"), (self.cdn, "cdn")):
            server.hub, server.label, server.daemon_threads = self, label, True
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop(self):
        self.released.set()
        for server in (self.front, self.cdn):
            server.shutdown()
            server.server_close()

    def of(self, label):
        return [path for name, path, _ in self.requests if name == label]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    folder = write_checkpoint(tmp_path / "remote")
    shutil.copy(TOY / "vocab.json", folder)
    hub.repos = {"org/tiny": folder, "openai-community/gpt2": folder, "distilbert/distilgpt2": folder}
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.front.server_port}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(model_module, "TIMEOUT", 2)
    yield hub
    hub.stop()


def cached(tmp_path, name="org/tiny"):
    return tmp_path / "home/hub" / f"models--{name.replace('/', '--')}"


def weights(name):
    return GPT.from_pretrained(name).state_dict()


# ------------------------------------------------------------------------------------------ fetching

def test_a_name_is_fetched_once_into_the_hubs_layout(hub, tmp_path):
    model = GPT.from_pretrained("org/tiny")
    local = GPT.from_pretrained(tmp_path / "remote")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), local.state_dict().values()))
    assert load_tokenizer("org/tiny").encode("the plot")
    folder = cached(tmp_path)
    assert (folder / "refs/main").read_text() == COMMIT
    for file in ("config.json", "model.safetensors", "vocab.json"):
        assert (folder / "snapshots" / COMMIT / file).read_bytes() == (tmp_path / "remote" / file).read_bytes()
    assert sorted(path.name for path in (folder / "snapshots" / COMMIT).iterdir()) == [
        "config.json", "model.safetensors", "vocab.json"]          # nothing half-done beside them
    assert hub.of("hub")[1] == f"/org/tiny/resolve/{COMMIT}/model.safetensors"     # of one commit, all of them
    seen = len(hub.requests)
    weights("org/tiny")
    load_tokenizer("org/tiny")
    assert len(hub.requests) == seen                               # the second run asks nobody


def test_the_hubs_own_client_finds_what_was_fetched(hub, tmp_path):
    hub_client = pytest.importorskip("huggingface_hub")
    weights("org/tiny")
    found = hub_client.try_to_load_from_cache("org/tiny", "model.safetensors", cache_dir=tmp_path / "home/hub")
    assert Path(found) == cached(tmp_path) / "snapshots" / COMMIT / "model.safetensors"
    assert hub_client.scan_cache_dir(tmp_path / "home/hub").size_on_disk > 0


def test_public_names_and_a_model_that_has_moved(hub, tmp_path):
    hub.moved = {"old/name": "org/tiny"}
    for name, asked in (("gpt2", "/openai-community/gpt2/"), ("distilgpt2", "/distilbert/distilgpt2/"),
                        ("old/name", "/old/name/")):
        hub.requests.clear()
        weights(name)
        assert hub.of("hub")[0].startswith(asked)
        assert (cached(tmp_path, name) / "refs/main").is_file()


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub")])
@pytest.mark.parametrize("spelling", ["gpt2", "openai-community/gpt2"])
def test_what_other_tools_have_cached_is_used(variable, below, spelling, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    folder = tmp_path / "cache" / below / f"models--{spelling.replace('/', '--')}"
    blob = write_checkpoint(folder / "blobs")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").symlink_to("../../blobs/config.json")     # as on Unix
    shutil.copy(blob / "model.safetensors", folder / "snapshots" / COMMIT)                    # as on Windows
    for name in ("gpt2", "openai-community/gpt2"):
        assert weights(name).keys()
    refused(lambda: weights("gpt2-medium"), "gpt2-medium", "config.json", str(tmp_path / "cache" / below))


def test_a_directory_is_preferred_to_a_name(monkeypatch, tmp_path):
    write_checkpoint(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert find("gpt2", "config.json") == Path("gpt2/config.json")


@pytest.mark.parametrize("flag", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(flag, hub, monkeypatch, tmp_path):
    monkeypatch.setenv(flag, "1")
    refused(lambda: weights("org/tiny"), "org/tiny", "config.json", str(tmp_path / "home/hub"),
            f"unset {flag}", "HF_HUB_CACHE")
    assert hub.requests == []
    monkeypatch.setenv(flag, "0")
    weights("org/tiny")
    monkeypatch.setenv(flag, "true")
    weights("org/tiny")


def test_progress_where_there_is_a_terminal(hub, monkeypatch, capsys):
    weights("gpt2")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    weights("org/tiny")
    shown = capsys.readouterr().err
    assert "model.safetensors: 0 of 0 MB, " in shown and " MB/s, " in shown and shown.endswith(" s left\n")


# ------------------------------------------------------------------------- transfers that go wrong

@pytest.mark.parametrize("plan", ["break", "stall"])
def test_a_broken_transfer_goes_on_where_it_stopped(plan, hub, tmp_path):
    hub.plan = [plan]
    refused(lambda: weights("org/tiny"), "model.safetensors", "org/tiny", "again")
    snapshot = cached(tmp_path) / "snapshots" / COMMIT
    assert not (snapshot / "model.safetensors").exists()
    half = next(snapshot.glob("*.part")).stat().st_size
    assert half > 0
    weights("org/tiny")
    assert hub.requests[-1][2]["Range"] == f"bytes={half}-"
    assert not list(snapshot.glob("*.part"))


@pytest.mark.parametrize("where, file", [("cdn", "model.safetensors"), ("hub", "config.json")])
def test_a_length_that_is_not_said(where, file, hub, tmp_path):
    hub.plan, hub.plan_at, hub.moved = ["unsaid"], where, {"old/name": "org/tiny"}
    if where == "hub":
        hub.plan = [None, "unsaid"]                            # behind a redirect that has a length of its own
    assert find("old/name", file).read_bytes() == (tmp_path / "remote" / file).read_bytes()


def test_more_than_was_announced_is_not_kept(hub, tmp_path):
    hub.plan = ["more"]
    refused(lambda: weights("org/tiny"), "hash")
    weights("org/tiny")


def test_a_whole_file_that_was_not_yet_checked_is_not_fetched_again(hub, tmp_path):
    data = (tmp_path / "remote/model.safetensors").read_bytes()
    snapshot = cached(tmp_path) / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / f"model.safetensors.{hashlib.sha256(data).hexdigest()}.part").write_bytes(data)
    hub.pause = 0.1
    assert find("org/tiny", "model.safetensors").read_bytes() == data
    assert [path.name for path in snapshot.iterdir()] == ["model.safetensors"]


def test_a_server_without_ranges_starts_over(hub, tmp_path):
    hub.plan, hub.ranges = ["break"], False
    refused(lambda: weights("org/tiny"), "again")
    weights("org/tiny")


def test_a_wrong_hash_is_refused_and_nothing_is_kept_of_it(hub, tmp_path):
    hub.lie = "ab" * 32
    refused(lambda: weights("org/tiny"), "model.safetensors", "hash")
    assert not (cached(tmp_path) / "snapshots" / COMMIT / "model.safetensors").exists()
    hub.lie = None
    weights("org/tiny")


@pytest.mark.parametrize("status, word", [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "500"),
                                          (404, "config.json")])
def test_refusals_name_the_model_and_the_mend(status, word, hub):
    hub.plan, hub.plan_at = [status], "hub"
    refused(lambda: weights("org/tiny"), "org/tiny", "config.json", word)


def test_a_server_that_is_no_hub_and_one_that_is_not_there(hub, monkeypatch):
    refused(lambda: weights("org/none"), "org/none", "config.json")
    hub.plan, hub.plan_at = [200], "hub"
    refused(lambda: weights("org/tiny"), "does not answer like the hub", "HF_ENDPOINT")
    for endpoint in ("http://127.0.0.1:9", "nonsense", "file:///etc"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused(lambda: weights("org/tiny"), "org/tiny", "config.json")


def test_missing_weights_and_a_missing_vocabulary(hub, tmp_path):
    (tmp_path / "remote/vocab.json").unlink()
    refused(lambda: load_tokenizer("org/tiny"), "37", "vocab.json")
    (tmp_path / "remote/model.safetensors").unlink()
    refused(lambda: weights("org/tiny"), "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["org/../tiny", "../tiny", "a/b/c", "/none", "org/", "no such", "org/ti\nny"])
def test_names_that_are_none(name, hub):
    """Neither a directory nor a name: nobody is asked."""
    refused(lambda: weights(name))
    assert hub.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "home").mkdir(mode=0o500)
    refused(lambda: weights("org/tiny"), "HF_HUB_CACHE")


def test_a_cache_below_a_file(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file/hub"))
    refused(lambda: weights("org/tiny"), "HF_HUB_CACHE", str(tmp_path / "file/hub"))


def test_a_full_disk(hub, tmp_path, monkeypatch):
    code = ("import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "import model\n"
            "try: model.find('org/tiny', 'model.safetensors')\n"
            "except model.InputError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(model_module.__file__).parent,
                          capture_output=True, text=True)
    assert "make room" in done.stdout and len(done.stdout.splitlines()) == 1, done
    weights("org/tiny")


# ------------------------------------------------------------------------------------------- tokens

@pytest.mark.parametrize("where", ["variable", "file"])
def test_the_token_goes_to_the_hub_and_nowhere_else(where, hub, tmp_path, monkeypatch):
    hub.token, hub.moved = "hf_secret", {"old/name": "org/tiny"}
    refused(lambda: weights("org/tiny"), "HF_TOKEN")
    if where == "variable":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        (tmp_path / "home").mkdir()
        (tmp_path / "home/token").write_text("hf_secret\n")
    hub.requests.clear()
    weights("org/tiny")
    weights("old/name")                                            # a redirect on the hub's own host keeps it
    sent = {label: {headers.get("Authorization") for name, _, headers in hub.requests if name == label}
            for label in ("hub", "cdn")}
    assert sent == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


@pytest.mark.parametrize("token", ["hf_secret\r\n", "hf_\nsecret"])
def test_a_token_with_line_ends_is_not_shown(token, hub, monkeypatch):
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", token)
    weights("org/tiny")


# ----------------------------------------------------------------------------------- odd surroundings

@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_home_that_does_not_exist(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "~nobody-of-that-name/x")
    weights(write_checkpoint(tmp_path / "local"))              # needs no cache
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(lambda: weights("org/tiny"), "~nobody-of-that-name/x")
    refused(lambda: weights("x" * 300))


# ------------------------------------------------------------------------------------ two processes

def test_processes_that_fetch_the_same_model_at_once(hub, tmp_path):
    """Locks are on open files: threads stand for processes. Each transfer is slow enough for all to meet."""
    hub.pause, results = 0.3, []
    threads = [threading.Thread(target=lambda: results.append(sorted(weights("org/tiny")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and results[0] and results[0] == results[1] == results[2]
    snapshot = cached(tmp_path) / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------------------------- the vocabulary

def test_a_public_name_without_vocabulary_takes_gpt2s(hub, monkeypatch, tmp_path):
    shared = Path(model_module.__file__).parent.parent / "shared/tiktoken_cache"
    if not shared.is_dir():
        pytest.skip("../shared is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared))
    folder = cached(tmp_path, "gpt2")
    write_checkpoint(folder / "snapshots" / COMMIT, vocab_size=50257)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]
    refused(lambda: load_tokenizer("org/tiny"), "vocab.json", "org/tiny")
