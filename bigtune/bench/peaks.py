"""What datasheets promise of GPUs: dense bfloat16 matrix products, 10^12 operations a second (TFLOP/s).

NVIDIA's sheets tell most of them with sparsity, which is twice as much. Sources: the products' datasheets below
nvidia.com/en-us/data-center; the whitepapers of Ada and of Ampere's GA102 for GeForce, accumulating in float32; and
amd.com/en/products/accelerators/instinct, of the MI250X for one of its two dies, which torch takes for a device each.
"""

import re

BFLOAT16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),
)
"""By words of the name that torch has for a device: the first line counts whose words are all in it."""
OTHER_CHIPS = {"MIG", "LAPTOP", "D"}
"""Words that tell a slice of a GPU, or another chip of the same name."""


def datasheet_tflops(device: str | None, precision: str) -> float | None:
    """The peak of one device.

    Args:
        device: as `torch.cuda.get_device_name` calls it; None without a GPU.
        precision: bfloat16 or float32; of the latter no sheet has what torch computes by default.

    Returns:
        None where it is not known.
    """
    words = set(re.split(r"[\s\-/]+", (device or "").upper()))
    if precision != "bfloat16" or words & OTHER_CHIPS:
        return None
    return next((peak for name, peak in BFLOAT16_TFLOPS if words.issuperset(name.upper().split())), None)
