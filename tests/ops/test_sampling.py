"""argmax, penalize, warp, draw and the noise: oracles by sorting in float64, frequencies of draws, known answers, rows alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import stretto.ops as ops
import torch
from scipy import stats
from stretto.ops import _backend, sampling
from stretto.ops.sampling import Purpose, RowStatus, argmax, draw, gumbel, penalize, uniform, warp
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

NAN, INF = float("nan"), float("inf")
WIDTHS = (1, 15, 16, 17, 255, 256, 257, 1000, 4099)


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def warp_one(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    return warp(logits[None], f32(temperature), i32(top_k), f32(top_p), f32(min_p))[0]


def oracle(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, bool]:
    """The law by numpy's stable sort in float64, and whether a float32 sum may decide top_p or min_p otherwise."""
    l = logits.numpy().astype(np.float64)  # noqa: E741
    order = np.argsort(-l, kind="stable")
    if temperature == 0:
        law = np.zeros(len(l))
        law[order[0]] = 1
        return law, False
    mass = np.exp((l[order] - l[order[0]]) / float(np.float32(temperature)))
    keep = np.arange(len(l)) < (top_k or len(l))
    close = False
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(mass * keep)[:-1]])
        target = float(np.float32(top_p)) * (mass * keep).sum()
        close |= bool((np.abs(before[1:] - target) < 1e-5 * mass.sum()).any())
        keep &= (before < target) | (np.arange(len(l)) == 0)
    close |= bool(min_p > 0 and (np.abs(mass - min_p) < 1e-5).any())
    keep &= mass >= float(np.float32(min_p))
    law = np.zeros(len(l))
    law[order] = mass * keep / (mass * keep).sum()
    return law, close


