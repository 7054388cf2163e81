"""What the kernel tests share: the error budget, and the interpreter's stand-in for a GPU."""

import functools

import pytest
import torch


@pytest.fixture(scope="session")
def assert_within_budget():
    """(ours, torchs, exact): our error is at most twice torch's own at the same dtype.

    In two norms: the largest error finds one wrong element, the mean square a bias. Slack for
    rounding the result once and for a few fp32 sums.
    """

    def check(ours, torchs, exact):
        slack = torch.finfo(ours.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        for order in (2, float("inf")):
            norm = functools.partial(torch.linalg.vector_norm, ord=order)
            error, torchs_error = norm(ours.double() - exact), norm(torchs.double() - exact)
            assert error <= 2 * torchs_error + slack * norm(exact)

    return check


@pytest.fixture
def interpreted():
    """Triton's kernels run on CPU tensors: tests/conftest.py has imported them so."""
    if torch.cuda.is_available():
        pytest.skip("the GPU tests run the kernel itself")
