"""Run by test_vllm_parity.py in a process of its own: vLLM starts its own process group.

vllm_worker.py PROMPTS.json MODEL...    prints {model: log-probabilities of the prompts}
"""

import json
import sys
from pathlib import Path

from longcot.data.sampling import Engine, prepare_process

if __name__ == "__main__":
    prepare_process()
    prompts = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for model in sys.argv[2:]:
        with Engine(Path(model)) as engine:
            found[model] = engine.prompt_logprobs(prompts)
    print(json.dumps(found))
