"""A training pass as a CUDA graph: one launch, where a small model would wait for a thousand."""

from __future__ import annotations

import gc

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Decoder
from model.loss import Loss

FEWEST_DOCUMENTS = 16  # that a graph of several documents has room for


class CapturedPasses:
    """Takes the place of Decoder.forward: in training, with targets, forward and backward are replayed.

    A graph is captured for each number of tokens and of documents, which empty ones round up to a
    power of two; documents may have up to begin_stage's length. The last bits of a loss depend on
    these bounds, as sums are cut differently.
    """

    def __init__(self, model: Decoder):
        self.model, self.eager = model, model.forward
        self.longest, self.graphs = 0, {}

    def begin_stage(self, longest: int) -> None:
        """Documents have up to `longest` tokens from here on; other graphs give their memory back."""
        self.longest = longest
        self.graphs.clear()

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Tensor | None = None,
    ) -> Tensor | Loss:
        """As Decoder.forward; the sums of the loss carry no gradient."""
        if targets is None or not (self.model.training and torch.is_grad_enabled()):
            return self.eager(tokens, positions, cu_seqlens, max_seqlen, targets)
        documents = len(cu_seqlens) - 1
        if documents > 1:  # a single one has kernels of its own
            documents = max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())
        room = documents + 1 - len(cu_seqlens)
        inputs = tokens, positions, F.pad(cu_seqlens, (0, room), value=len(tokens)), targets
        key = len(tokens), documents
        if key not in self.graphs:
            pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
            self.graphs[key] = PassGraph(self.model, self.eager, inputs, self.longest, pool)
        graph = self.graphs[key]
        return Loss(*_Replay.apply(graph, inputs, *graph.parameters))


class PassGraph:
    """One captured pass: its inputs, its loss, and the gradients of the objective."""

    def __init__(self, model: Decoder, forward, inputs: tuple[Tensor, ...], longest: int, pool):
        self.inputs = tuple(x.clone() for x in inputs)
        tokens, positions, cu_seqlens, targets = self.inputs
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        arguments = tokens, positions, cu_seqlens, longest, targets
        # Autograd ties a parameter to the stream that it was first used on, for as long as a pass lives
        # on anywhere, and a capture cannot wait for that stream: the graph has leaves of its own.
        bare = Bare(model, forward)
        leaves = {n: p.detach().requires_grad_() for n, p in bare.named_parameters()}

        def run() -> tuple[Loss, tuple[Tensor | None, ...]]:
            loss = torch.func.functional_call(bare, leaves, arguments)
            return loss, torch.autograd.grad(loss.objective, leaves.values(), allow_unused=True)

        stream = torch.cuda.Stream()  # where kernels are compiled and workspaces made
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # not while capturing: memory that it frees may be another stream's
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            loss, gradients = run()
        self.loss = Loss(*(x.detach() for x in loss))
        pairs = zip(model.parameters(), gradients, strict=True)
        used = [(p, g) for p, g in pairs if g is not None]
        self.parameters, self.gradients = map(list, zip(*used, strict=True))


class Bare(nn.Module):
    """The model without the hooks that DeepSpeed has put around it, which wait for the device."""

    def __init__(self, model: Decoder, forward):
        super().__init__()
        self.model, self.forward = model, forward


class _Replay(torch.autograd.Function):
    """The loss, with gradients that are there before they are asked for."""

    @staticmethod
    def forward(ctx, graph: PassGraph, inputs: tuple[Tensor, ...], *parameters: Tensor):
        for own, new in zip(graph.inputs, inputs, strict=True):
            own.copy_(new)
        graph.graph.replay()
        objective, *sums = (x.clone() for x in graph.loss)
        ctx.gradients = graph.gradients
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)
        return objective, *sums

    @staticmethod
    def backward(ctx, grad, *_):
        # New tensors, as the next replay writes these again.
        return None, None, *torch._foreach_mul(ctx.gradients, grad.to(ctx.gradients[0].dtype))
