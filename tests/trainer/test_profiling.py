"""Profiling: the trace holds the steps asked for and no others."""

import gzip
import json

import pytest
import torch

from longcot.trainer.config import Config, RunSection, check, profiled_steps
from longcot.trainer.profiling import profile_steps


def test_the_trace_has_the_steps_asked_for_and_no_others(tmp_path):
    after = profile_steps(tmp_path, 2, 3, rank=1, device=torch.device("cpu"))
    after(0)
    for step in range(1, 5):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3) + 1
        after(step)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-2-3-rank-1.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names


def config(text):
    return Config(run=RunSection(profile=text, num_steps=7, checkpoint_steps=()))


@pytest.mark.parametrize("text", ["3", "0:2", "4:3", "a:b", ":", "1:2:3", "5:8"])
def test_anything_but_two_steps_of_the_run_is_refused_before_it_starts(text):
    with pytest.raises(ValueError, match="give START:END"):
        check(config(text))
    assert profiled_steps(config("5:7")) == (5, 7) and profiled_steps(config(None)) is None
