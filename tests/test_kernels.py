"""The tables of benchmarks/kernels.py: what counts as what, and the time in which nothing runs."""

import pytest

from benchmarks.kernels import Kernel, busy, class_of, table


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
