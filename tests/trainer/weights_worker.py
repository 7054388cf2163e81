"""Run by torchrun from test_weights.py: load a directory into shards, export it again.

weights_worker.py SOURCE DESTINATION TOKENIZER [MAX_FILE_BYTES]
"""

import sys
from pathlib import Path

import torch

from longcot.data.model_files import model_config
from longcot.trainer import weights
from longcot.trainer.families import decoder_config
from longcot.trainer.model import Decoder
from longcot.trainer.parallel import leave_world, shard, start_world

if __name__ == "__main__":
    source, destination, tokenizer_path = map(Path, sys.argv[1:4])
    if len(sys.argv) > 4:
        weights.MAX_FILE_BYTES = int(sys.argv[4])
    world = start_world()
    raw = model_config(source)
    with torch.device("meta"):
        model = Decoder(decoder_config(raw), "sdpa")
    shard(model, world.mesh, torch.float32)
    model.to_empty(device=world.device)
    weights.load(model, source)
    weights.export(
        model, destination, raw_config=raw, tokenizer_path=tokenizer_path, dtype=torch.bfloat16
    )
    leave_world(0)
