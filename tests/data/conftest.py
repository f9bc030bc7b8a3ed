"""A small tokenizer; and no test here may use the network."""

import socket

import datasets
import pytest

from data.tokenizer import train_tokenizer

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # closing a stream sleeps 5 s otherwise


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    attempts = []

    def refuse(*address):
        attempts.append(address)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not attempts  # an attempt whose failure was swallowed is one all the same


@pytest.fixture(scope="session")
def tokenizer():
    words = "the quick brown fox jumps over the lazy dog; it's 1815 and don't you know it.\n"
    return train_tokenizer([words * 20], 400)
