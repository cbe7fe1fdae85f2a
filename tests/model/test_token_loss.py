"""A fused kernel computes losses only where it gives what torch gives."""

import importlib.util
import os
from itertools import product

import pytest
import torch

from bigtune.config import Loss
from bigtune.model.token_loss import Change, Each, _able, _liger, _torch, each_token, kernels_used

CPU = torch.device("cpu")
KINDS = [(Change(scale, cap), Loss(z_loss=z)) for scale, cap, z in product((1.0, 0.3), (None, 2.0), (0.0, 0.01))]


def exact(logits: torch.Tensor, targets: torch.Tensor, change: Change, loss: Loss) -> Each:
    return _torch(logits, targets, change, loss)


def wrong_gradient(logits: torch.Tensor, targets: torch.Tensor, change: Change, loss: Loss) -> Each:
    minimised, plain, gradient = _torch(logits, targets, change, loss)
    return minimised, plain, gradient * 1.01


def wrong_loss(logits: torch.Tensor, targets: torch.Tensor, change: Change, loss: Loss) -> Each:
    minimised, plain, gradient = _torch(logits, targets, change, loss)
    return minimised * 1.01, plain, gradient


def broken(logits: torch.Tensor, targets: torch.Tensor, change: Change, loss: Loss) -> Each:
    raise ImportError("not installed")


def no_scale(logits: torch.Tensor, targets: torch.Tensor, change: Change, loss: Loss) -> Each:
    return _torch(logits, targets, Change(1.0, change.softcap), loss)


@pytest.mark.parametrize("spread", [0.01, 3.0, 300.0])
def test_losses_and_gradients_are_those_of_float64(spread: float) -> None:
    """Also where the target's probability is 0 in float32."""
    random = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(9, 50_000, generator=random)
    targets = torch.randint(50_000, (9,), generator=random)
    wide = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide)
    minimised, plain, gradient = _torch(logits, targets, Change(), Loss())
    assert torch.equal(minimised, plain)
    torch.testing.assert_close(plain.double(), wanted.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-5 if spread < 300 else 2e-4, atol=1e-9)


def test_a_kernel_that_gives_the_same_is_able() -> None:
    assert all(_able(exact, change, loss, CPU) for change, loss in KINDS)


def test_one_that_gives_another_loss_or_gradient_or_fails_is_not() -> None:
    for kernel in (wrong_gradient, wrong_loss, broken):
        assert not any(_able(kernel, change, loss, CPU) for change, loss in KINDS)


def test_one_that_forgets_what_the_model_does_to_its_logits_is_not() -> None:
    assert _able(no_scale, Change(1.0, 2.0), Loss(), CPU)
    assert not _able(no_scale, Change(0.3, 2.0), Loss(), CPU)


def test_on_a_cpu_it_is_torch() -> None:
    kernels_used.clear()
    each_token(torch.randn(3, 9), torch.tensor([1, 2, 3]), Change(), Loss())
    assert kernels_used == {"torch"}


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs liger-kernel, and TRITON_INTERPRET=1 to run it on a CPU",
)
def test_ligers_kernel_gives_what_torch_gives() -> None:
    """Without a soft cap, whose code asks for what Triton's interpreter does not have."""
    assert all(_able(_liger, change, loss, CPU) for change, loss in KINDS if change.softcap is None)
