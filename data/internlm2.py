"""InternLM2's config for transformers, which no longer has one.

vLLM has the model but asks transformers for the config. Registered here, its directories load
without running the Python code that they carry.
"""

from functools import cache


@cache
def register_internlm2() -> None:
    """Make `transformers.AutoConfig` know `internlm2`; does nothing the second time."""
    from transformers import AutoConfig, PreTrainedConfig

    class InternLM2Config(PreTrainedConfig):
        model_type = "internlm2"

        def __init__(self, **fields) -> None:
            # vLLM reads these as attributes, whether the file has them or not.
            for name, value in {"hidden_act": "silu", "bias": False, **fields}.items():
                setattr(self, name, value)
            super().__init__(**fields)

    AutoConfig.register("internlm2", InternLM2Config)
