"""The tables of benchmarks/kernels.py: what counts as what, and the time in which nothing runs."""

import pytest

from benchmarks.kernels import Gap, Kernel, busy, class_of, gaps_between, table


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triton_poi_fused_convolution_3", "layout and biases, compiled"),
        ("triton_poi_fused_add_convolution_silu_3", "elementwise, compiled"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mul_3", "elementwise, compiled"),
        ("triton_red_fused_native_group_norm_silu_12", "norms (and what is fused)"),
        ("triton_red_fused__scaled_mm_abs_amax_silu_4", "8 bits made of inputs (and what is fused)"),
        ("triton_poi_fused__int_mm_add_mul_3", "8-bit products' scales (and what is fused)"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("nvjet_qqtst_128x256_64x4_1x2_h_bz", "products, float8"),
        ("void cutlass_80_tensorop_i16832gemm_s8_128x128", "products, int8"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "between ranks (NCCL)"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, expected: str) -> None:
    assert class_of(name) == expected


def test_time_of_kernels_side_by_side_counts_once() -> None:
    assert busy([Kernel("a", 0, 10), Kernel("b", 5, 12), Kernel("c", 6, 8), Kernel("d", 20, 21)]) == 13


def test_nothing_runs_only_after_the_kernel_that_ends_last() -> None:
    first, inner, last = Kernel("a", 0, 10), Kernel("b", 2, 4), Kernel("c", 13, 14)
    assert gaps_between([last, inner, first]) == [Gap(3, first, last)]
    assert gaps_between([]) == []


def test_the_table_says_where_nothing_runs() -> None:
    # Each step: a graph of three kernels, 1 us apart; 5 us later a kernel, 7 us later another.
    kernels = []
    for step in (0, 1):
        at, graph = 30.0 * step, 100 + step
        kernels += [Kernel("nvjet_tst", at + 2 * place, at + 2 * place + 1, graph) for place in (0, 1)]
        kernels += [Kernel("nccl", at + 4, at + 5, graph)]
        kernels += [Kernel("void guidance", at + 10, at + 11, 200 + step)]
        kernels += [Kernel("void at::native::euler", at + 18, at + 20, 300 + step)]
    rows = table(kernels, seconds=1e-4, steps=2).splitlines()
    start = rows.index("| where | ms a step | times a step | us each |")
    assert rows[start - 2].startswith(
        "While profiled a step takes 0.03 ms, with 1.0 graphs and 2.0 kernels launched one by one."
    )
    # 2 x (1 + 1 + 5 + 7) and once 10 from the last kernel to the next graph.
    assert rows[start + 2 : start + 12] == [
        "| anywhere | 0.019 | 4.5 | 4.2 |",
        "| from a kernel to a kernel | 0.007 | 1.0 | 7.0 |",
        "| from a graph to a kernel | 0.005 | 1.0 | 5.0 |",
        "| from a kernel to a graph | 0.005 | 0.5 | 10.0 |",
        "| within a graph | 0.002 | 2.0 | 1.0 |",
        "| guidance -> euler (from a kernel to a kernel) | 0.007 | 1.0 | 7.0 |",
        "| nccl -> guidance (from a graph to a kernel) | 0.005 | 1.0 | 5.0 |",
        "| euler -> nvjet_tst (from a kernel to a graph) | 0.005 | 0.5 | 10.0 |",
        "| nvjet_tst -> nvjet_tst (within a graph) | 0.001 | 1.0 | 1.0 |",
        "| nvjet_tst -> nccl (within a graph) | 0.001 | 1.0 | 1.0 |",
    ]


def test_the_table_says_what_the_exchange_and_the_gaps_cost() -> None:
    # Two steps of 10 ms: products for 6 ms each, an exchange of 4 ms of which 3 run beside them.
    kernels = [
        kernel
        for start in (0, 10_000)
        for kernel in (Kernel("nvjet_tst", start, start + 6000), Kernel("nccl", start + 3000, start + 7000))
    ]
    rows = table(kernels, seconds=0.02, steps=2).splitlines()
    assert "| products | 6.00 | 1 | nvjet_tst 6.00 |" in rows
    assert "| between ranks (NCCL) | 4.00 | 1 | nccl 4.00 |" in rows
    assert "| of that, with nothing else running | 1.00 | | |" in rows
    assert "| nothing runs | 3.00 | | |" in rows
    assert "| a step | 10.00 | 2 | |" in rows
    assert "| nvjet_tst | 6.00 | 1.0 | 6000.0 |" in rows


def test_the_table_says_between_which_kernels_copies_are_made() -> None:
    products, zeroed = "nvjet_tst", "Memset (Device)"
    names = (products, zeroed, products, "Memcpy DtoD", "nccl", zeroed, products)
    kernels = [Kernel(name, 10.0 * place, 10.0 * place + 2) for place, name in enumerate(names)]
    rows = table(kernels, seconds=1e-4, steps=1).splitlines()
    start = rows.index("| copy | after | before | calls a step | us each |")
    assert sorted(rows[start + 2 : start + 5]) == [
        "| Memcpy DtoD | nvjet_tst | nccl | 1.0 | 2.0 |",
        "| Memset (Device) | nccl | nvjet_tst | 1.0 | 2.0 |",
        "| Memset (Device) | nvjet_tst | nvjet_tst | 1.0 | 2.0 |",
    ]


def test_the_table_says_where_the_copy_engines_alone_run() -> None:
    peers = "Memcpy PtoP (Device -> Device)"
    kernels = [Kernel("nvjet_tst", 0, 5, 1), Kernel(peers, 1, 8, 1), Kernel("nccl", 9, 10, 1)]
    text = table(kernels, seconds=1e-5, steps=1)
    alone = text.partition("Nothing but copies by copy engines runs:")[2].splitlines()
    assert "| nvjet_tst -> nccl (within a graph) | 0.004 | 1.0 | 4.0 |" in alone
    assert "Nothing but copies" not in table([kernels[0], kernels[2]], seconds=1e-5, steps=1)
