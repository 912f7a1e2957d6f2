"""Dropout of attention weights: one bit for each query and key, drawn once a call.

A query drops the n-th key at all levels or at none, since levels are views of one token. Forward and backward read the
same bits, 32 keys a word. A bit is a hash of seed, (sample, head) pair, query and key, so that all implementations and
devices draw the same bits from the same seed:

    row = mix(pair + low(seed))      key = mix((row ^ n) + high(seed))      dropped where mix(key ^ query) < p 2^32

Source: Wellons' lowbias32 for the hash, https://github.com/skeeto/hash-prospector.
"""

# Shapes: B batch, H heads, T queries, V keys of the longest level, W words.

import torch
from torch import Tensor

WORD = 32
_LOW = 0xFFFFFFFF


def num_words(length: int) -> int:
    """Words for this many bits: an even number, since the Triton kernels read two at a time."""
    return -(-length // (2 * WORD)) * 2


def words_by_query(queries: int, longest: int) -> int:
    """Words of a (sample, head) pair: each query's keys."""
    return queries * num_words(longest)


def words_by_query_and_key(queries: int, longest: int) -> int:
    """The same, and then each key's queries, for kernels whose tables are [keys, queries]."""
    return words_by_query(queries, longest) + num_words(longest) * WORD * num_words(queries)


def threshold(dropout_p: float) -> int:
    """Hashes below it are dropped."""
    return int(dropout_p * 2**WORD)


def draw_seed(device: torch.device) -> Tensor:
    """[1], drawn where it is used: nothing waits for its value, and checkpointing draws the same again."""
    return torch.randint(2**63 - 1, (1,), device=device)


def draw_bits(seed: Tensor, batch: int, heads: int, queries: int, longest: int, dropout_p: float) -> Tensor:
    """Words [B, H, T W] int32, by query, with a 1 where a key is retained; bits behind the last key are random."""
    device, words = seed.device, num_words(longest)
    pairs = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    query = torch.arange(queries, device=device).view(1, 1, queries, 1)
    keys = torch.arange(words * WORD, device=device)
    row = _mix((pairs + (seed & _LOW)) & _LOW)
    key = _mix(((row ^ keys) + (seed >> WORD)) & _LOW)
    retained = _mix(key ^ query) >= threshold(dropout_p)  # [B, H, T, W * 32]
    values = retained.unflatten(-1, (words, WORD)) << torch.arange(WORD, device=device)
    # The sum of distinct powers of two as an unsigned word, read as a signed one.
    return values.sum(-1).to(torch.uint32).view(torch.int32).flatten(2)


def retained_keys(bits: Tensor, queries: int, longest: int) -> Tensor:
    """[B, H, T, V]: True where a query's key is retained, by words [B, H, ...]."""
    words = bits[..., : words_by_query(queries, longest)].unflatten(-1, (queries, num_words(longest), 1))
    each = words >> torch.arange(WORD, device=bits.device, dtype=torch.int32)
    return (each & 1).bool().flatten(-2)[..., :longest]


def _mix(x: Tensor) -> Tensor:
    """Lowbias32 of 32-bit values in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
