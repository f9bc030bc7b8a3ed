"""A training pass as a CUDA graph: one launch, where a small model would wait for a thousand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Decoder
from model.loss import Loss

FEWEST_DOCUMENTS = 16  # that a graph of several documents has room for


class CapturedPasses:
    """Takes the place of Decoder.forward: in training, with targets and answers, forward and backward
    are replayed.

    A graph is captured for each number of tokens and of documents, which empty ones round up to a
    power of two; documents may have up to begin_stage's length. The last bits of a loss depend on
    these bounds, as sums are cut differently. What the model was set to when a graph was captured,
    such as the share of answers, stays in it.
    """

    def __init__(self, model: Decoder):
        self.model, self.eager = model, model.forward
        self.longest, self.graphs = 0, {}

    def begin_stage(self, longest: int) -> None:
        """Documents have up to `longest` tokens from here on, and the model may be set otherwise: graphs of
        before are dropped."""
        self.longest = longest
        self.graphs.clear()

    def __call__(
        self, *inputs, targets: Tensor | None = None, answers: Tensor | None = None
    ) -> Tensor | Loss:
        """As Decoder.forward; the sums of the loss carry no gradient."""
        if answers is None or not (self.model.training and torch.is_grad_enabled()):
            return self.eager(*inputs, targets, answers)
        tokens, positions, cu_seqlens, _ = inputs
        documents = len(cu_seqlens) - 1
        if documents > 1:  # a single one has kernels of its own
            documents = max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())
        room = documents + 1 - len(cu_seqlens)
        borders = F.pad(cu_seqlens, (0, room), value=len(tokens))
        inputs = tokens, positions, borders, targets, answers
        key = len(tokens), documents
        if key not in self.graphs:
            pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
            self.graphs[key] = PassGraph(self.model, self._run, inputs, pool)
        return Loss(*self.graphs[key](inputs))

    def _run(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, *scored: Tensor) -> Loss:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        return self.eager(tokens, positions, cu_seqlens, self.longest, *scored)


class PassGraph:
    """A captured pass. forward(*inputs) runs the model and gives scalars, the first of which is the
    objective: its gradients by the model's parameters are captured along.

    inputs: tensors of the shapes that all later ones have. pool: memory of another graph, of which no
    result may be in use while this one is replayed.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor],
        pool=None,
    ):  # fmt: skip
        self.inputs = tuple(x.clone() for x in inputs)
        # Autograd ties a parameter to the stream that it was first used on, for as long as a pass lives
        # on anywhere, and a capture cannot wait for that stream: the graph has leaves of its own.
        bare = _Bare(model, forward)
        leaves = {n: p.detach().requires_grad_() for n, p in bare.named_parameters()}

        def run() -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
            scalars = torch.func.functional_call(bare, leaves, self.inputs)
            # Not by backward(): gradients would be accumulated, and reduced over ranks, in the graph.
            return scalars, torch.autograd.grad(scalars[0], leaves.values(), allow_unused=True)

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
            scalars, gradients = run()
        self.scalars = [x.detach() for x in scalars]
        pairs = zip(model.parameters(), gradients, strict=True)
        used = [(p, g) for p, g in pairs if g is not None]
        self.parameters, self.gradients = map(list, zip(*used, strict=True))

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The scalars for other inputs; the first leads back to the model's parameters."""
        return _Replay.apply(self, inputs, *self.parameters)


class _Bare(nn.Module):
    """The model without the hooks that DeepSpeed has put around it, which wait for the device."""

    def __init__(self, model: nn.Module, forward: Callable[..., Sequence[Tensor]]):
        super().__init__()
        self.model, self.forward = model, forward


class _Replay(torch.autograd.Function):
    """A graph's scalars, with gradients that are there before they are asked for."""

    @staticmethod
    def forward(ctx, graph: PassGraph, inputs: Sequence[Tensor], *parameters: Tensor):
        for own, new in zip(graph.inputs, inputs, strict=True):
            own.copy_(new)
        graph.graph.replay()
        objective, *sums = (x.clone() for x in graph.scalars)
        ctx.gradients = graph.gradients
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)
        return objective, *sums

    @staticmethod
    def backward(ctx, grad, *_):
        # New tensors, as the next replay writes these again.
        return None, None, *torch._foreach_mul(ctx.gradients, grad.to(ctx.gradients[0].dtype))
