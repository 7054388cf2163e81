"""Selective and full recomputation and offload change no bit of the gradients, and save memory."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from longcot.data.batch import PackedBatch
from longcot.trainer import weights
from longcot.trainer.activations import Activations, keep_activations
from longcot.trainer.model import Decoder, DecoderConfig
from longcot.trainer.parallel import shard

MODES: list[Activations] = ["keep", "selective", "recompute", "offload"]
NUM_LAYERS, HIDDEN_SIZE = 5, 48
SHAPE = DecoderConfig(
    vocab_size=97, hidden_size=HIDDEN_SIZE, intermediate_size=96, num_layers=NUM_LAYERS,
    num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=512,
)  # fmt: skip


def pack(lengths, seed):
    generator = np.random.default_rng(seed)
    ids = torch.from_numpy(generator.integers(0, 97, sum(lengths)))
    return PackedBatch(
        input_ids=ids,
        targets=ids.roll(-1),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        max_seqlen=max(lengths),
        num_targets=len(ids),
        weights=None,
    )


# The second pack is longer than the first, so that host buffers must grow, and the third shorter.
PACKS = [pack([60, 40], 0), pack([5, 200], 1), pack([17], 2)]


def gradients(mode, dtype, device):
    """Losses and gradients of three micro-steps, with a pass without gradients between them."""
    model = Decoder(SHAPE, "sdpa")
    keep_activations(model, mode)
    shard(model, init_device_mesh(device.type, (1,)), dtype)
    model.to(device)
    weights.initialize(model, 3)
    losses = []
    for batch in PACKS:
        with torch.no_grad():
            before = model(batch.to(device), 1 / 300)
        loss = model(batch.to(device), 1 / 300)
        assert torch.equal(before, loss)
        loss.backward()
        losses.append(loss.detach())
    return losses + [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def kept(request):
    return request.param, gradients("keep", request.param, torch.device("cpu"))


@pytest.mark.parametrize("mode", MODES[1:])
def test_every_mode_gives_the_same_bits(mode, kept):
    dtype, expected = kept
    for ours, theirs in zip(gradients(mode, dtype, torch.device("cpu")), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_each_rung_holds_less_than_the_one_before():
    # What is held between the passes, by the CPU's allocator as the profiler saw it.
    batch = pack([400], 0)
    held = {}
    for mode in MODES:
        model = Decoder(SHAPE, "sdpa")
        keep_activations(model, mode)
        shard(model, init_device_mesh("cpu", (1,)), torch.float32)
        weights.initialize(model, 3)
        profile = torch.profiler.profile(profile_memory=True)
        with profile:
            loss = model(batch, 1.0)
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        held[mode] = sum(e.nbytes() for e in events if e.name() == "[memory]")  # type: ignore
        loss.backward()
    assert held["selective"] < 0.75 * held["keep"]
    # One input of D values a token and block, and what the head and the embedding hold.
    input_bytes = 400 * HIDDEN_SIZE * 4
    assert held["keep"] - held["recompute"] > 10 * NUM_LAYERS * input_bytes
    assert held["recompute"] < held["selective"] - 4 * NUM_LAYERS * input_bytes


def test_under_a_pass_without_gradients_nothing_is_kept():
    model = Decoder(SHAPE, "sdpa")
    keep_activations(model, "offload")
    shard(model, init_device_mesh("cpu", (1,)), torch.float32)
    weights.initialize(model, 3)
    with torch.no_grad():
        model(PACKS[0], 1.0)
    for block in model.blocks:
        store = block.run.args[0]  # type: ignore[union-attr]
        assert not any(vars(store)[name] for name in ("_inputs", "_waiting") if name in vars(store))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES[1:])
def test_on_a_gpu_every_mode_gives_the_same_bits(mode):
    device = torch.device("cuda")
    expected = gradients("keep", torch.bfloat16, device)
    for _ in range(3):  # a race between streams would not show every time
        for ours, theirs in zip(gradients(mode, torch.bfloat16, device), expected, strict=True):
            assert torch.equal(ours, theirs)
