"""Layers and grouped GEMMs: random data in every scheme's form, and float64 references."""

from __future__ import annotations

import dataclasses

import torch


def floor_of(size: float, ops: float, ceilings: dict[str, float]) -> dict[str, float | str]:
    """The least time that `size` bytes of memory traffic and `ops` operations need."""
    memory = 1e6 * size / ceilings["read_bytes_per_s"]
    compute = 1e6 * ops / ceilings["ops_per_s"]
    return {
        "floor_us": max(memory, compute),
        "floor_by": "memory" if memory > compute else "compute",
        "bytes": size,
        "ops": ops,
    }


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of one MoE layer; `experts` are those of this GPU, `routed` those that ids name."""

    name: str
    experts: int
    routed: int
    top_k: int
    hidden: int
    intermediate: int


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-30b", 128, 128, 8, 2048, 768),
        Model("qwen3.6-35b", 256, 256, 8, 2048, 512),
        Model("ernie-21b", 64, 64, 6, 2560, 1536),
        Model("deepseek-v3-ep8", 32, 256, 8, 7168, 2048),  # a token has one route here on average
        Model("deepseek-v3-32e", 32, 32, 8, 7168, 2048),  # every route of a token is here
    )
}
BLOCK = 128
Q_MAX = (
    16  # int8_hybrid's default; a super group is 256 K-blocks, more than any of these models has
)
CHECKED_TOKENS = 32


def channel_form(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., N, K] and float32 [..., N]."""
    scale = w.float().abs().amax(-1).clamp_min(1e-30) / 127
    return (w / scale[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _tiles(w: torch.Tensor, block_k: int) -> torch.Tensor:
    """float32 [E, NB, 128, KB, block_k]: a view where w is float32."""
    e, n, k = w.shape
    if n % BLOCK or k % block_k:
        raise ValueError(
            f"w: expected rows in multiples of {BLOCK} and columns of {block_k}, got {n} x {k}"
        )
    return w.float().view(e, n // BLOCK, BLOCK, k // block_k, block_k)


def block_form(w: torch.Tensor, block_k: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [E, N, K] and float32 [E, N/128, K/block_k]."""
    tiles = _tiles(w, block_k)
    scale = tiles.abs().amax((2, 4)).clamp_min(1e-30) / 127
    q = (tiles / scale[:, :, None, :, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8).view(w.shape), scale


def hybrid_form(
    w: torch.Tensor, block_k: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 [E, N, K], float32 [E, N/128, 1] and uint8 [E, N/128, K/block_k] (docs/schemes.md)."""
    tiles = _tiles(w, block_k)
    largest = tiles.abs().amax((2, 4))
    top = largest.amax(-1, keepdim=True).clamp_min(1e-30)
    scale = top / (127 * Q_MAX)
    q = (largest * (Q_MAX / top)).ceil_().clamp_(1, Q_MAX)
    values = (tiles / (q * scale)[:, :, None, :, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8).view(w.shape), scale, q.to(torch.uint8)


def parse_scheme(scheme: str) -> tuple[str, int]:
    """int8_block:block_k=256 -> block, 256."""
    name, _, option = scheme.partition(":")
    block_k = int(option.removeprefix("block_k=")) if option else BLOCK
    return name.removeprefix("int8_"), block_k


def make_form(w: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
    kind, block_k = parse_scheme(scheme)
    if kind == "channel":
        return channel_form(w)
    return {"block": block_form, "hybrid": hybrid_form}[kind](w, block_k)


@dataclasses.dataclass
class Inputs:
    """One call's inputs. `ids` are the routed experts', `local_ids` have -1 for other GPUs'."""

    x: torch.Tensor
    ids: torch.Tensor
    local_ids: torch.Tensor
    weights: torch.Tensor


class LayerProblem:
    """Weights, their quantised forms (made when asked for), inputs and the reference.

    w13 [E, 2I, H] holds gate first; both matrices are bfloat16 until `drop_float_weights`.
    """

    def __init__(self, model: Model, seed: int = 0, device: str = "cuda") -> None:
        self.model, self.device = model, device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.w13 = self._normal(model.experts, 2 * model.intermediate, model.hidden)
        self.w2 = self._normal(model.experts, model.hidden, model.intermediate)
        self._forms: dict[str, tuple[torch.Tensor, ...]] = {}
        self._checked = self._random_inputs(CHECKED_TOKENS)
        # The only token of T = 1 needs a route on this GPU: the one with most comes first.
        most = int((self._checked.local_ids >= 0).sum(-1).argmax())
        order = [most, *(t for t in range(CHECKED_TOKENS) if t != most)]
        parts = (getattr(self._checked, f.name)[order] for f in dataclasses.fields(Inputs))
        self._checked = Inputs(*parts)
        self.reference = self._reference(self._checked)

    def _normal(self, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return out.normal_(0.0, shape[-1] ** -0.5, generator=self.generator)

    def _random_inputs(self, tokens: int) -> Inputs:
        model = self.model
        x = torch.empty(tokens, model.hidden, dtype=torch.bfloat16, device=self.device)
        x.normal_(generator=self.generator)
        scores = torch.rand(tokens, model.routed, generator=self.generator, device=self.device)
        ids = scores.topk(model.top_k, -1).indices.int()
        weights = torch.rand(tokens, model.top_k, generator=self.generator, device=self.device)
        weights = torch.softmax(2 * weights, -1)
        return Inputs(x, ids, torch.where(ids < model.experts, ids, -1), weights)

    @staticmethod
    def checked_rows(tokens: int) -> torch.Tensor:
        """Where the tokens with a known result stand: spread over the batch."""
        return torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).round().long()

    def inputs(self, tokens: int, count: int) -> list[Inputs]:
        """`count` sets; the first holds the tokens of `reference` at `checked_rows`."""
        sets = [self._random_inputs(tokens) for _ in range(count)]
        rows = self.checked_rows(tokens).to(self.device)
        for field in dataclasses.fields(Inputs):
            source = getattr(self._checked, field.name)
            getattr(sets[0], field.name)[rows] = source[: len(rows)]
        return sets

    def _reference(self, inputs: Inputs) -> torch.Tensor:
        """float64 [CHECKED_TOKENS, H] on the unquantised weights."""
        x, weights = inputs.x.double(), inputs.weights.double()
        out = torch.zeros_like(x)
        half = self.model.intermediate
        for expert in inputs.local_ids.unique().tolist():
            if expert < 0:
                continue
            token, slot = (inputs.local_ids == expert).nonzero(as_tuple=True)
            hidden = x[token] @ self.w13[expert].double().T
            act = torch.nn.functional.silu(hidden[:, :half]) * hidden[:, half:]
            out.index_add_(
                0, token, (act @ self.w2[expert].double().T) * weights[token, slot, None]
            )
        return out

    def form(self, scheme: str) -> tuple[torch.Tensor, ...]:
        """(w13 values, its scales..., w2 values, its scales...)."""
        if scheme not in self._forms:
            self._forms[scheme] = make_form(self.w13, scheme) + make_form(self.w2, scheme)
        return self._forms[scheme]

    def drop_float_weights(self) -> None:
        """Once every peer has its form: frees the bfloat16 weights."""
        del self.w13, self.w2

    def floor(self, inputs: list[Inputs], ceilings: dict[str, float]) -> dict[str, float | str]:
        """Bytes (touched experts' weights, x and out once) over bandwidth, operations over rate."""
        model = self.model
        tokens = inputs[0].x.shape[0]
        per_expert = 3 * model.hidden * model.intermediate
        touched = [len(i.local_ids[i.local_ids >= 0].unique()) for i in inputs]
        routes = [int((i.local_ids >= 0).sum()) for i in inputs]
        size = sum(touched) / len(inputs) * per_expert + 4.0 * tokens * model.hidden
        ops = 2.0 * per_expert * sum(routes) / len(inputs)
        return floor_of(size, ops, ceilings)


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """`experts` matrices [n, k] and about `rows` rows for each of them."""

    experts: int
    rows: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.experts}x{self.rows}:{self.n}:{self.k}"


GEMM_CASES = {
    case.name: case
    for case in (
        GemmCase(8, 4096, 4096, 7168),
        GemmCase(8, 4096, 7168, 2048),
        GemmCase(128, 256, 1536, 2048),
        GemmCase(128, 256, 2048, 768),
        GemmCase(256, 256, 1024, 2048),
        GemmCase(256, 256, 2048, 512),
        GemmCase(64, 384, 3072, 2560),
        GemmCase(128, 4, 1536, 2048),
        GemmCase(128, 4, 2048, 768),
        GemmCase(8, 32, 4096, 7168),
        GemmCase(8, 32, 7168, 2048),
    )
}
ROTATED_BYTES = 400 << 20  # of weights before they come round again: eight times an H100's L2


class GemmProblem:
    """x [rows, k] sorted by expert and w [experts, n, k], bfloat16; the forms made when asked for.

    Rows per expert are binomial around the case's, as uniform routing gives them, or all equal.
    Every form's weights lie in memory `copies` times.
    """

    def __init__(self, case: GemmCase, uniform: bool = False, seed: int = 0, device="cuda") -> None:
        self.case, self.n, self.k, self.uniform = case, case.n, case.k, uniform
        generator = torch.Generator(device=device).manual_seed(seed)
        self.rows = case.experts * case.rows
        if uniform:
            counts = torch.full((case.experts,), case.rows, device=device)
        else:
            owners = torch.randint(case.experts, (self.rows,), generator=generator, device=device)
            counts = torch.bincount(owners, minlength=case.experts)
        self.offsets = torch.zeros(case.experts + 1, dtype=torch.int32, device=device)
        self.offsets[1:] = counts.cumsum(0)
        self.counts = counts.tolist()
        self.x = torch.empty(self.rows, case.k, dtype=torch.bfloat16, device=device)
        self.x.normal_(generator=generator)
        self.w = torch.empty(case.experts, case.n, case.k, dtype=torch.bfloat16, device=device)
        self.w.normal_(0.0, case.k**-0.5, generator=generator)
        self.copies = max(1, min(8, -(-ROTATED_BYTES // self.w.numel())))
        self._forms: dict[str, tuple] = {}
        self.checked = torch.linspace(0, self.rows - 1, min(64, self.rows)).long().to(device)
        owner = torch.searchsorted(self.offsets[1:].long(), self.checked, right=True)
        x = self.x[self.checked].double()
        self.reference = torch.stack(
            [self.w[e].double() @ x[i] for i, e in enumerate(owner.tolist())]
        )

    def weights(self, scheme: str) -> list[tuple[torch.Tensor, ...]]:
        """`copies` times (values, scales...) of channel, block or hybrid."""
        key = f"w_{scheme}"
        if key not in self._forms:
            first = make_form(self.w, scheme)
            more = [(first[0].clone(), *first[1:]) for _ in range(self.copies - 1)]
            self._forms[key] = [first, *more]
        return self._forms[key]

    def activations(self, scheme: str) -> tuple[torch.Tensor, ...]:
        """Row by row: values and scale [rows], or scales [rows, k/block_k], or scale and q."""
        kind, block_k = parse_scheme(scheme)
        x = self.x.float()
        if kind == "channel":
            return channel_form(x)
        groups = x.view(self.rows, -1, block_k)
        largest = groups.abs().amax(-1).clamp_min(1e-30)
        if kind == "block":
            scale, q = largest / 127, None
            step = scale
        else:
            top = largest.amax(-1, keepdim=True)
            scale = top / (127 * Q_MAX)
            q = (largest * (Q_MAX / top)).ceil_().clamp_(1, Q_MAX)
            step = q * scale
        values = (groups / step[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        values = values.view(x.shape)
        return (values, scale) if q is None else (values, scale, q.to(torch.uint8))

    def floor(self, ceilings: dict[str, float]) -> dict[str, float | str]:
        """Weights of the experts with rows, a and d once; two operations a multiply-add."""
        touched = sum(count > 0 for count in self.counts)
        size = touched * self.n * self.k + self.rows * (self.k + 2.0 * self.n)
        ops = 2.0 * self.rows * self.n * self.k
        return floor_of(size, ops, ceilings)
