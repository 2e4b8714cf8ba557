"""What an engine does around a peer's GEMMs: sorting routes by expert, and combining their rows.

Small Triton kernels, about as good as the ones that engines bring: one launch up to 8192 routes,
four beyond. Peers that come as GEMMs and quantisers alone are put together with these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SMALL_SORT = 8192  # routes that one program sorts


@triton.jit
def _count(ids, counts, ranks, routes, BLOCK: tl.constexpr):
    """ranks[r] = how many routes of the same expert came before (in any order)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + r, mask=r < routes, other=-1)
    rank = tl.atomic_add(counts + expert, 1, mask=expert >= 0)
    tl.store(ranks + r, rank, mask=r < routes)


@triton.jit
def _scan(counts, offsets, padded, tile_experts, tiles, E: tl.constexpr, TILE: tl.constexpr):
    """offsets[0..E] of the rows, every expert's padded to TILE; the experts of the tiles."""
    e = tl.arange(0, E)
    count = tl.load(counts + e, cache_modifier=".cg")
    size = (count + TILE - 1) // TILE * TILE
    last = tl.cumsum(size, 0)
    tl.store(offsets + e + 1, last)
    tl.store(offsets + e, 0, mask=e == 0)
    tl.store(padded, tl.sum(size, 0))
    if TILE > 1:
        first_tile, own = (last - size) // TILE, size // TILE
        most = tl.max(own, 0)
        for index in range(0, most):
            tl.store(tile_experts + first_tile + index, e, mask=index < own)


@triton.jit
def _place(ids, ranks, offsets, rows, sorted_ids, routes, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """TILE 1: rows[r] = the route's row, -1 for none; else sorted_ids[row] = r."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + r, mask=r < routes, other=-1)
    rank = tl.load(ranks + r, mask=r < routes, other=0)
    first = tl.load(offsets + expert, mask=expert >= 0, other=0, cache_modifier=".cg")
    if TILE == 1:
        tl.store(rows + r, tl.where(expert >= 0, first + rank, -1), mask=r < routes)
    else:
        tl.store(sorted_ids + first + rank, r, mask=expert >= 0)


@triton.jit
def _sort_small(
    ids,
    counts,
    ranks,
    offsets,
    rows,
    sorted_ids,
    tile_experts,
    padded,
    routes,
    tiles,
    E: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All of the above in one program, for up to BLOCK routes."""
    tl.store(counts + tl.arange(0, E), 0)
    tl.debug_barrier()
    _count(ids, counts, ranks, routes, BLOCK)
    tl.debug_barrier()
    _scan(counts, offsets, padded, tile_experts, tiles, E, TILE)
    tl.debug_barrier()
    _place(ids, ranks, offsets, rows, sorted_ids, routes, TILE, BLOCK)


@triton.jit
def _combine(y, rows, weights, out, H, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum of weights[t, j] * y[rows[t, j]] in slot order; rows of -1 are left out."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows + token * K + j).to(tl.int64)
        weight = tl.load(weights + token * K + j)
        here = (column < H) & (row >= 0)
        total += weight * tl.load(y + row * H + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


class Sort:
    """Routes by expert. tile 1: `rows` [T, k] and `offsets` [E+1]; else the padded lists.

    Args:
        ids: int32 [T, k], -1 = none.
        experts: E, a power of two.
        tile: pads every expert's rows to a multiple: `sorted_ids` (the number of routes where
            nothing is), `expert_ids` of the tiles and `num_tokens_padded`.
    """

    def __init__(self, ids: torch.Tensor, experts: int, tile: int) -> None:
        if experts & (experts - 1):
            raise ValueError(f"experts: expected a power of two, got {experts}")
        self.ids, self.experts, self.tile = ids, experts, tile
        self.routes = ids.numel()
        self.tiles = min(self.routes, self.routes // tile + experts)

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=ids.device)

        self.counts, self.ranks = empty(experts), empty(self.routes)
        self.offsets, self.rows = empty(experts + 1), empty(self.routes).view(ids.shape)
        self.sorted_ids = empty(self.tiles * tile)
        self.expert_ids, self.num_tokens_padded = empty(self.tiles), empty(1)

    def run(self) -> None:
        if self.tile > 1:
            self.sorted_ids.fill_(self.routes)
        if self.routes <= SMALL_SORT:
            block = max(128, triton.next_power_of_2(self.routes))
            _sort_small[(1,)](
                self.ids,
                self.counts,
                self.ranks,
                self.offsets,
                self.rows,
                self.sorted_ids,
                self.expert_ids,
                self.num_tokens_padded,
                self.routes,
                self.tiles,
                self.experts,
                self.tile,
                block,
                num_warps=min(32, max(4, block // 256)),
            )
            return
        self.counts.zero_()
        grid = (triton.cdiv(self.routes, 512),)
        _count[grid](self.ids, self.counts, self.ranks, self.routes, 512)
        _scan[(1,)](
            self.counts,
            self.offsets,
            self.num_tokens_padded,
            self.expert_ids,
            self.tiles,
            self.experts,
            self.tile,
        )
        _place[grid](
            self.ids,
            self.ranks,
            self.offsets,
            self.rows,
            self.sorted_ids,
            self.routes,
            self.tile,
            512,
        )


class Combine:
    """out [T, H] = the weighted rows of y [R, H]; rows [T, k], -1 = none."""

    def __init__(self, y, rows, weights, out) -> None:
        self.arguments = y, rows, weights, out
        hidden = out.shape[1]
        block = min(1024, triton.next_power_of_2(hidden))
        self.grid = out.shape[0], triton.cdiv(hidden, block)
        self.sizes = hidden, rows.shape[1], block

    def run(self) -> None:
        _combine[self.grid](*self.arguments, *self.sizes)
