"""Every kernel that this machine can run, through the C API: against the formula, and bit for bit against the int8 rule."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from support.binary_matmul import FORMS, Problem, int8_by_specification, problem
from support.errors import raises_line

from fbiedge import ops_library
from fbiedge.bits import pack_bits, tile_bits
from fbiedge.errors import OpLibraryError

ISAS = ops_library.available_isas()
SMALL = (1, 31, 32, 33, 63, 64, 65, 172)
SIZES = (*SMALL, 768, 2048)
TOKENS = (1, 2, 3, 7, 8, 9, 128)
# Each of K inputs is off by half a step at most, and a step is max|x|/127 of its group. For normal inputs the largest
# of 128 is about 2.7 deviations and the mean magnitude 0.8, so even if all errors had one sign: 2.7/0.8/254 = 0.013.
INT8_BOUND = 0.02
FP32_BOUND = 2e-6  # of the summed magnitudes: some 16 roundings of 2^-24 in a row, whatever K is


def run(p: Problem, level: str, isa: str) -> npt.NDArray[np.float32]:
    return ops_library.matmul(*p.arguments(), n=p.n, scale_form=p.form, accuracy_level=level, isa=isa)


def assert_right(p: Problem, isas: list[str]) -> None:
    expected, magnitude = p.expected(), p.magnitude()
    exact = int8_by_specification(p)
    where = f"{p.form} M {p.m} N {p.n} K {p.k}"
    for isa in isas:
        fp32, int8 = run(p, "fp32", isa), run(p, "int8", isa)
        assert np.all(np.abs(fp32 - expected) <= FP32_BOUND * magnitude), f"{isa} fp32 {where}"
        assert np.array_equal(int8.view(np.int32), exact.view(np.int32)), f"{isa} int8 {where}"
    assert np.all(np.abs(exact - expected) <= INT8_BOUND * magnitude), f"int8 bound {where}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", SMALL)
def test_small_sizes_around_the_tile(form: str, k: int) -> None:
    for turn, (n, m) in enumerate(product(SMALL, TOKENS[:-1])):
        assert_right(problem(m, n, k, form, fp16=turn % 2 == 0, offsets=turn % 3 != 0, bias=turn % 4 != 0), ISAS)


@pytest.mark.parametrize("form", FORMS)
def test_every_large_size_is_covered(form: str) -> None:
    """Every (K, N) with at least one large size, tokens in turn; the slow scalar kernel where it takes under 0.1 s."""
    large = [(k, n) for k, n in product(SIZES, SIZES) if max(k, n) > 172]
    for turn, (k, n) in enumerate(large):
        m = TOKENS[(turn + FORMS.index(form)) % len(TOKENS)]
        if m == 128 and k * n > 768 * 768:
            m = 9  # 128 x 2048 x 2048 has its own test
        isas = ISAS if m * n * k < 5e7 else ISAS[:-1]
        assert_right(problem(m, n, k, form, fp16=turn % 2 == 0), isas)


def test_prefill_of_a_large_matrix() -> None:
    assert_right(problem(128, 2048, 2048, "column"), ISAS[:-1] or ISAS)


def test_the_int8_error_is_far_below_its_bound_on_average() -> None:
    """The bound assumes the worst; rounding errors cancel, so the relative error of the whole output is under 1 %."""
    p = problem(16, 768, 768, "column", bias=False)
    y = run(p, "int8", ISAS[0])
    assert np.linalg.norm(y - p.expected()) < 0.01 * np.linalg.norm(p.expected())


@pytest.mark.parametrize("level", ["fp32", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_its_neighbours(isa: str, level: str) -> None:
    p = problem(130, 80, 300, "row")
    together = run(p, level, isa)
    for index in (0, 63, 64, 129):
        alone = ops_library.matmul(
            p.x[index : index + 1], *p.arguments()[1:], n=p.n, scale_form="row", accuracy_level=level, isa=isa
        )
        assert np.array_equal(alone[0].view(np.int32), together[index].view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
def test_exact_zeros_and_ties_round_as_specified(isa: str) -> None:
    """Group 0 all zero; group 1 with maximum 127, so its step is 1 and every half is a tie between two integers."""
    p = problem(1, 33, 256, "single", bias=False, offsets=False)
    p.x[0, :128] = 0
    p.x[0, 128:] = np.arange(128) - 63.5
    p.x[0, 128] = 127
    assert np.array_equal(run(p, "int8", isa), int8_by_specification(p))


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (65, 172)])
def test_pack_equals_the_python_packing(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    weight[0, 0] = 0.0
    weight[-1, -1] = -0.0
    assert np.array_equal(ops_library.pack(weight), tile_bits(pack_bits(weight)))


def test_no_tokens() -> None:
    p = problem(1, 16, 32, "row")
    y = ops_library.matmul(p.x[:0], *p.arguments()[1:], n=16, scale_form="row")
    assert y.shape == (0, 16)


def test_bad_arguments_are_one_line() -> None:
    p = problem(1, 16, 32, "row")
    with raises_line(OpLibraryError, "tiles has shape (1, 1, 64)", "(2, 1, 64)"):
        ops_library.matmul(*p.arguments(), n=17, scale_form="row")
    with raises_line(OpLibraryError, "diagonal", "column, row, single, block"):
        ops_library.matmul(*p.arguments(), n=16, scale_form="diagonal")
    with raises_line(OpLibraryError, "unknown kernel", "avx512vnni"):
        ops_library.matmul(*p.arguments(), n=16, scale_form="row", isa="sse9")
    elsewhere = "avx2" if "neon" in ISAS else "neon"
    with raises_line(OpLibraryError, "can't run that kernel"):
        ops_library.matmul(*p.arguments(), n=16, scale_form="row", isa=elsewhere)
    block = problem(1, 16, 32, "block")
    with raises_line(OpLibraryError, "offsets in block form"):
        ops_library.matmul(block.x, block.tiles, block.scales, block.scales.copy(), n=16, scale_form="block")
