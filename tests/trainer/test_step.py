"""One step is the same step however it is packed and on however many ranks: real processes, FSDP2
over gloo.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from longcot.data.batch import pack_documents, prompt_mask
from longcot.data.packing import StepPlan
from longcot.trainer import weights
from longcot.trainer.families import decoder_config, qwen3_config
from longcot.trainer.loop import StepResult, train, train_step
from longcot.trainer.model import Decoder
from longcot.trainer.optimizer import build_adamw
from longcot.trainer.parallel import shard

CONFIG = qwen3_config(
    vocab_size=131, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, max_position_embeddings=64, rope_theta=1e4, tie_embeddings=True, eos_token_id=0,
)  # fmt: skip
WORKER = Path(__file__).with_name("step_worker.py")


@pytest.fixture(scope="module", params=["tied", "untied"])
def steps(request, tmp_path_factory):
    """(packing, ranks) -> what the worker saved."""
    folder = tmp_path_factory.mktemp(request.param)
    results = {}
    for packing in ("single", "packed"):
        for ranks in (1, 2):
            out = folder / f"{packing}-{ranks}.pt"
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(ranks),
                 str(WORKER), str(out), packing, request.param],
                capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            results[packing, ranks] = torch.load(out)
    return results


def test_packing_and_ranks_change_neither_loss_nor_gradients(steps):
    truth = steps["single", 1]
    assert truth["micro_steps"] == 8  # one document at a time
    assert steps["packed", 2]["micro_steps"] < steps["single", 2]["micro_steps"] == 4
    assert truth["norm"] > 0.1
    for result in steps.values():
        assert result["loss"] == pytest.approx(truth["loss"], rel=1e-6)
        for name, gradient in truth["gradients"].items():
            difference = (result["gradients"][name] - gradient).abs().max()
            assert difference <= 1e-6 * gradient.abs().max(), name


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were():
    model = Decoder(decoder_config(CONFIG), "sdpa")
    mesh = init_device_mesh("cpu", (1,))
    shard(model, mesh, torch.float32)
    weights.initialize(model, 0)
    batch = pack_documents([np.arange(1, 20)], [prompt_mask(19, 3)])
    optimizer = build_adamw(
        model.parameters(), learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1
    )

    def step(num_targets):
        device = torch.device("cpu")
        return train_step(
            model, optimizer, [batch], num_targets=num_targets, max_gradient_norm=1.0, device=device
        )

    loss, norm = step(batch.num_targets)
    assert loss == pytest.approx(math.log(CONFIG["vocab_size"]), rel=0.05) and norm > 0
    before = [weights.local_rows(p)[0].clone() for p in model.parameters()]
    with torch.no_grad():
        weights.local_rows(model.norm.weight)[0][5] = math.inf
    with pytest.raises(FloatingPointError, match="update was not made"):
        step(batch.num_targets)
    for (name, parameter), kept in zip(model.named_parameters(), before, strict=True):
        if name == "norm.weight":
            kept[5] = math.inf  # put there by hand above
        assert torch.equal(weights.local_rows(parameter)[0], kept), name


def run_three_steps(**options):
    """The second step's second pack has an infinite loss; what each step gave, and the weights."""
    model = Decoder(decoder_config(CONFIG), "sdpa")
    shard(model, init_device_mesh("cpu", (1,)), torch.float32)
    weights.initialize(model, 0)
    good = pack_documents([np.arange(1, 20)], [prompt_mask(19, 3)])
    bad = replace(good, weights=torch.full((19,), math.inf))
    plan = StepPlan(packs=(((7,), (4, 5)),), num_tokens=38, num_targets=2 * good.num_targets)
    results: list[StepResult] = []
    states = []

    def after_step(result):
        results.append(result)
        states.append([weights.local_rows(p)[0].clone() for p in model.parameters()])

    optimizer = build_adamw(
        model.parameters(), learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1
    )
    try:
        train(
            model,
            optimizer,
            [(plan, [good, good]), (plan, [good, bad]), (plan, [good, good])],
            learning_rate=lambda step: 0.1,
            max_gradient_norm=1.0,
            device=torch.device("cpu"),
            after_step=after_step,
            **options,
        )
    except FloatingPointError as error:
        return results, states, str(error)
    return results, states, ""


def test_a_step_that_is_not_finite_ends_the_run_and_names_its_rows():
    results, _, said = run_three_steps()
    assert len(results) == 1
    assert said.startswith("step 2: loss inf") and "rows 4, 5 (rank 0, pack 1)" in said


def test_or_is_skipped_where_that_is_asked_for():
    results, states, said = run_three_steps(skips_not_finite=True)
    assert said == "" and [result.is_skipped for result in results] == [False, True, False]
    for before, after, later in zip(*states, strict=True):
        assert torch.equal(before, after) and not torch.equal(after, later)
    # Nothing of the skipped step is left in the third: it is the second of a run without it.
    assert results[2].loss < results[0].loss


def test_the_loss_is_the_mean_over_all_targets_not_a_mean_of_means(steps):
    # An untrained model is near log(vocabulary) on every token, whatever the grouping.
    assert steps["packed", 2]["loss"] == pytest.approx(torch.tensor(131.0).log().item(), rel=0.05)
