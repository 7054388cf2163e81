"""Scaling in place by a number on the device."""

import pytest
import torch

from longcot.kernels.launching import run
from longcot.kernels.scaling import MAX_PROGRAMS, scale_, scale_launch


# One element; a block and one more; more blocks than programs would need 8 million elements, so
# that loop runs on a GPU only.
@pytest.mark.parametrize("size", [1, 4096, 4097])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_the_kernel_multiplies_and_leaves_the_rest(size, factor, triton_device):
    values = torch.arange(size + 1, device=triton_device).float()
    expected = values * factor
    expected[-1] = size
    run(scale_launch(values[:-1], torch.tensor(factor, device=triton_device)))
    assert torch.equal(values, expected)


@pytest.mark.gpu
def test_on_a_gpu_every_block_of_a_large_tensor_is_reached():
    values = torch.ones(MAX_PROGRAMS * 4096 * 2 + 5, dtype=torch.bfloat16, device="cuda")
    scale_(values, torch.tensor(0.5, device="cuda"))
    assert (values == 0.5).all()


def test_on_a_cpu_it_is_torchs_product():
    values = torch.tensor([1.5, -2.0])
    scale_(values, torch.tensor(3.0))
    assert values.tolist() == [4.5, -6.0]
