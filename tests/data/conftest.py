"""A small tokenizer; and no test here may use the network."""

import socket

import datasets
import pytest

from data.tokenizer import train_tokenizer

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # closing a stream sleeps 5 s otherwise


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a local file is being prepared: nothing may be fetched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def tokenizer():
    words = "the quick brown fox jumps over the lazy dog; it's 1815 and don't you know it.\n"
    return train_tokenizer([words * 20], 400)
