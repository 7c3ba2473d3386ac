"""The generation loop: samples one token at a time, with a KV cache and, on CUDA, a captured decode step.

The window is the part of the text that the model reads: its last tokens, at most block_size.

Shapes: B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fradique.generation.kv_cache import KVCache
from fradique.generation.sampling import penalize_repetition, sample_token

if TYPE_CHECKING:
    from model import GPT

CUDA_GRAPH_MIN_TOKENS = 8  # for fewer tokens, capturing a graph takes longer than the graph saves
CUDA_GRAPH_MAX_ROWS = 16  # with a larger batch the kernels take longer than their launches
# The first logits of a graph may differ from those of a plain step by this fraction of the largest logit: the
# graph attends to all entries of the cache with a mask, which is another kernel with other rounding.
CUDA_GRAPH_TOLERANCE = 0.05


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    n_vocab: int | None = None,
    use_cache: bool = True,
    hop: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue token ids (B, T): yield the next token of every row, (B,), as soon as it is sampled.

    temperature: 0 is greedy. top_k, top_p, min_p: see `filter_logits`. repetition_penalty: see
    `penalize_repetition`. n_vocab: sample only ids below it, if the vocabulary is padded.
    hop: if the text exceeds block_size, the window moves forward by this many tokens at once, so that the
    cache is recomputed only once per hop. Default: block_size / 8. A hop of 1 is nanoGPT's sliding window.
    The windows, and therefore the tokens, are the same with and without a cache.
    Raises ValueError if an option is out of range.
    """
    hop = max(1, model.config.block_size // 8) if hop is None else hop
    _check_options(model, idx, temperature, top_k, top_p, min_p, repetition_penalty, hop)
    was_training = model.training
    try:
        model.eval()
        decoder = Decoder(model, idx, max_new_tokens, use_cache, hop)
        for _ in range(max_new_tokens):
            logits = decoder.next_logits(idx)[:, :n_vocab].float()  # (B, V)
            logits = penalize_repetition(logits, idx, repetition_penalty)
            token = sample_token(logits, temperature, top_k, top_p, min_p, generator)  # (B,)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
    finally:
        model.train(was_training)


def _check_options(
    model: GPT,
    idx: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    hop: int,
) -> None:
    """Raise ValueError with all problems of the prompt and the options, if there are any."""
    block_size = model.config.block_size
    checks = (
        (idx.size(1) > 0, "the prompt is empty: generation needs at least one token"),
        (1 <= hop <= block_size, f"hop = {hop} must be between 1 and block_size = {block_size}"),
        (temperature >= 0, f"temperature = {temperature} must be at least 0"),
        (top_k is None or top_k > 0, f"top_k = {top_k} must be at least 1"),
        (top_p is None or top_p > 0, f"top_p = {top_p} must be above 0"),
        (min_p is None or 0 < min_p <= 1, f"min_p = {min_p} must be above 0 and at most 1"),
        (repetition_penalty > 0, f"repetition_penalty = {repetition_penalty} must be above 0"),
    )
    if problems := [problem for valid, problem in checks if not valid]:
        raise ValueError("; ".join(problems))


class Decoder:
    """Computes the logits of the next token of a growing text, from the tokens in the window.

    With a cache each call computes only the new tokens. Small batches on CUDA use a CUDA graph. If it cannot
    be captured, or its first logits differ from those of a plain step, a warning says so and all steps are
    plain.
    """

    def __init__(self, model: GPT, idx: Tensor, max_new_tokens: int, use_cache: bool, hop: int) -> None:
        self.model, self.hop = model, hop
        self.cache: KVCache | None = None
        self.cuda_graph: CUDAGraphDecoder | None = None
        self.graph_checked = False  # whether the logits of the graph were compared with those of a plain step
        self.window_start = -1  # index of the window's first token in the text; -1: no call yet
        self.prefix = 0  # prefix of a prefix LM: number of tokens in the window when the window last moved
        if use_cache:
            self.cache = _empty_cache(model, idx, idx.size(1) + max_new_tokens)
            if max_new_tokens >= CUDA_GRAPH_MIN_TOKENS and can_use_cuda_graph(idx):
                try:
                    self.cuda_graph = CUDAGraphDecoder(model, self.cache, idx.size(0))
                except RuntimeError as error:
                    _warn_about_graph(str(error))

    def next_logits(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, V) of the next token. A later call may overwrite the logits."""
        start = window_start(idx.size(1), self.model.config.block_size, self.hop)
        if start != self.window_start:
            self.window_start, self.prefix = start, idx.size(1) - start
            if self.cache is not None:
                self.cache.length = 0
        cached = self.cache.length if self.cache is not None else 0
        new_tokens = idx[:, start + cached :]
        if self.cuda_graph is not None and cached and new_tokens.size(1) == 1:
            if self.graph_checked or self._check_graph(new_tokens):
                return self.cuda_graph(new_tokens)[:, -1]
            self.cuda_graph, self.cache.length = None, 0  # the graph may have written wrong keys and values
            new_tokens = idx[:, start:]
        return self._plain_logits(new_tokens)[:, -1]

    def _plain_logits(self, new_tokens: Tensor) -> Tensor:
        """Token ids (B, T) that follow the cached ones -> logits (B, 1, V) of the next token."""
        with torch.inference_mode():  # faster than no_grad: by a tenth for a small model
            return self.model(new_tokens, cache=self.cache, prefix=self.prefix)[0]

    def _check_graph(self, token: Tensor) -> bool:
        """Whether the graph gives the logits of a plain step for token ids (B, 1). If not, warns.

        Leaves the length of the cache unchanged.
        """
        self.graph_checked, length = True, self.cache.length
        expected = self._plain_logits(token)
        self.cache.length = length
        try:
            difference = (self.cuda_graph(token) - expected).abs().max()
            close = bool(difference <= CUDA_GRAPH_TOLERANCE * expected.abs().max())
        except RuntimeError as error:
            _warn_about_graph(str(error))
            return False
        self.cache.length = length
        if not close and bool(expected.isfinite().all()):  # otherwise the model itself is broken
            _warn_about_graph("its logits differ from those of a plain step")
            return False
        return True


def window_start(length: int, block_size: int, hop: int) -> int:
    """Index of the window's first token in a text of `length` tokens.

    It is the smallest multiple of `hop` for which at most block_size tokens remain.
    """
    return max(0, math.ceil((length - block_size) / hop) * hop)


def _empty_cache(model: GPT, idx: Tensor, max_length: int) -> KVCache:
    """An empty cache for the rows of idx (B, T) and texts of up to `max_length` tokens."""
    device_type = idx.device.type
    # the dtype of the keys and values that the linear layers return
    dtype = model.transformer["wte"].weight.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    capacity = min(model.config.block_size, max_length)
    return KVCache(model.config, idx.size(0), idx.device, dtype, capacity)


# CUDA graph


def _warn_about_graph(problem: str) -> None:
    """Warn that generation continues without a CUDA graph."""
    reason = (problem.strip().splitlines() or ["unknown error"])[0][:200]
    text = f"the CUDA graph of the decode step does not work ({reason}); continuing without it"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def can_use_cuda_graph(idx: Tensor) -> bool:
    """Whether to capture the decode step: a small batch on CUDA, without autocast.

    With autocast the graph would contain the casts of all weights.
    """
    return idx.is_cuda and idx.size(0) <= CUDA_GRAPH_MAX_ROWS and not torch.is_autocast_enabled("cuda")


class CUDAGraphDecoder:
    """The decode step, captured as a CUDA graph: all kernels of a token are launched at once.

    With a small batch, launching the kernels one by one takes longer than running them.
    """

    def __init__(self, model: GPT, cache: KVCache, batch: int) -> None:
        device = cache.keys[0].device
        self.cache = cache
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = cache.position = torch.zeros(1, dtype=torch.long, device=device)

        def decode_step() -> Tensor:
            cache.length = 0  # not used here, but the model adds 1 in every call and checks block_size
            return model(self.token, cache=cache, prefix=0)[0]

        try:
            self.replay, self.logits = capture_cuda_graph(decode_step, device)
        finally:  # outside the graph, for example for the prompt, the cache uses `length`
            cache.position, cache.length = None, 0

    def __call__(self, token: Tensor) -> Tensor:
        """Token ids (B, 1) -> logits (B, 1, V) of the next token. The next call overwrites the logits."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.replay()
        self.cache.length += 1
        return self.logits


def capture_cuda_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture `step` as a CUDA graph; return a function that replays it, and its output tensor."""
    with torch.cuda.device(device):
        capture_stream = _capture_stream(device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        # warm-up: the first calls initialize libraries, which must not happen during the capture
        with torch.cuda.stream(capture_stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(capture_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capture_stream):
            output = step()
    return graph.replay, output


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device, shared because cuBLAS allocates a workspace per stream."""
    return torch.cuda.Stream(device)
