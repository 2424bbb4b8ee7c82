"""Puts the repository root on sys.path: the modules are single files, nothing is installed."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import os                                                                             # noqa: E402

import pytest                                                                         # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """The user's own cache, token and mirror play no part in any test, and the hub is out of reach."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if os.environ.get("HF_HUB_OFFLINE"):
        monkeypatch.delenv("HF_HUB_OFFLINE")
