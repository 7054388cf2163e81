"""The packing benchmark: its figures are those of the formula, its rules are the published ones."""

import json
import subprocess
import sys

import numpy as np
import pytest

from longcot.benchmarks.packing import (
    DISTRIBUTIONS,
    LIMITS,
    RULES,
    TOKENS_PER_PACK,
    draw_lengths,
    failures,
    weighed,
)
from longcot.benchmarks.packing_rules import best_fit, karmarkar_karp, longest_first
from longcot.data.packing import CostModel

COST = CostModel(linear=1.0, quadratic=0.0)


def test_the_command_at_a_few_steps(tmp_path):
    out = tmp_path / "packing.json"
    command = [sys.executable, "-m", "longcot.benchmarks", "packing", "--json", "--seed", "4"]
    command += ["--steps", "6", "--planned-steps", "7", "--other-steps", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["seed"] == 4 and document["versions"]["numpy"] == np.__version__
    assert set(document["peers"]) == set(RULES)
    for size in (8, 64):
        assert 1 <= document[f"lower_bound_{size}"] <= document[f"imbalance_{size}"] + 1e-5
        assert 0 < document[f"fill_{size}"] <= 1
        assert document[f"most_extra_rounds_{size}"] <= 1
        for rule in document["peers"].values():
            assert document[f"imbalance_{size}"] <= rule[f"imbalance_{size}"]
    assert {row["distribution"] for row in document["others"]} == set(DISTRIBUTIONS)
    assert document["plan_seconds"] >= document["plan_seconds_8"] > 0


def test_the_figures_of_a_plan_counted_by_hand():
    lengths = np.array([30_000, 10_000, 20_000, 20_000])
    packs = [[[0], [1]], [[2, 3]]]  # the second rank has nothing in the second micro-step
    figures = weighed(packs, lengths, COST.of(lengths))
    assert figures["imbalance"] == (40_000 + 10_000) * 2 / 80_000
    assert figures["fill"] == 80_000 / (2 * 2 * TOKENS_PER_PACK)
    assert figures["overfull"] == 1 and figures["rounds"] == 2


@pytest.mark.parametrize("packs", [[[[0, 1]], [[2]]], [[[0, 1]], [[2, 3, 3]]]])
def test_a_plan_that_loses_or_doubles_a_document_is_no_plan(packs):
    lengths = np.array([30, 10, 20, 20])
    with pytest.raises(RuntimeError, match="lacks a document"):
        weighed(packs, lengths, COST.of(lengths))


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_lengths_are_drawn_by_seed_and_fit_a_pack(name):
    lengths = draw_lengths(name, 600, 3)
    assert len(lengths) == 600 and lengths.min() >= 1 and lengths.max() <= TOKENS_PER_PACK
    assert np.array_equal(lengths, draw_lengths(name, 600, 3))
    assert len(set(lengths.tolist())) < 3 or not np.array_equal(lengths, draw_lengths(name, 600, 4))


def test_the_differencing_method_on_the_textbook_example():
    # 8, 7, 6, 5, 4 in two: 8-7, 6-5 leave 1, 1, 4; then 4-1-1 = 2, so 16 and 14.
    lengths = np.array([8, 7, 6, 5, 4, 1])
    (micro_steps,) = karmarkar_karp(lengths[:5], COST, 16, 1)
    assert sorted(int(lengths[pack].sum()) for pack in micro_steps) == [14, 16]
    ranks = karmarkar_karp(lengths, COST, 100, 2)  # six documents, three to a rank
    assert [len(rank[0]) for rank in ranks] == [3, 3]


def test_best_fit_takes_the_fullest_row_with_room():
    # 6 and 7 open rows of 4 and 3 left; 3 goes beside 7, 4 beside 6.
    assert best_fit(np.array([6, 7, 3, 4]), COST, 10, 2) == [[[1, 2]], [[0, 3]]]


def test_longest_first_takes_another_round_where_two_packs_do_not_hold_all():
    # 5 and 5, then 4 and 3 leave 1 and 2 of 10: the last 3 asks for two packs more.
    packs = longest_first(np.array([5, 5, 4, 3, 3]), COST, 10, 2)
    assert packs == [[[3, 4], [1]], [[0], [2]]]


def test_a_missed_limit_and_a_better_peer_are_failures():
    peer = {"imbalance_8": 1.1, "imbalance_64": 1.1, "fill_8": 0.9, "fill_64": 0.6}
    peer |= {"overfull_packs_8": 0, "overfull_packs_64": 0}
    sound = LIMITS | {"fill_8": 0.9, "fill_64": 0.7}
    assert failures({**sound, "peers": {"peer": peer}}) == []
    assert len(failures({**sound, "imbalance_8": 1.0031, "peers": {"peer": peer}})) == 1
    peer |= {"fill_64": 0.8, "imbalance_8": 1.001}
    assert len(failures({**sound, "peers": {"peer": peer}})) == 2
    peer |= {"overfull_packs_64": 1}  # its packs were too full to be packs
    assert len(failures({**sound, "peers": {"peer": peer}})) == 1
