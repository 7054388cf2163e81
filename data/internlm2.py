"""InternLM2's config for transformers, which no longer has one; importing this registers it.

vLLM has the model but asks transformers for the config. Registered here, its directories load
without running the Python code that they carry. A module of its own, imported only with vLLM: the
class must be importable by name, because vLLM's processes receive the config pickled.
"""

from transformers import AutoConfig, PreTrainedConfig


class InternLM2Config(PreTrainedConfig):
    model_type = "internlm2"

    def __init__(self, **fields) -> None:
        # vLLM reads these as attributes, whether the file has them or not.
        for name, value in {"hidden_act": "silu", "bias": False, **fields}.items():
            setattr(self, name, value)
        super().__init__(**fields)


AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