@pytest.mark.parametrize("width", WIDTHS)
def test_warp_against_a_sort_in_float64(width, isa):
    g = torch.Generator().manual_seed(width)
    kinds = [torch.randn(width, generator=g) * 3, torch.randint(0, 4, (width,), generator=g).float(), torch.zeros(width),
             torch.randn(width, generator=g) * 40, torch.randn(width, generator=g).masked_fill(torch.rand(width, generator=g) < 0.7, -INF)]  # fmt: skip
    sure = 0
    for logits in kinds:
        logits[width // 2] = 1.0  # something finite
        for temperature in (0.0, 0.3, 1.0, 1.7):
            for top_k in (0, 1, 2, width // 2, width - 1, width, width + 5):
                for top_p, min_p in ((1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.999, 0.0), (1.0, 0.05), (1.0, 1.0), (0.7, 0.02)):
                    law, close = oracle(logits, temperature, top_k, top_p, min_p)
                    got = warp_one(logits, temperature, top_k, top_p, min_p).double().numpy()
                    assert abs(got.sum() - 1) < 1e-5
                    if not close:
                        sure += 1
                        assert ((got > 0) <= (law > 0)).all(), (temperature, top_k, top_p, min_p)
                        np.testing.assert_allclose(got, law, rtol=2e-5, atol=1e-30 if temperature >= 1 else 1e-12)
    assert sure > 500  # the oracle decides most of them


def test_ties_at_a_boundary_go_to_the_lower_ids(isa):
    for width in (20, 300, 2000):
        logits = torch.zeros(width)
        logits[::3] = 1.0  # ids 0, 3, 6, ...
        ones = logits.nonzero().flatten()
        for k in (1, 2, 5, len(ones), len(ones) + 3):
            kept = warp_one(logits, top_k=k).nonzero().flatten().tolist()
            zeros = (logits == 0).nonzero().flatten()
            assert kept == sorted(torch.cat([ones[:k], zeros[: max(k - len(ones), 0)]]).tolist())
        equal = torch.full((width,), -2.5)
        for part in (0.25, 0.5, 0.75):  # shares that float32 holds: the shortest run that reaches them
            assert warp_one(equal, top_p=part).nonzero().flatten().tolist() == list(range(math.ceil(part * width)))
        assert warp_one(equal, min_p=1.0).nonzero().numel() == width


def test_extreme_logits(isa):
    large = torch.finfo(torch.float32).max
    for width in (17, 300):
        x = torch.randn(width)
        x[3] = large
        assert same_bits(warp_one(x), torch.eye(width)[3])
        assert same_bits(warp_one(x * 0 - large), torch.full((width,), 1 / width))
        x = torch.full((width,), -INF)
        x[5], x[9] = -1e30, -1e30
        assert same_bits(warp_one(x, top_k=40, top_p=0.99), (torch.eye(width)[5] + torch.eye(width)[9]) / 2)
        x = torch.full((width,), -large)
        x[7] = large
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
            assert same_bits(warp_one(x, **options), torch.eye(width)[7])
        tiny = torch.zeros(width)
        tiny[1] = 1e-45
        assert int(warp_one(tiny, top_k=1).argmax()) == 1
        assert int(warp_one(tiny, temperature=0).argmax()) == 1
        cold = warp_one(torch.arange(width).float(), temperature=1e-45)
        assert same_bits(cold, torch.eye(width)[width - 1])


def test_status_says_what_a_row_is(isa):
    logits = torch.randn(8, 300)
    logits[1, 7], logits[2, 299], logits[3, 0], logits[4] = -INF, NAN, INF, -INF
    one = torch.ones(8)
    temperature, top_k, top_p, min_p = one.clone(), torch.zeros(8).int(), one.clone(), 0 * one
    temperature[5], top_k[6], min_p[7] = -1, -3, NAN
    status, out = torch.full((8,), -9, dtype=torch.int32), torch.zeros(8, 300)
    warp(logits, temperature, top_k, top_p, min_p, out=out, status=status)
    assert status.tolist() == [RowStatus.FINITE, RowStatus.MASKED, *[RowStatus.BROKEN] * 3, *[RowStatus.BAD_ARGUMENT] * 3]
    assert out[2:].isnan().all()
    assert out[:2].isfinite().all()
    assert argmax(logits, status=status).tolist()[2:5] == [-1, -1, -1]
    assert status.tolist() == [0, 1, 2, 2, 2, 0, 0, 0]


def rows_of_everything(rows: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + width)
    return {
        "logits": 3 * torch.randn(rows, width, generator=g), "temperature": torch.rand(rows, generator=g) + 0.2,
        "top_k": torch.randint(0, width, (rows,), generator=g).int(), "top_p": torch.rand(rows, generator=g), "min_p": 0.1 * torch.rand(rows, generator=g),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=g), "lineage": torch.randint(0, 9, (rows,), generator=g),
        "pos": torch.randint(0, 99, (rows,), generator=g).int(),
    }  # fmt: skip


WARP = ("logits", "temperature", "top_k", "top_p", "min_p")


def test_rows_do_not_depend_on_others_or_threads(isa):
    for width in (17, 300, 4099):
        r = rows_of_everything(40, width)
        keys = [r[n] for n in ("seed", "lineage", "pos")]
        ops.set_num_threads(1)
        laws = torch.cat([warp(*(r[n][i : i + 1] for n in WARP)) for i in range(40)])
        tokens = {m: torch.cat([draw(laws[i : i + 1], *(k[i : i + 1] for k in keys), 0, m) for i in range(40)]) for m in ("inverse", "gumbel")}
        for threads in (1, 2):
            ops.set_num_threads(threads)
            for begin, end in ((0, 40), (3, 20)):
                part = slice(begin, end)
                assert same_bits(warp(*(r[n][part] for n in WARP)), laws[part])
                assert same_bits(argmax(laws[part]), laws.argmax(-1).int()[part])
                for method, want in tokens.items():
                    assert same_bits(draw(laws[part], *(k[part] for k in keys), 0, method), want[part])


def test_rows_beyond_num_rows_are_left_alone(isa):
    r = rows_of_everything(9, 300)
    law = warp(*(r[n] for n in WARP))
    keys = [r[n] for n in ("seed", "lineage", "pos")]
    tokens, best = draw(law, *keys), argmax(law)
    r["logits"][6:], law[6:], r["temperature"][6:] = NAN, NAN, NAN
    for n, used in ((6, 6), (0, 0), (-1, 0), (-(2**31), 0)):
        out, status = torch.full((9, 400), NAN), i32(*[-9] * 9)
        warp(*(r[n] for n in WARP), out=out[:, 50:350], status=status, num_rows=i32(n))
        assert same_bits(out[:used, 50:350], law[:used])
        assert out[used:].isnan().all()
        assert out[:, :50].isnan().all()
        assert out[:, 350:].isnan().all()
        assert (status[used:] == -9).all()
        for op, want in ((lambda **k: draw(law, *keys, **k), tokens), (lambda **k: argmax(law, **k), best)):
            got = op(out=i32(*[-9] * 9), num_rows=i32(n))
            assert same_bits(got[:used], want[:used])
            assert (got[used:] == -9).all()


def test_strided_logits(isa):
    r = rows_of_everything(6, 300)
    wide = torch.full((6, 700), NAN)
    wide[:, 11:311] = r["logits"]
    want = warp(*(r[n] for n in WARP))
    assert same_bits(warp(wide[:, 11:311], *(r[n] for n in WARP[1:])), want)
    assert same_bits(warp(r["logits"].t().contiguous().t(), *(r[n].repeat_interleave(2)[::2] for n in WARP[1:])), want)
    assert same_bits(argmax(wide[:, 11:311]), argmax(r["logits"]))
    wide[:, 11:311] = want
    keys = [r[n] for n in ("seed", "lineage", "pos")]
    assert same_bits(draw(wide[:, 11:311], *keys), draw(want, *keys))


# ---- noise


def words(seed: int, lineage: int, pos: int, purpose: int, index: int) -> tuple[int, int]:
    """The upper 53 of the first 64 bits, as the uniform shows them."""
    value = uniform(torch.tensor([seed]), torch.tensor([lineage]), torch.tensor([pos]).int(), purpose, index).item()
    bits = int(value * 2**53)
    assert bits / 2**53 == value
    return bits >> 21, bits & (2**21 - 1)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # known answers of Random123, philox4x32 with 10 rounds: those whose first word is a purpose and an index
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_philox_known_answers(counter, key, want, isa):
    got = words(
        signed(key[0] | key[1] << 32, 64),
        signed(counter[2] | counter[3] << 32, 64),
        signed(counter[1], 32),
        counter[0] >> 28,
        counter[0] & (2**28 - 1),
    )
    assert got == (want[1], want[0] >> 11)


def test_noise_does_not_repeat_and_is_uniform(isa):
    """Kolmogorov-Smirnov over each coordinate of the key and counter on its own; all values differ."""
    n = 4000
    zero, rising = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    streams = [uniform(rising, zero, zero.int()), uniform(zero, rising, zero.int()), uniform(zero, zero, rising.int()),
               uniform(rising << 32, zero, zero.int()), uniform(zero, rising << 32, zero.int())]  # fmt: skip
    streams += [torch.cat([uniform(zero[:1], zero[:1], zero[:1].int(), p, i) for i in range(1, 800)]) for p in (0, 1, 2)]
    for stream in streams:
        assert stats.kstest(stream.numpy(), "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.08
    assert len(torch.cat([s[1:] for s in streams]).unique()) == sum(len(s) - 1 for s in streams)


def test_gumbel_noise_follows_its_law(isa):
    g = gumbel(torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int32), 400)
    assert stats.kstest(g.flatten().numpy(), "gumbel_r").pvalue > 1e-4
    assert g.isfinite().all()


@pytest.mark.parametrize("method", ["inverse", "gumbel"])
@pytest.mark.parametrize("purpose", [Purpose.TOKEN, Purpose.DRAFT])
def test_frequencies_of_draws(method, purpose, isa):
    """Chi-square of 20,000 draws with fixed seeds against the law; tokens of no probability never come."""
    n = 20000
    for width, which in ((7, 0), (40, 1), (600, 2)):
        law = (2 * torch.randn(width, generator=torch.Generator().manual_seed(which))).softmax(0)
        law[1::4] = 0
        law /= law.sum()
        vary = [torch.zeros(n, dtype=torch.int64), torch.full((n,), 5), torch.full((n,), 3)]
        vary[which] = torch.arange(n)  # seeds, lineages, positions
        tokens = draw(law.expand(n, width), vary[0], vary[1], vary[2].int(), purpose, method)
        seen = torch.bincount(tokens.long(), minlength=width).double().numpy()
        assert (seen[law.numpy() == 0] == 0).all()
        often = law.numpy() * n >= 5
        expected = np.append(law.double().numpy()[often] * n, max(n - law.double().numpy()[often].sum() * n, 1e-9))
        observed = np.append(seen[often], seen[~often].sum())
        if expected[-1] < 5:
            expected, observed = expected[:-1] * observed[:-1].sum() / expected[:-1].sum(), observed[:-1]
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_draws_at_the_ends_of_the_law(isa):
    """The first and the last token with weight, and weights that hide behind rounding."""
    keys = torch.arange(300), torch.zeros(300, dtype=torch.int64), torch.zeros(300, dtype=torch.int32)
    for width in (3, 512, 513, 2000):
        law = torch.zeros(width)
        law[width - 1] = 1e-30
        assert (draw(law.expand(300, width), *keys) == width - 1).all()
        law[0] = 1.0
        assert (draw(law.expand(300, width), *keys) == 0).all()
        law[0], law[width - 1] = 1e-38, 1e-38
        assert set(draw(law.expand(300, width), *keys).tolist()) == {0, width - 1}
        large = torch.full((width,), 3e38)
        assert draw(large.expand(300, width), *keys).min() >= 0


def test_gumbel_draws_of_close_laws_mostly_agree(isa):
    """What coupled acceptance rests on: the noise of a token is the same whatever the law."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 50, generator=g)
    p, q = logits.softmax(-1), (logits + 0.05 * torch.randn(3000, 50, generator=g)).softmax(-1)
    keys = torch.arange(3000), torch.zeros(3000, dtype=torch.int64), torch.zeros(3000, dtype=torch.int32)
    equal = (draw(p, *keys, 0, "gumbel") == draw(q, *keys, 0, "gumbel")).float().mean()
    assert equal > 0.9
    plain = (p.log().double() + gumbel(*keys, 50)).argmax(-1).int()
    assert (draw(p, *keys, 0, "gumbel") == plain).float().mean() > 0.9999


# ---- penalties


def penalized(logits: Tensor, history: list[int], repetition: float, presence: float, frequency: float, bias: dict[int, float]) -> Tensor:
    """The rule for one row, in plain Python."""
    out = logits.double().clone()
    for token in set(history):
        l = out[token].item()  # noqa: E741
        out[token] = (l / repetition if l > 0 else l * repetition) - presence - frequency * history.count(token)
    for token, value in bias.items():
        out[token] += value
    return out


def test_penalties_of_each_path_of_a_tree(isa):
    """Rows are nodes: prefix and path of each, ragged; a node's row has the bits of the plain sequence that ends there."""
    g = torch.Generator().manual_seed(3)
    prefix = torch.randint(0, 60, (30,), generator=g).tolist()
    parent, tokens = [-1, 0, 0, 1, 3, 3, 2], torch.randint(0, 60, (7,), generator=g).tolist()
    histories = []
    for node in range(7):
        path, at = [], node
        while at >= 0:
            path.insert(0, tokens[at])
            at = parent[at]
        histories.append(prefix + path)
    logits = 4 * torch.randn(7, 60, generator=g)
    strengths = 1 + torch.rand(7, generator=g), torch.rand(7, generator=g), torch.rand(7, generator=g) / 2
    biases = [{int(t): float(v) for t, v in zip(torch.randperm(60, generator=g)[:i], torch.randn(i, generator=g), strict=True)} for i in range(7)]
    biases[6][11] = -INF
    cu = i32(*np.cumsum([0, *map(len, histories)]).tolist())
    bias = (i32(*(t for b in biases for t in b)), f32(*(v for b in biases for v in b.values())), i32(*np.cumsum([0, *map(len, biases)]).tolist()))
    got = penalize(logits.clone(), i32(*(t for h in histories for t in h)), cu, *strengths, *bias)
    for row in range(7):
        want = penalized(logits[row], histories[row], *(float(s[row]) for s in strengths), biases[row])
        torch.testing.assert_close(got[row].double(), want, rtol=1e-6, atol=1e-6)
        alone = [i32(*biases[row]), f32(*biases[row].values()), i32(0, len(biases[row]))]
        padded = i32(*histories[row], -1, -1)[None]
        single = penalize(logits[row : row + 1].clone(), padded, None, *(s[row : row + 1] for s in strengths), *alone)
        assert same_bits(single[0], got[row])


def test_penalties_that_change_nothing_change_nothing(isa):
    logits = torch.randn(3, 50)
    logits[0, 4], logits[1, 4] = -INF, 1e-45
    history = torch.randint(0, 50, (3, 200)).int()
    assert same_bits(penalize(logits.clone(), history, None, torch.ones(3), torch.zeros(3), torch.zeros(3)), logits)
    masked = penalize(logits.clone(), history * 0 + 4, None, f32(2, 2, 2), torch.zeros(3), torch.zeros(3))
    assert masked[0, 4] == -INF
    others = torch.arange(50) != 4
    assert same_bits(masked[:, others], logits[:, others])


def test_rows_left_alone_by_penalties(isa):
    logits = torch.randn(5, 40)
    args = torch.randint(0, 40, (5, 9)).int(), None, 2 * torch.ones(5), torch.ones(5), torch.ones(5)
    want = penalize(logits.clone(), *args)
    frame = torch.full((5, 60), NAN)
    frame[:, 8:48] = logits
    penalize(frame[:, 8:48], *args, num_rows=i32(3))
    assert same_bits(frame[:3, 8:48], want[:3])
    assert same_bits(frame[3:, 8:48], logits[3:])
    assert frame[:, :8].isnan().all()
    assert frame[:, 48:].isnan().all()


def test_unchecked_penalties_survive_any_numbers(isa):
    """checked=True: the caller vouches, and where it is wrong nothing outside the tensors is touched."""
    logits, history, bias_ids, bias_values = (Arena().place(t, True) for t in (torch.randn(2, 40), i32(*range(9)), i32(1, 2, 3), f32(1, 2, 3)))
    for bad in (-(2**31), -1, 0, 3, 9, 10, 40, 2**31 - 1):
        for at in range(3):
            cu, cu_bias = Arena().place(i32(0, 4, 9), True), Arena().place(i32(0, 1, 3), True)
            cu[at] = cu_bias[at] = history[at] = bias_ids[at] = bad
            penalize(logits, history, cu, 2 * torch.ones(2), torch.ones(2), torch.ones(2), bias_ids, bias_values, cu_bias, checked=True)


@pytest.mark.parametrize("name", ["argmax", "warp", "draw", "gumbel"])
def test_memory_beside_the_rows_is_not_touched(name, isa):
    for width in WIDTHS:
        r = {k: Arena(1 << 18).place(v, True) for k, v in rows_of_everything(3, width).items()}
        keys = [r[n] for n in ("seed", "lineage", "pos")]
        if name == "argmax":
            argmax(r["logits"])
        elif name == "warp":
            warp(*(r[n] for n in WARP), out=Arena(1 << 18).place(torch.zeros(3, width), True))
        elif name == "draw":
            for method in ("inverse", "gumbel"):
                draw(Arena(1 << 18).place(r["logits"].softmax(-1), True), *keys, 0, method)
        else:
            sampling.gumbel(*keys, width)
