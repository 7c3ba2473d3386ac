"""Writing with a model, token by token: the cache of keys and values, the moving window, the draw.

Shapes: B batch, T time (tokens), S keys seen so far, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fradique.generation.kv_cache import KVCache
from fradique.generation.sampling import penalize_repetition, sample_token

CUDA_GRAPH_MIN_TOKENS = 8  # tokens; to record a step takes about as long as a few steps
CUDA_GRAPH_MAX_ROWS = 16  # at most: with more the kernels take longer than to call them
CAPTURE_STREAMS: dict[torch.device, "torch.cuda.Stream"] = {}  # on which graphs are recorded, one a device


def capture_cuda_graph(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """`work` recorded as a CUDA graph: what plays it again, and where its result then lies."""
    with torch.cuda.device(device):
        side = CAPTURE_STREAMS.setdefault(device, torch.cuda.Stream(device))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # at their first calls libraries set themselves up, unrecorded
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            result = work()
    return graph.replay, result


class CUDAGraphDecoder:
    """The step from one token to the next, recorded once and played again for each: a GPU is given all of its
    work at once, which for small batches takes less than giving it kernel by kernel."""

    def __init__(self, model: nn.Module, cache: KVCache, batch: int) -> None:
        device = cache.keys[0].device
        self.cache, self.token = cache, torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = cache.position = torch.zeros(1, dtype=torch.long, device=device)

        def step() -> Tensor:
            cache.length = 0  # where the token stands is told by the position
            return model(self.token, cache=cache, prefix=0)[0]

        try:
            self.play, self.logits = capture_cuda_graph(step, device)
        finally:
            cache.position, cache.length = None, 0

    def __call__(self, token: Tensor) -> Tensor:
        """Logits (B, 1, V) behind a token a row, (B, 1); the next call overwrites them."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.play()
        self.cache.length += 1
        return self.logits


@torch.no_grad()
def stream(
    model: nn.Module,
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
    """Continue ids (B, T) with a GPT: yield the next token of every row, (B,), as each is drawn.

    temperature 0 takes the likeliest; what `filter_logits` takes restricts the draw. `n_vocab` keeps to
    the first ids, where the vocabulary is padded. Raises ValueError for options out of range.
    Past the block the window slides on by `hop` tokens at a time (an eighth of the block where None is
    given; 1 is nanoGPT's), so that a cache is refilled once in `hop` tokens. With and without a cache the
    windows, and so the tokens, are the same.
    """
    training, block_size = model.training, model.config.block_size
    hop = max(1, block_size // 8) if hop is None else hop
    for sound, wrong in (
        (idx.size(1) > 0, "there is no token to go on from"),
        (1 <= hop <= block_size, f"hop = {hop} must be between 1 and the block size, {block_size}"),
        (temperature >= 0, f"temperature = {temperature} must be at least 0"),
        (top_k is None or top_k > 0, f"top_k = {top_k} must be at least 1"),
        (top_p is None or top_p > 0, f"top_p = {top_p} must be above 0"),
        (min_p is None or 0 < min_p <= 1, f"min_p = {min_p} must be above 0 and at most 1"),
        (repetition_penalty > 0, f"repetition_penalty = {repetition_penalty} must be above 0"),
    ):
        if not sound:
            raise ValueError(wrong)
    room = min(block_size, idx.size(1) + max_new_tokens)  # tokens that the cache may have to hold
    window, given = -1, 0  # where the window begins, and how many tokens were there when it did
    try:
        model.eval()
        cache = _empty_cache(model, idx, room) if use_cache else None
        recorded = None
        if cache is not None and max_new_tokens >= CUDA_GRAPH_MIN_TOKENS and can_use_cuda_graph(idx):
            recorded = CUDAGraphDecoder(model, cache, idx.size(0))
        for _ in range(max_new_tokens):
            start = window_start(idx.size(1), block_size, hop)
            if start != window:
                window, given = start, idx.size(1) - start
                if cache is not None:
                    cache.length = 0
            fresh = idx[:, start + (cache.length if cache else 0) :]  # what the cache does not hold yet
            if recorded is not None and cache.length and fresh.size(1) == 1:
                logits = recorded(fresh)
            else:
                with torch.inference_mode():  # each call costs less, which for small models is a tenth
                    logits = model(fresh, cache=cache, prefix=given)[0]
            logits = logits[:, -1, :n_vocab].float()  # (B, V)
            logits = penalize_repetition(logits, idx, repetition_penalty)
            token = sample_token(logits, temperature, top_k, top_p, min_p, generator)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
    finally:
        model.train(training)


def can_use_cuda_graph(idx: Tensor) -> bool:
    """Whether the steps of these rows are recorded: few rows, on CUDA, and no autocast to cast weights."""
    return idx.is_cuda and idx.size(0) <= CUDA_GRAPH_MAX_ROWS and not torch.is_autocast_enabled("cuda")


def _empty_cache(model: nn.Module, idx: Tensor, room: int) -> KVCache:
    """An empty cache for the rows of idx (B, T), in the dtype that the layers compute in."""
    kind = idx.device.type
    weights = model.transformer["wte"].weight.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights
    return KVCache(model.config, idx.size(0), idx.device, dtype, room)


def window_start(length: int, block_size: int, hop: int) -> int:
    """Where the context of `length` tokens begins: at 0, or the first multiple of `hop` that makes it fit."""
    return max(0, math.ceil((length - block_size) / hop) * hop)
