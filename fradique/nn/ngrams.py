"""Embeddings of n-grams: of each token together with the one, two, … tokens before it.

The first layers of a small model spend most of their work on recognizing letters that often follow each
other. A table that is looked up knows them without a matrix product. There are more n-grams than rows: a hash
assigns them to rows, and rare ones share a row. Hash n-gram embeddings are those of BLT (Pagnoni et al. 2024,
section 3.2.1); Huang et al. 2025 ("Over-Tokenized Transformer") show the gain for tokens of BPE.

Shapes: B batch, T tokens, C = n_embd, N = ngram_max - 1 lengths of n-grams.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The hash of an n-gram is a polynomial of its token ids (Karp & Rabin 1987), whose bits are then mixed: alone
# it gives regular patterns, in which many n-grams share rows. All products are below 2^63.
BASE, MODULUS, MULTIPLIER = 1_000_003, 2**31 - 1, 48_271


def ngram_rows(ids: Tensor, ngram_max: int, rows: int) -> Tensor:
    """The row of each n-gram in one table of N * rows rows: ids (B, N + T) -> (B, T, N), int64.

    ids: token ids plus 1, 0 where there is no token; the first N are those before the T tokens.
    """
    T = ids.size(1) - (ngram_max - 1)
    value, columns = ids[:, -T:], []
    for n in range(2, ngram_max + 1):
        earlier = ids[:, ngram_max - n : ngram_max - n + T]  # n - 1 tokens before each
        value = (value * BASE + earlier) % MODULUS
        mixed = (value ^ value >> 16) * MULTIPLIER % MODULUS
        columns.append((mixed ^ mixed >> 15) % rows + (n - 2) * rows)
    return torch.stack(columns, dim=-1)


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the n-grams that end at each token, for n from 2 to ngram_max.

    `dropout`: the probability, in training, that a token keeps only n-grams up to a random length. Over
    several epochs the tables otherwise learn the training text by heart: every n-gram in it is known by then,
    whereas a new text has some that are not.

    `sparse_grad`: the gradient is a sparse tensor with the rows that occur in the batch. A dense one would
    have to be filled, and added to all rows, in every step.
    """

    def __init__(self, ngram_max: int, rows: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ngram_max, self.rows, self.dropout = ngram_max, rows, dropout
        self.weight = nn.Parameter(torch.zeros((ngram_max - 1) * rows, width))  # a new n-gram adds nothing
        self.sparse_grad = True

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` (B, N + T): see `ngram_rows` -> (B, T, C)."""
        rows = ngram_rows(ids, self.ngram_max, self.rows)  # (B, T, N)
        B, T, N = rows.shape
        rows, starts = rows.view(B * T, N), None
        if self.training and self.dropout:
            kept = self._kept_lengths(B * T, N, ids.device)  # (B T,)
            rows = rows[torch.arange(N, device=ids.device) < kept[:, None]]  # 1-dimensional
            starts = kept.cumsum(0) - kept  # of the rows of each token
        sums = F.embedding_bag(rows, self.weight, starts, mode="sum", sparse=self.sparse_grad)
        return sums.view(B, T, -1)

    def _kept_lengths(self, tokens: int, N: int, device: torch.device) -> Tensor:
        """How many lengths of n-grams each token keeps, the shortest ones: (tokens,), from 0 to N."""
        cut = torch.rand(tokens, device=device) < self.dropout
        return torch.where(cut, torch.randint(N, (tokens,), device=device), N)
