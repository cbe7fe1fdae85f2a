"""Names as torch.cuda.get_device_name has them."""

import pytest

from bigtune.bench.peaks import datasheet_tflops


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
        (None, None),
    ],
)
def test_a_name_has_the_peak_of_its_own_sheet(device: str | None, peak: float | None) -> None:
    assert datasheet_tflops(device, "bfloat16") == peak


def test_no_sheet_tells_what_torch_does_in_float32() -> None:
    assert datasheet_tflops("NVIDIA H200", "float32") is None
