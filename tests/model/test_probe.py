import torch

from kernels.nsa.geometry import Geometry
from model.build import build_decoder
from model.probe import BlockRecall, NSAProbe, selection_statistics

GEOMETRY = Geometry(4, 2, 4, 3, 8, 1, 1)
MODEL = dict(
    _target_="model.decoder.Decoder", dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24
)


def test_selection_statistics_against_counting_by_hand():
    torch.manual_seed(0)
    cu_seqlens, indices = torch.tensor([0, 30, 50]).int(), torch.full((2, 50, 3), -1).int()
    shared = later = forced = total = 0
    for head in range(2):
        before = None
        for t in range(50):
            position = t if t < 30 else t - 30
            own = position // 4
            chosen = sorted({0, own, int(torch.randint(own + 1, ()))})
            indices[head, t, : len(chosen)] = torch.tensor(chosen)
            total += len(chosen)
            forced += sum(block in (0, own) for block in chosen)
            if position:
                shared += len(set(chosen) & before)
                later += len(chosen)
            before = set(chosen)
    found = selection_statistics(indices, cu_seqlens, GEOMETRY, chunk=7)
    assert float(found["overlap"]) == torch.tensor(shared / later)
    assert float(found["forced"]) == torch.tensor(forced / total)
    assert found["distance"].sum() == total
    assert found["distance"][0] >= 100  # every token's own block


def test_the_probe_sees_every_layer_and_changes_nothing():
    torch.manual_seed(0)
    model = build_decoder(MODEL, dict(_target_="model.attention.nsa.NSAAttention"), 30).eval()
    inputs = torch.randint(30, (64,)), torch.arange(64), torch.tensor([0, 64]).int(), 64
    with torch.no_grad():
        expected = model(*inputs)
        with NSAProbe() as probe:
            assert torch.equal(model(*inputs), expected)
    metrics = probe.metrics()
    assert metrics["gates/window/layer_01"] == 0.5  # where training begins
    assert metrics["selection/forced"] == 1.0  # 64 tokens are one block
    assert sum(metrics["selection/distance"]) == 1.0


def test_without_nsa_there_is_nothing_to_tell():
    model = build_decoder(MODEL, dict(_target_="model.attention.full.FullAttention"), 30)
    with NSAProbe() as probe, torch.no_grad():
        model(torch.arange(8), torch.arange(8), torch.tensor([0, 8]).int(), 8)
    assert probe.metrics() == {}


def test_recall_of_the_true_block_against_the_operator_itself():
    torch.manual_seed(0)
    attention = dict(
        _target_="model.attention.nsa.NSAAttention",
        compress_block=4, compress_stride=2, select_block=4, num_selected=4, window=8,
    )  # fmt: skip
    model = build_decoder(MODEL, attention, 30).eval()
    inputs = torch.randint(30, (100,)), torch.arange(100) % 60, torch.tensor([0, 60, 100]).int(), 60
    pairs = [(59, 20), (50, 21), (99, 75), (99, 60), (99, 93), (10, 5)]
    with torch.no_grad(), BlockRecall(*torch.tensor(pairs).T) as probe:
        seen, see = [], probe.see
        probe.see = lambda arguments, indices: (seen.append(indices), see(arguments, indices))
        model(*inputs)
    assert len(probe.found) == len(seen) == 2
    for found, indices in zip(probe.found, seen, strict=True):
        for share, (query, needle) in zip(found.tolist(), pairs, strict=True):
            block = (needle if query < 60 else needle - 60) // 4
            assert share == sum(block in indices[h, query] for h in range(2)) / 2
        assert found[3:].tolist() == [1, 1, 1]  # the first block, the one before, one of three
    # One block of four is free to choose, among all but the first and the last two.
    torch.testing.assert_close(probe.chance, torch.tensor([1 / 12, 1 / 10, 1 / 7, 1, 1, 1]))
